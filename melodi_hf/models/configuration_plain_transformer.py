"""Sizes of the control: a Transformer of windows that forgets."""

from .configuration_decoder import DecoderConfig, require_at_least, validated


@validated
class PlainTransformerConfig(DecoderConfig):
    """`context_windows` windows are read as one text, each token seeing the `window_length` tokens
    before it; then everything is forgotten. With one window nothing is ever carried."""

    model_type = "plain_transformer"

    context_windows: int = 1
    mask_empty_memory: bool = True  # what was forgotten cannot be seen

    @property
    def tokens_carried(self) -> int:
        """Tokens before a window whose keys and values a layer holds."""
        return 0 if self.context_windows == 1 else self.window_length

    def validate_architecture(self):
        super().validate_architecture()
        require_at_least(self, 1, ("context_windows",))
        if not self.mask_empty_memory:
            raise ValueError(
                "mask_empty_memory is False: a plain Transformer hides what it has forgotten; "
                "leave it True, or take a Transformer-XL"
            )

    def memory_floats(self) -> int:
        """Floats per row: none, or within a context keys and values of a window in every layer."""
        per_token = 2 * self.num_attention_heads * self.head_dim
        return self.num_hidden_layers * self.tokens_carried * per_token
