"""Configuration of the baseline without memory: a Transformer-XL that carries nothing."""

from .configuration_decoder import validated
from .configuration_transformer_xl import TransformerXLConfig


@validated
class PlainTransformerConfig(TransformerXLConfig):
    """A Transformer-XL that by default carries nothing from window to window."""

    model_type = "plain_transformer"

    context_windows: int = 1
    mask_empty_memory: bool = True  # dropped tokens are masked
