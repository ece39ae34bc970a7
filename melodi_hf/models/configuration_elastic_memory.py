"""Sizes of an Elastic Memory."""

from .configuration_decoder import DecoderConfig, require_at_least, validated

OTHER_LAYERS = ("block", "sliding")
SAMPLINGS = ("uniform", "exponential")


@validated
class ElasticMemoryConfig(DecoderConfig):
    """Blocks of `window_length` tokens; the layers with a memory hold the keys and values of the
    whole past as `memory_order` coefficients per channel. What the paper's text is not known to
    say is marked as ours."""

    model_type = "elastic_memory"
    free_fields = ("sampling",)  # how a memory is looked at, which leaves it as it is

    window_length: int = 2048  # tokens
    memory_layers: tuple[int, ...] | list[int] | None = None  # indices; None: every third (ours)
    memory_order: int = 540  # coefficients per channel; the paper goes up to 8640
    num_memory_samples: int = 512  # points of the past that a block attends to (ours)
    sampling: str = "uniform"  # or "exponential", where they lie; their formulas are ours
    other_layers: str = "block"  # what they see: their block, or "sliding", W tokens back (ours)
    mask_empty_memory: bool = True  # the first block sees no memory

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """Indices of the layers that have a memory."""
        if self.memory_layers is None:
            return tuple(range(2, self.num_hidden_layers, 3))
        return tuple(self.memory_layers)

    @property
    def tokens_carried(self) -> int:
        """Tokens before a block whose keys and values the other layers hold."""
        return self.window_length if self.other_layers == "sliding" else 0

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("memory_order", "num_memory_samples"))
        for name, allowed in (("other_layers", OTHER_LAYERS), ("sampling", SAMPLINGS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r}: it must be {' or '.join(map(repr, allowed))}"
                )
        layers = self.layers_with_memory
        beyond = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"memory_layers {beyond} do not exist: the model has {self.num_hidden_layers} "
                f"layers, 0 to {self.num_hidden_layers - 1}; name some of these, or () for no "
                f"memory"
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"memory_layers {list(layers)} names a layer twice: name each once")

    def memory_floats(self) -> int:
        """Floats per row: the coefficients of keys and values in each layer that has a memory, and
        what sliding layers carry."""
        per_token = 2 * self.num_attention_heads * self.head_dim
        with_memory = len(self.layers_with_memory)
        without = self.num_hidden_layers - with_memory
        return per_token * (with_memory * self.memory_order + without * self.tokens_carried)
