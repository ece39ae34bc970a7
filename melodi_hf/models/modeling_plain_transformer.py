"""A Transformer that forgets: the control of every comparison of memories.

It is the sliding-window Transformer-XL, whose every token sees the W tokens before it, but what
came before a context is hidden:

    context_windows = 2   | x x x x  x x x x | x x x x  x x x x |      nothing crosses the bars
    context_windows = 1   | x x x x | x x x x | x x x x | x x x x |    nothing is carried at all

With one window per context the memory is empty, and what another system gains over it is what its
memory is worth. With as many windows as a segment of training has, it is the sliding window
without a cache from segment to segment.
"""

import torch
from transformers.utils.output_capturing import OutputRecorder

from .attention_map import AttentionMap
from .configuration_plain_transformer import PlainTransformerConfig
from .decoder import DecoderForCausalLM, DecoderModel, make_known
from .generation import MemoryGenerationMixin
from .sliding_window import SlidingWindowLayer


class PlainTransformerLayer(SlidingWindowLayer):
    """A layer that attends to the W tokens before each token, as far as its context reaches."""

    stacks = SlidingWindowLayer.stacks

    def filled_slots(self, chunk):
        since = chunk.windows_read % self.config.context_windows
        return (torch.minimum(since, chunk.windows_held("short")) > 0) * self.past


class PlainTransformerModel(DecoderModel):
    """A plain Transformer without its head."""

    config_class = PlainTransformerConfig
    _no_split_modules = ["PlainTransformerLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PlainTransformerLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        return PlainTransformerLayer(config, layer_idx)


class PlainTransformerForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """A plain Transformer as a language model."""

    config_class = PlainTransformerConfig
    model_class = PlainTransformerModel
    _no_split_modules = ["PlainTransformerLayer"]  # noqa: RUF012


make_known(PlainTransformerModel, PlainTransformerForCausalLM)
