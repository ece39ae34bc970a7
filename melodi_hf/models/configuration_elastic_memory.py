"""Configuration of an Elastic Memory."""

from .configuration_decoder import (
    DecoderConfig,
    require_at_least,
    require_existing_layers,
    require_one_of,
    validated,
)

CHOICES = {"other_layers": ("block", "sliding"), "sampling": ("uniform", "exponential")}


@validated
class ElasticMemoryConfig(DecoderConfig):
    """A model of blocks of `window_length` tokens, in which some layers have a memory.

    It stores the keys and values of the whole past as `memory_order` coefficients per channel.
    Choices that our sources leave open are marked as ours.
    """

    model_type = "elastic_memory"
    free_fields = ("sampling",)  # attention to the memory, not the memory itself

    window_length: int = 2048  # tokens
    memory_layers: tuple[int, ...] | list[int] | None = None  # indices; None: every third (ours)
    memory_order: int = 540  # coefficients per channel; the paper goes up to 8640
    num_memory_samples: int = 512  # points of the past that a block attends to (ours)
    sampling: str = "uniform"  # or "exponential": the points; their formulas are ours
    other_layers: str = "block"  # attend to their block, or "sliding": to W tokens (ours)
    mask_empty_memory: bool = True  # the first block has no memory

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """Indices of the layers that have a memory."""
        if self.memory_layers is None:
            return tuple(range(2, self.num_hidden_layers, 3))
        return tuple(self.memory_layers)

    @property
    def tokens_carried(self) -> int:
        """Number of tokens before a block whose keys and values the other layers store."""
        return self.window_length if self.other_layers == "sliding" else 0

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("memory_order", "num_memory_samples"))
        require_one_of(self, CHOICES)
        require_existing_layers(self, "memory_layers", self.layers_with_memory)

    def keys_attended(self, slot, filled=None) -> int:
        samples = self.num_memory_samples if filled is None else filled
        with_memory = len(self.layers_with_memory)
        without = self.num_hidden_layers - with_memory
        return with_memory * (samples + slot) + without * max(slot, self.tokens_carried)

    def window_products(self, filled=None) -> tuple[int, int]:
        # Start: the past is reconstructed. End: the coefficients are updated. The matrices are
        # shared by all layers and documents, so computing them is not counted.
        order, with_memory = self.memory_order, len(self.layers_with_memory)
        per_coefficient = with_memory * 2 * self.attention_size * order
        end = per_coefficient * (order + self.window_length)
        return per_coefficient * self.num_memory_samples, end

    def cached_states(self) -> tuple[int, int]:
        coefficients = len(self.layers_with_memory) * self.memory_order
        return 0, coefficients * 2 * self.attention_size

    def memory_floats(self) -> int:
        """Count the floats per row: coefficients, and the windows of sliding layers."""
        with_memory = len(self.layers_with_memory)
        without = self.num_hidden_layers - with_memory
        slots = with_memory * self.memory_order + without * self.tokens_carried
        return slots * 2 * self.attention_size
