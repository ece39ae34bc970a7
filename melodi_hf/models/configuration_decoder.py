"""What the configurations of all systems share: the skeleton, its windows and its refusals."""

from functools import wraps

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# The order in which the cells (layer, window) of a call are computed, which does not change their
# values. "layers": layer by layer. "auto": the same; checkpoints of earlier versions have it.
# "wavefront": by diagonals, cells of different layers side by side. A call that cannot be read so
# (fewer than two whole windows, rows at different places, attentions or hidden states asked for) is
# read layer by layer all the same. A model is refused unless its layers are the same computation
# with other weights: other classes, attributes, hooks, adapters, checkpointing, weights that are
# quantised or elsewhere (see `side_by_side`).
SCHEDULES = ("auto", "layers", "wavefront")


def validated(cls):
    """`strict`, but what is refused at construction is refused with a `ValueError`."""
    cls = strict(cls)
    init = cls.__init__

    @wraps(init)
    def refuse(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    cls.__init__ = refuse
    return cls


@validated
class DecoderConfig(PreTrainedConfig):
    """A decoder that reads its text window by window and carries a memory from one to the next.

    Sizes that cannot work are refused at construction with a `ValueError`.
    """

    model_type = "memory_decoder"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "memory"]  # noqa: RUF012
    # Of the fields that a system adds, those that leave a memory and its meaning as they are.
    free_fields = tuple[str, ...]()  # an annotation would make it one of them

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
    relative_attention_max_distance: int = 128  # tokens; all beyond share the last bucket
    rms_norm_eps: float = 1e-6  # also of the key and query norm
    dropout: float | int = 0.05
    attention_dropout: float | int = 0.05
    initial_embedding_std: float | int = 1.0
    initial_temperature: float | int = 1.0  # of attention, per head; greater is sharper
    # Factor of the logits, under the name that TRL and others read. None: 1/sqrt(hidden_size), as
    # released, resolved at construction.
    logit_scale: float | int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    schedule: str = "layers"  # or "wavefront", see `SCHEDULES`
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.logit_scale is None and self.hidden_size > 0:
            self.logit_scale = self.hidden_size**-0.5
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Which class holds each layer's memory in a cache of transformers (a property: as a field
        it would be written to config.json, and AutoTokenizer would refuse the names)."""
        return ["window_memory"] * self.num_hidden_layers

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived, and ours are not in transformers' list."""

    def validate_architecture(self):
        """Refuse sizes that cannot work."""
        at_least_one = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "window_length",
        )
        require_at_least(self, 1, at_least_one)
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}: it is a probability, 0 <= {name} < 1")
        positive = ("rms_norm_eps", "initial_embedding_std", "initial_temperature", "logit_scale")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}: transformers knows {', '.join(sorted(ACT2FN))}"
            )
        refuse_unknown_schedule(self.schedule)
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 2 or buckets % 2 or distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance "
                f"{distance}: the first must be even, the second greater than half of the first"
            )

    def memory_floats(self) -> int:
        """Numbers that one row (one document) carries between windows, counted as the papers do."""
        raise ValueError(f"{type(self).__name__} names no memory: use one of its subclasses")


def refuse_unknown_schedule(schedule):
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}: it is one of {', '.join(SCHEDULES)}")


def require_at_least(config, least, names):
    """Refuse fields of `config` that lie below `least`."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{name} is {value}: it must be {least} or more")
