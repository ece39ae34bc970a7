"""Base class of all configurations: common fields, checks and costs.

Costs: a product is a multiplication and an addition, two floating-point operations (FLOPs). Only
matrix products and unmasked pairs of attention count. `filled` and `queue_filled` are the filled
slots of the long-term memory, None: all of them.
"""

from functools import wraps

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("intermediate_size", "window_length"),
)
POSITIVE = ("rms_norm_eps", "initial_embedding_std", "initial_temperature", "logit_scale")
SCHEDULES = ("auto", "layers", "wavefront")


def validated(cls):
    """Apply `strict`, with `ValueError` for invalid values at construction."""
    cls = strict(cls)
    init = cls.__init__

    @wraps(init)
    def init_or_value_error(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    cls.__init__ = init_or_value_error
    return cls


@validated
class DecoderConfig(PreTrainedConfig):
    """A decoder that reads text window by window and carries a memory between them."""

    model_type = "memory_decoder"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "memory"]  # noqa: RUF012
    # Fields of a subclass that do not affect its memory.
    free_fields = tuple[str, ...]()  # without annotation, which would make it a field

    vocab_size: int = 32128
    hidden_size: int = 1024  # channels of the residual stream
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    head_dim: int = 128  # channels per head
    intermediate_size: int = 4096  # channels inside the feed-forward network
    hidden_act: str = "relu"
    mlp_bias: bool = False
    window_length: int = 512  # tokens
    mask_empty_memory: bool = False  # False, as released: empty slots are attended to, as zeros
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # tokens; greater distances share the last bucket
    rms_norm_eps: float = 1e-6  # also of the norm of keys and queries
    dropout: float | int = 0.05
    attention_dropout: float | int = 0.05
    initial_embedding_std: float | int = 1.0
    initial_temperature: float | int = 1.0  # of attention, per head; multiplies the scores
    # Factor of the logits, as TRL names it. None: 1/sqrt(hidden_size), resolved at construction.
    logit_scale: float | int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    schedule: str = "layers"  # one of `SCHEDULES`; no effect: earlier configurations have it
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.logit_scale is None and self.hidden_size > 0:
            self.logit_scale = self.hidden_size**-0.5
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """The class of each layer in a cache of transformers.

        A property: a field would be written to config.json, and AutoTokenizer rejects the names.
        """
        return ["window_memory"] * self.num_hidden_layers

    def validate_layer_type(self):
        """Skip the check of transformers, whose list does not have our layer types."""

    def validate_architecture(self):
        """Check the sizes."""
        require_at_least(self, 1, SIZES)
        for name in ("dropout", "attention_dropout"):
            words = f"it is a probability, 0 <= {name} < 1"
            require_each(self, [name], lambda rate: 0 <= rate < 1, words)
        require_each(self, POSITIVE, lambda value: value > 0, "it must be greater than 0")
        known = f"transformers knows {', '.join(sorted(ACT2FN))}"
        require_each(self, ["hidden_act"], ACT2FN.__contains__, known)
        require_one_of(self, {"schedule": SCHEDULES})
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        require(
            buckets >= 2 and buckets % 2 == 0 and distance > buckets // 2,
            f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance "
            f"{distance}: the first must be even, the second greater than half of the first",
        )

    # Costs of the memory, which subclasses define. All other costs follow from them.

    def keys_attended(self, slot, filled=None) -> int:
        """Count the keys in all layers that a token after `slot` others of its window sees."""
        raise ValueError(f"{type(self).__name__} names no memory: use one of its subclasses")

    def window_products(self, filled=None) -> tuple[int, int]:
        """Count the products at the start and at the end of a window besides its tokens'."""
        return 0, 0

    def cached_states(self) -> tuple[int, int]:
        """Count the numbers in a cache besides keys and values: in its dtype, in float32."""
        return 0, 0

    def memory_floats(self) -> int:
        """Count the floats that a row carries between windows, as the papers do."""
        return self.keys_attended(0) * 2 * self.attention_size

    @property
    def attention_size(self) -> int:
        """Number of channels of all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Number of weights of the matrices of one layer, which are its products per token."""
        return self.hidden_size * (4 * self.attention_size + 2 * self.intermediate_size)

    def forward_flops(self, num_tokens, queue_filled=None, with_logits=True) -> int:
        """Count the FLOPs of a forward pass of one row from the start of a window."""
        head = with_logits * num_tokens * self.hidden_size * self.vocab_size
        return 2 * (self.body_products(num_tokens, queue_filled) + head)

    def training_flops(self, num_tokens, queue_filled=None) -> int:
        """Count the FLOPs of a training step of one row: backward costs two forward passes."""
        return 3 * self.forward_flops(num_tokens, queue_filled)

    def window_end_flops(self, queue_filled=None) -> int:
        """Count the additional FLOPs of the last token of a window."""
        return 2 * self.window_products(queue_filled)[1]

    def body_products(self, num_tokens, filled=None) -> int:
        """Count the products of all layers for one row."""
        start, end = self.window_products(filled)
        begun, full = -(-num_tokens // self.window_length), num_tokens // self.window_length
        attention = self.pairs_attended(num_tokens, filled) * 2 * self.attention_size
        layers = num_tokens * self.num_hidden_layers * self.layer_weights
        return layers + attention + begun * start + full * end

    def pairs_attended(self, num_tokens, filled=None) -> int:
        """Count the unmasked pairs of a token and a key in all layers."""
        windows, rest = divmod(num_tokens, self.window_length)
        whole = self.sum_keys(0, self.window_length, filled)
        return windows * whole + self.sum_keys(0, rest, filled)

    def sum_keys(self, start, stop, filled=None) -> int:
        # Within a window the number of keys grows linearly: an arithmetic series.
        ends = self.keys_attended(start, filled) + self.keys_attended(stop - 1, filled)
        return (stop - start) * ends // 2

    def weight_bytes(self, bytes_per_number) -> int:
        """Count the bytes of the weights that a token reads: all layers and the head."""
        layers, head = (
            self.num_hidden_layers * self.layer_weights,
            self.hidden_size * self.vocab_size,
        )
        return (layers + head) * bytes_per_number

    def cache_bytes(self, bytes_per_number) -> int:
        """Count the bytes of the cache of a row, which do not depend on its length."""
        keys = self.keys_attended(0) + self.num_hidden_layers * self.window_length
        states, exact = self.cached_states()
        numbers = keys * 2 * self.attention_size + states
        return numbers * bytes_per_number + exact * max(4, bytes_per_number)

    def decoding_bytes(self, slot, bytes_per_number) -> int:
        """Count the bytes read to decode a token of a row after `slot` others of its window."""
        read = self.keys_attended(slot) * 2 * self.attention_size
        return self.weight_bytes(bytes_per_number) + read * bytes_per_number


def require(condition, message):
    if not condition:
        raise ValueError(message)


def require_each(config, names, condition, words):
    """Check that fields meet a condition, which `words` describe."""
    for name in names:
        value = getattr(config, name)
        require(condition(value), f"{name} is {value!r}: {words}")


def require_at_least(config, least, names):
    require_each(config, names, lambda value: value >= least, f"it must be {least} or more")


def require_one_of(config, table):
    for name, allowed in table.items():
        words = f"it must be one of {', '.join(allowed)}"
        require_each(config, [name], allowed.__contains__, words)


def require_existing_layers(config, name, layers):
    """Check that the layer indices of the field `name` exist and are unique."""
    layers, count = list(layers), config.num_hidden_layers
    beyond = [i for i in layers if i not in range(count)]
    require(
        not beyond,
        f"{name} {beyond} do not exist: the model has {count} layers, 0 to {count - 1}; name some "
        f"of these, or () for none",
    )
    require(len({*layers}) == len(layers), f"{name} {layers} names a layer twice: name each once")
