"""Transformer-XL with a sliding window (Dai et al., 2019), as MELODI is compared with it.

Each layer keeps the keys and values of the last W tokens, and every token attends to exactly the W
tokens before it, whichever window they lie in:

    memory of window k-1   [ k v k v k v k v ]
    window k               [ x x x x x x x x ]   x_i sees memory i..W and x_0..x_{i-1}
    memory of window k     the keys and values of the last W tokens

Differs from the paper as the released baseline of MELODI does: keys and values are cached instead
of hidden states, gradients flow through all windows of a segment, and positions are T5's relative
biases. Before the first token the memory is zeros, which are attended to unless
`mask_empty_memory` is set. `mlp_bias` chooses between the two feed-forward variants in use.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import Attention, merge_heads
from .configuration_transformer_xl import TransformerXLConfig
from .decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, FeedForward
from .norm import RMSNorm
from .windows import banded_bias


class WindowMemory(NamedTuple):
    """Keys (of length one) and values of the last W tokens, oldest first."""

    keys: Tensor  # B H W K
    values: Tensor  # B H W K


class TransformerXLLayer(DecoderLayer):
    """A layer that attends to the W tokens before each token."""

    memory_type = WindowMemory

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, always_sees=True)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def memory_shapes(self, for_generation=False):
        config = self.config
        slots = config.num_attention_heads, config.window_length, config.head_dim
        return {"keys": slots, "values": slots}

    def forward(self, x, *memory, plan):
        # x: B T D
        packed = plan.pack_tokens(x)
        h = self.dropout(self.input_layernorm(packed))
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        memory, attended = WindowMemory(*memory), []
        parts = (plan.split(t, 2) for t in (q, k, v))
        for chunk, *part in zip(plan.chunks, *parts, strict=True):
            read, memory = self.read(chunk, memory, *part)
            attended.append(read)
        packed = packed + self.self_attn.o_proj(merge_heads(torch.cat(attended, dim=2)))
        packed = packed + self.dropout(self.mlp(self.post_attention_layernorm(packed)))
        return plan.unpack_tokens(packed), *memory

    def read(self, chunk, memory, q, k, v):
        """One window: q, k, v: B H T K -> what was attended to (B H T K), the next memory."""
        length = memory.keys.shape[2]
        keys = torch.cat((memory.keys.to(k.dtype), k), dim=2)
        values = torch.cat((memory.values.to(v.dtype), v), dim=2)
        bias = banded_bias(
            lambda distance: self.self_attn.bias_by_distance(distance, furthest=length),
            q.shape[2],
            keys.shape[2],
            q,
        )
        filled = chunk.tokens_read.clamp(max=length)
        attended = self.self_attn(q, keys, values, bias, length, filled, in_order=True)
        return attended, WindowMemory(
            chunk.last(memory.keys, k, dim=2), chunk.last(memory.values, v, dim=2)
        )


class TransformerXLModel(DecoderModel):
    """Transformer-XL without its head."""

    config_class = TransformerXLConfig
    _no_split_modules = ["TransformerXLLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": TransformerXLLayer}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        return TransformerXLLayer(config, layer_idx)


class TransformerXLForCausalLM(DecoderForCausalLM):
    """Transformer-XL as a language model."""

    config_class = TransformerXLConfig
    model_class = TransformerXLModel
    _no_split_modules = ["TransformerXLLayer"]  # noqa: RUF012
