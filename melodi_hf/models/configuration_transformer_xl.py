"""Sizes of the sliding-window Transformer-XL that the MELODI paper compares itself with."""

from .configuration_decoder import DecoderConfig, validated


@validated
class TransformerXLConfig(DecoderConfig):
    """Every layer carries the keys and values of the `window_length` tokens before.

    `mlp_bias` chooses between the feed-forward variants of the released code: without biases as
    the Transformer-XL there, with them as the layers around a dense memory.
    """

    model_type = "transformer_xl"

    @property
    def tokens_carried(self) -> int:
        """Tokens before a window whose keys and values a layer holds."""
        return self.window_length

    def memory_floats(self) -> int:
        """Floats per row: keys and values of one window in every layer, 2·N·W·d."""
        per_token = 2 * self.num_attention_heads * self.head_dim
        return self.num_hidden_layers * self.tokens_carried * per_token
