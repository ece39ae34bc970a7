"""Transformer-XL with a sliding window (Dai et al., 2019), as MELODI is compared with it.

Each layer keeps the keys and values of the window before, and every token attends to exactly the W
tokens before it, whichever window they lie in:

    memory of window k-1   [ k v k v k v k v ]
    window k               [ x x x x x x x x ]   x_i sees memory i..W and x_0..x_{i-1}
    memory of window k     the keys and values of its own tokens

Differs from the paper as the released baseline of MELODI does: keys and values are cached instead
of hidden states, gradients flow through all windows of a segment, and positions are T5's relative
biases. Before the first token the memory is zeros, which are attended to unless
`mask_empty_memory` is set. `mlp_bias` chooses between the two feed-forward variants in use.
"""

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, merge_heads
from .attention_map import AttentionMap
from .configuration_transformer_xl import TransformerXLConfig
from .decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, FeedForward, make_known
from .generation import MemoryGenerationMixin
from .norm import RMSNorm, mean_size


class WindowMemory(NamedTuple):
    """Keys (of length one) and values of the last window, and of the w tokens of the open one."""

    keys: Tensor  # B H W+w K
    values: Tensor  # B H W+w K


class TransformerXLLayer(DecoderLayer):
    """A layer that attends to the W tokens before each token."""

    memory_type = WindowMemory
    window_axis = {"keys": 2, "values": 2}  # noqa: RUF012
    changed_by_closing = ("keys", "values")
    kinds = {"short": ("keys", "values")}  # noqa: RUF012

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, always_sees=True)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_map = AttentionMap(config.window_length, config.window_length)

    def memory_shapes(self, for_generation=False):
        config = self.config
        slots = config.window_length * (2 if for_generation else 1)
        return dict.fromkeys(
            ("keys", "values"), (config.num_attention_heads, slots, config.head_dim)
        )

    def slots_per_window(self):
        return {"short": self.config.window_length}

    def forward(self, x, *memory, plan):
        # x: B T D
        packed = plan.pack_tokens(x)
        h = self.dropout(self.input_layernorm(packed))
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        parts = (plan.split(t, 2) for t in (q, k, v))
        attended, memory = self.read_chunks(plan, WindowMemory(*memory), *parts)
        packed = packed + self.self_attn.o_proj(merge_heads(plan.join(attended, 2)))
        packed = packed + self.dropout(self.mlp(self.post_attention_layernorm(packed)))
        # Not parts of longer tensors, which FSDP warns of.
        return plan.unpack_tokens(packed), *(held.contiguous() for held in memory)

    def figures(self, memory, windows_read):
        """memory_rms: the size of the remembered values' numbers; keys have length one."""
        return {"memory_rms": mean_size(memory.values)}

    def position_bias(self, chunk):
        """H T J or B H T J, for the chunk's queries towards [last window | window]."""
        length = self.config.window_length
        return chunk.bias(partial(self.self_attn.bias_by_distance, furthest=length), length, 0)

    def read(self, chunk, bias, memory, q, k, v):
        """One cell: q, k, v: B H T K -> what was attended to (B H T K), the next memory."""
        length = self.config.window_length
        keys, values = chunk.begin(
            memory, lambda: tuple(t[:, :, :length] for t in memory), 2, length
        )
        keys, values = chunk.extend(keys, k, dim=2), chunk.extend(values, v, dim=2)
        filled = (chunk.windows_held("short") > 0) * length
        attended = self.self_attn(
            q, keys, values, bias, length, filled, chunk.in_order, chunk.weights
        )
        memory = WindowMemory(keys, values)
        return attended, self.close(memory, chunk) if chunk.closes else memory

    def close(self, memory, chunk):
        """The window is full: it becomes the last one."""
        chunk.remember(memory)
        length = self.config.window_length
        return WindowMemory(
            *(chunk.where_closed(held.narrow(2, length, length), held) for held in memory)
        )


class TransformerXLModel(DecoderModel):
    """Transformer-XL without its head."""

    config_class = TransformerXLConfig
    _no_split_modules = ["TransformerXLLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TransformerXLLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        return TransformerXLLayer(config, layer_idx)


class TransformerXLForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """Transformer-XL as a language model."""

    config_class = TransformerXLConfig
    model_class = TransformerXLModel
    _no_split_modules = ["TransformerXLLayer"]  # noqa: RUF012


make_known(TransformerXLModel, TransformerXLForCausalLM)
