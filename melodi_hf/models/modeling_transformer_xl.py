"""Transformer-XL with a sliding window (Dai et al., 2019), as MELODI is compared with it.

Each layer keeps the keys and values of the window before, and every token attends to exactly the W
tokens before it (`sliding_window`).

Differs from the paper as the released baseline of MELODI does: keys and values are cached instead
of hidden states, gradients flow through all windows of a segment, and positions are T5's relative
biases. Before the first token the memory is zeros, which are attended to unless
`mask_empty_memory` is set. `mlp_bias` chooses between the two feed-forward variants in use.
"""

from transformers.utils.output_capturing import OutputRecorder

from .attention_map import AttentionMap
from .configuration_transformer_xl import TransformerXLConfig
from .decoder import DecoderForCausalLM, DecoderModel, make_known
from .generation import MemoryGenerationMixin
from .sliding_window import SlidingWindowLayer


class TransformerXLModel(DecoderModel):
    """Transformer-XL without its head."""

    config_class = TransformerXLConfig
    _no_split_modules = ["SlidingWindowLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SlidingWindowLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        return SlidingWindowLayer(config, layer_idx)


class TransformerXLForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """Transformer-XL as a language model."""

    config_class = TransformerXLConfig
    model_class = TransformerXLModel
    _no_split_modules = ["SlidingWindowLayer"]  # noqa: RUF012


make_known(TransformerXLModel, TransformerXLForCausalLM)
