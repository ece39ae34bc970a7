"""Configuration of a Memorizing Transformer; the defaults are the paper's, 65,536 entries."""

from .configuration_decoder import (
    DecoderConfig,
    require,
    require_at_least,
    require_one_of,
    validated,
)

CHOICES = {
    "placement": ("in_stack", "side"),
    "retrieval": ("dense", "top_k"),
    "memory_combination": ("gate", "joint"),
    "side_residual": ("double", "single"),
}


@validated
class MemorizingTransformerConfig(DecoderConfig):
    """A sliding-window Transformer-XL, one layer of which has a memory of M tokens.

    The paper: `placement="in_stack"`, `retrieval="top_k"`, `memory_combination="gate"`, each window
    enters the memory when it is full. The baseline of MELODI: "side", "dense", "joint",
    `segment_windows=8`, `side_residual="double"`, `mlp_bias=True`.
    """

    model_type = "memorizing_transformer"

    memory_length: int = 65536  # M, tokens in the memory of a row
    memory_layer: int = 8  # index, from 0; a side layer follows this one
    placement: str = "in_stack"  # one of the layers; "side": an additional one, without a window
    retrieval: str = "top_k"  # the nearest tokens; "dense": all of them
    num_retrieved: int = 32  # k, tokens for each query and head
    faiss_index: str | None = None  # factory string, such as "HNSW32"; None: exact search
    memory_combination: str = "gate"  # one per head; "joint": one softmax over both
    memory_layer_position_bias: bool = True  # of the window; a side layer has none
    segment_windows: int = 1  # windows that enter the memory together
    side_residual: str = "double"  # as released, its input is added twice; "single": once

    @property
    def tokens_carried(self) -> int:
        """Number of tokens before a window whose keys and values a layer stores."""
        return self.window_length

    @property
    def memory_slots(self) -> int:
        """Number of tokens that the memory layer stores: M, and those of an incomplete segment."""
        return self.memory_length + (self.segment_windows - 1) * self.window_length

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("memory_length", "num_retrieved", "segment_windows"))
        require_one_of(self, CHOICES)
        layers = self.num_hidden_layers
        require(
            0 <= self.memory_layer < layers,
            f"memory_layer {self.memory_layer} does not exist: the model has {layers} layers, 0 to "
            f"{layers - 1}; name one",
        )
        require(
            self.placement == "side" or self.segment_windows == 1,
            f"segment_windows is {self.segment_windows}: a memory layer in the stack sees one "
            f"window and what was remembered before it, so what lies between would be lost; "
            f'give 1, or placement="side"',
        )
        require(
            self.retrieval == "top_k" or self.faiss_index is None,
            f"faiss_index is {self.faiss_index!r} and retrieval {self.retrieval!r}: an index "
            f'finds the nearest tokens; give retrieval="top_k", or faiss_index=None',
        )

    def keys_attended(self, slot, filled=None) -> int:
        remembered = self.memory_length if filled is None else filled
        return self.num_hidden_layers * self.tokens_carried + remembered

    def body_products(self, num_tokens, filled=None) -> int:
        products = super().body_products(num_tokens, filled) - num_tokens * self._unread(filled)
        length = self.segment_windows * self.window_length
        segments, rest = divmod(num_tokens, length)
        pairs = segments * (length * (length - 1) // 2) + rest * (rest - 1) // 2
        side = num_tokens * self.layer_weights + pairs * 2 * self.attention_size
        return products + self._has_side_layer * side

    def _unread(self, filled):
        # All keys are scored, but only the values of the nearest are read.
        remembered = self.memory_length if filled is None else filled
        left_out = max(0, remembered - self.num_retrieved)
        return (self.retrieval == "top_k") * left_out * self.attention_size

    @property
    def _has_side_layer(self):
        return self.placement == "side"

    def weight_bytes(self, bytes_per_number) -> int:
        side = self._has_side_layer * self.layer_weights * bytes_per_number
        return super().weight_bytes(bytes_per_number) + side

    def cached_states(self) -> tuple[int, int]:
        # Keys and values of the side layer's open window and of an incomplete segment.
        tokens = self.memory_slots - self.memory_length + self._has_side_layer * self.window_length
        return tokens * 2 * self.attention_size, 0
