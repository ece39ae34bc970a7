"""Sizes of a MELODI; the defaults are the paper's row S128+L64 with 12 layers."""

from .configuration_decoder import DecoderConfig, require_at_least, validated


@validated
class MelodiConfig(DecoderConfig):
    """MELODI's own sizes: `num_short_memory_tokens` 0 is "no short-term memory",
    `long_memory_layers` () is "no long-term memory"."""

    model_type = "melodi"

    mlp_bias: bool = True
    num_summary_tokens: int = 128  # U, ride with each window from layer to layer
    num_short_memory_tokens: int = 128  # S, per layer, from one window to the next
    long_memory_layers: tuple[int, ...] | list[int] = (6,)  # indices, from 0
    num_long_memory_tokens: int = 64  # L, pushed per window
    long_memory_windows: int = 128  # Q, windows that the queue holds
    # The released code counts its queue in tokens, which need not be a multiple of L:
    long_memory_capacity: int | None = None  # tokens; None: long_memory_windows * L
    mix_tokens: bool = True  # False: no summary branching (the paper's second ablation)

    @property
    def long_memory_length(self) -> int:
        """Tokens that the queue of a long-term layer holds."""
        if self.long_memory_capacity is not None:
            return self.long_memory_capacity
        return self.num_long_memory_tokens * self.long_memory_windows

    def validate_architecture(self):
        super().validate_architecture()
        counts = ("num_summary_tokens", "num_short_memory_tokens", "num_long_memory_tokens")
        require_at_least(self, 0, counts)
        require_at_least(self, 1, ("long_memory_windows",))
        self._validate_long_memory()
        summaries, short = self.num_summary_tokens, self.num_short_memory_tokens
        if not self.mix_tokens and summaries != short:
            raise ValueError(
                f"mix_tokens=False hands the summary tokens on as they are, so num_summary_tokens "
                f"({summaries}) and num_short_memory_tokens ({short}) must be equal"
            )

    def _validate_long_memory(self):
        layers = list(self.long_memory_layers)
        beyond = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"long_memory_layers {beyond} do not exist: the model has "
                f"{self.num_hidden_layers} layers, 0 to {self.num_hidden_layers - 1}; "
                f"name some of these, or () for no long-term memory"
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"long_memory_layers {layers} names a layer twice: name each once")
        if layers and self.long_memory_length < max(1, self.num_long_memory_tokens):
            raise ValueError(
                f"the queue holds {self.long_memory_length} tokens, but each window pushes "
                f"num_long_memory_tokens={self.num_long_memory_tokens}: it must hold at least one "
                f"window's, or set long_memory_layers=() for no long-term memory"
            )

    def memory_floats(self, as_tokens: bool = False) -> int:
        """Floats per row, as the paper counts: S·N·d of short-term memory and, for each long-term
        layer, keys and values of its queue (arXiv 2410.03156, tables 1 to 3).

        With `as_tokens` the queue counts as the tokens that the released code keeps between
        segments, which is what `memory=` carries in training.
        """
        short = self.num_short_memory_tokens * self.num_hidden_layers * self.hidden_size
        entry = self.hidden_size if as_tokens else 2 * self.num_attention_heads * self.head_dim
        return short + len(self.long_memory_layers) * self.long_memory_length * entry
