"""Configuration of MELODI; the defaults are the paper's row S128+L64 with 12 layers."""

from .configuration_decoder import (
    DecoderConfig,
    require,
    require_at_least,
    require_existing_layers,
    validated,
)


@validated
class MelodiConfig(DecoderConfig):
    """A MELODI (arXiv 2410.03156).

    Without short-term memory: `num_short_memory_tokens=0`; without long-term memory:
    `long_memory_layers=()`.
    """

    model_type = "melodi"

    mlp_bias: bool = True
    num_summary_tokens: int = 128  # U, appended to each window, from layer to layer
    num_short_memory_tokens: int = 128  # S, per layer, from one window to the next
    long_memory_layers: tuple[int, ...] | list[int] = (6,)  # indices, from 0
    num_long_memory_tokens: int = 64  # L, appended to the queue per window
    long_memory_windows: int = 128  # Q, windows that the queue holds
    # The released code counts the queue in tokens, not necessarily a multiple of L:
    long_memory_capacity: int | None = None  # tokens; None: long_memory_windows * L
    mix_tokens: bool = True  # False: no summary branching (the paper's second ablation)

    @property
    def long_memory_length(self) -> int:
        """Number of tokens in the queue of a long-term layer."""
        if self.long_memory_capacity is not None:
            return self.long_memory_capacity
        return self.num_long_memory_tokens * self.long_memory_windows

    def validate_architecture(self):
        super().validate_architecture()
        summaries, short = self.num_summary_tokens, self.num_short_memory_tokens
        layers, pushed = self.long_memory_layers, self.num_long_memory_tokens
        names = ("num_summary_tokens", "num_short_memory_tokens", "num_long_memory_tokens")
        require_at_least(self, 0, names)
        require_at_least(self, 1, ("long_memory_windows",))
        require_existing_layers(self, "long_memory_layers", layers)
        require(
            not layers or self.long_memory_length >= max(1, pushed),
            f"the queue holds {self.long_memory_length} tokens, but each window pushes "
            f"num_long_memory_tokens={pushed}: it must hold at least one window's, or set "
            f"long_memory_layers=() for no long-term memory",
        )
        require(
            self.mix_tokens or summaries == short,
            f"mix_tokens=False hands the summary tokens on as they are, so num_summary_tokens "
            f"({summaries}) and num_short_memory_tokens ({short}) must be equal",
        )

    def keys_attended(self, slot, filled=None) -> int:
        queue = self.long_memory_length if filled is None else filled
        window = self.num_hidden_layers * (self.num_short_memory_tokens + slot)
        return window + len(self.long_memory_layers) * queue

    def window_products(self, filled=None) -> tuple[int, int]:
        # Start: keys and values of the short-term memory. End: summary tokens in all layers, the
        # mixers, and keys and values of the tokens that enter the queue.
        length, hidden, channels = self.window_length, self.hidden_size, self.attention_size
        short, pushed = self.num_short_memory_tokens, self.num_long_memory_tokens
        rows = length + self.num_summary_tokens
        keys = self.sum_keys(length, rows, filled)
        summaries = self.num_summary_tokens * self.num_hidden_layers * self.layer_weights
        mixers = self.num_hidden_layers * (short + self.num_summary_tokens) * rows * hidden
        mixed = (self.mix_tokens and short > 0) * mixers
        push = len(self.long_memory_layers) * pushed * hidden * (rows + 2 * channels)
        start = self.num_hidden_layers * short * 2 * hidden * channels
        return start, summaries + keys * 2 * channels + mixed + push

    def cached_states(self) -> tuple[int, int]:
        tokens = self.num_short_memory_tokens + self.window_length  # memory, inputs of the window
        return self.num_hidden_layers * tokens * self.hidden_size, 0

    def memory_floats(self, as_tokens: bool = False) -> int:
        """Count the floats per row as the paper does (arXiv 2410.03156, tables 1 to 3).

        These are S·N·d of short-term memory and, for each long-term layer, keys and values of its
        queue; with `as_tokens` its tokens instead, as in the released code and in `memory=`.
        """
        short = self.num_short_memory_tokens * self.num_hidden_layers * self.hidden_size
        entry = self.hidden_size if as_tokens else 2 * self.attention_size
        return short + len(self.long_memory_layers) * self.long_memory_length * entry
