"""Sizes of a Memorizing Transformer; the defaults are those of its paper, with 65,536 entries."""

from .configuration_decoder import DecoderConfig, require_at_least, validated

CHOICES = {
    "placement": ("in_stack", "side"),
    "retrieval": ("dense", "top_k"),
    "memory_combination": ("gate", "joint"),
    "side_residual": ("double", "single"),
}


@validated
class MemorizingTransformerConfig(DecoderConfig):
    """A sliding-window Transformer-XL, one layer of which remembers `memory_length` tokens.

    The paper's: `placement="in_stack"`, `retrieval="top_k"`, `memory_combination="gate"`, a window
    written when it closes. The one that MELODI is compared with: "side", "dense", "joint",
    segments of 8 windows, `side_residual="double"`, `mlp_bias=True`.
    """

    model_type = "memorizing_transformer"

    memory_length: int = 65536  # M, tokens remembered per row
    memory_layer: int = 8  # index, from 0; a side layer stands behind this one
    placement: str = "in_stack"  # one of the layers; "side": a layer of its own, without a window
    retrieval: str = "top_k"  # the nearest tokens; "dense": all of them
    num_retrieved: int = 32  # k, tokens for each query and head
    faiss_index: str | None = None  # an index of faiss, such as "HNSW32"; None: exact search
    memory_combination: str = "gate"  # one per head; "joint": one softmax over both
    memory_layer_position_bias: bool = True  # of the window in the memory layer; none in a side one
    segment_windows: int = 1  # windows of which each is remembered once all of them are read
    side_residual: str = "double"  # as released, the layer's input is added once more; "single"

    @property
    def tokens_carried(self) -> int:
        """Tokens before a window whose keys and values a layer holds."""
        return self.window_length

    @property
    def memory_slots(self) -> int:
        """Tokens that the memory layer keeps: M, and those of an unfinished segment."""
        return self.memory_length + (self.segment_windows - 1) * self.window_length

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("memory_length", "num_retrieved", "segment_windows"))
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}: it is {' or '.join(map(repr, allowed))}")
        if not 0 <= self.memory_layer < self.num_hidden_layers:
            raise ValueError(
                f"memory_layer {self.memory_layer} does not exist: the model has "
                f"{self.num_hidden_layers} layers, 0 to {self.num_hidden_layers - 1}; name one"
            )
        if self.placement == "in_stack" and self.segment_windows > 1:
            raise ValueError(
                f"segment_windows is {self.segment_windows}: a memory layer in the stack sees one "
                f"window and what was remembered before it, so what lies between would be lost; "
                f'give 1, or placement="side"'
            )
        if self.faiss_index is not None and self.retrieval != "top_k":
            raise ValueError(
                f"faiss_index is {self.faiss_index!r} and retrieval {self.retrieval!r}: an index "
                f'finds the nearest tokens; give retrieval="top_k", or faiss_index=None'
            )

    def memory_floats(self) -> int:
        """Floats per row: keys and values of M tokens, and of one window in every layer but a side
        layer, 2·M·d + 2·N·W·d."""
        tokens = self.memory_length + self.num_hidden_layers * self.tokens_carried
        return 2 * tokens * self.num_attention_heads * self.head_dim
