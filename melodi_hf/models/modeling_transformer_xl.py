"""Transformer-XL with a sliding window (Dai et al., 2019), as MELODI is compared with it.

Each layer keeps the keys and values of the window before, and every token attends to exactly the W
tokens before it (`sliding_window`).

Differs from the paper as the released baseline of MELODI does: keys and values are cached instead
of hidden states, gradients flow through all windows of a segment, and positions are T5's relative
biases. Before the first token the memory is zeros, which are attended to unless
`mask_empty_memory` is set. `mlp_bias` chooses between the two feed-forward variants in use.

With `context_windows` the memory is cleared after every so many windows, the control of each
comparison: with one, nothing is ever carried; with as many as a segment of training has, it is a
sliding window without a cache from segment to segment.

    context_windows = 2   | x x x x  x x x x | x x x x  x x x x |      nothing crosses the bars
    context_windows = 1   | x x x x | x x x x | x x x x | x x x x |    nothing is carried at all
"""

from .configuration_transformer_xl import TransformerXLConfig
from .decoder import DecoderForCausalLM, DecoderModel, register_auto_classes
from .sliding_window import ClearedWindowLayer, SlidingWindowLayer


class TransformerXLModel(DecoderModel):
    """Transformer-XL without its head."""

    config_class = TransformerXLConfig
    _no_split_modules = ["SlidingWindowLayer", "ClearedWindowLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        is_cleared = config.context_windows is not None
        return (ClearedWindowLayer if is_cleared else SlidingWindowLayer)(config, layer_idx)


class TransformerXLForCausalLM(DecoderForCausalLM):
    """Transformer-XL as a language model."""

    config_class = TransformerXLConfig
    model_class = TransformerXLModel


register_auto_classes(TransformerXLModel, TransformerXLForCausalLM)
