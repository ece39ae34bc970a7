"""Configuration of the sliding-window Transformer-XL, a baseline of the MELODI paper."""

from .configuration_decoder import DecoderConfig, require, require_at_least, validated


@validated
class TransformerXLConfig(DecoderConfig):
    """A Transformer-XL whose layers carry keys and values of `window_length` tokens.

    `mlp_bias` selects a feed-forward network of the released code: False, that of its
    Transformer-XL; True, that of the layers around a dense memory.
    """

    model_type = "transformer_xl"

    # The memory is emptied after so many windows; None: never, 1: nothing is carried.
    context_windows: int | None = None

    @property
    def tokens_carried(self) -> int:
        """Number of tokens before a window whose keys and values a layer stores."""
        return self.window_length * (self.context_windows != 1)

    def validate_architecture(self):
        super().validate_architecture()
        if self.context_windows is not None:
            require_at_least(self, 1, ("context_windows",))
            require(
                self.mask_empty_memory,
                f"mask_empty_memory is False and context_windows {self.context_windows}: what was "
                f"forgotten cannot be seen; set mask_empty_memory=True, or context_windows=None",
            )

    def keys_attended(self, slot, filled=None) -> int:
        return self.num_hidden_layers * max(slot, self.tokens_carried)

    def pairs_attended(self, num_tokens, filled=None) -> int:
        if self.context_windows is None:
            return super().pairs_attended(num_tokens, filled)
        # A token attends to the tokens before it in its context, W at most.
        context = self.context_windows * self.window_length
        contexts, rest = divmod(num_tokens, context)
        pairs = contexts * pairs_within(context, self.window_length)
        return self.num_hidden_layers * (pairs + pairs_within(rest, self.window_length))


def pairs_within(tokens, furthest) -> int:
    """Count the pairs of tokens, one strictly before the other, at most `furthest` apart."""
    first = min(tokens, furthest)
    return first * (first - 1) // 2 + (tokens - first) * furthest
