"""A Transformer that forgets: a Transformer-XL whose memory is cleared (`context_windows`).

The name of earlier versions, whose checkpoints load.
"""

from .configuration_plain_transformer import PlainTransformerConfig
from .decoder import register_auto_classes
from .modeling_transformer_xl import TransformerXLForCausalLM, TransformerXLModel


class PlainTransformerModel(TransformerXLModel):
    """A Transformer that forgets, without its head."""

    config_class = PlainTransformerConfig  # type: ignore[assignment]


class PlainTransformerForCausalLM(TransformerXLForCausalLM):
    """A Transformer that forgets, as a language model."""

    config_class = PlainTransformerConfig  # type: ignore[assignment]
    model_class = PlainTransformerModel


register_auto_classes(PlainTransformerModel, PlainTransformerForCausalLM)
