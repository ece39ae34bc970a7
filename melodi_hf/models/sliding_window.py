"""A layer whose every token attends to the W tokens before it, whichever window they lie in.

    memory of window k-1   [ k v k v k v k v ]
    window k               [ x x x x x x x x ]   x_i sees memory i..W and x_0..x_{i-1}
    memory of window k     the keys and values of its own tokens

Before the first token the memory is zeros, which are attended to unless `mask_empty_memory` is
set. The configuration says how many tokens before a window are held (`tokens_carried`).
"""

from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from .attention import Attention, merge_heads
from .attention_map import AttentionMap
from .decoder import DecoderLayer, FeedForward
from .norm import RMSNorm, mean_size


class WindowMemory(NamedTuple):
    """Keys (of length one) and values of the last window, and of the w tokens of the open one."""

    keys: Tensor  # B H W+w K
    values: Tensor  # B H W+w K


class SlidingWindowLayer(DecoderLayer):
    """A layer that attends to the W tokens before each token."""

    memory_type: ClassVar[type] = WindowMemory
    window_axis = {"keys": 2, "values": 2}  # noqa: RUF012
    changed_by_closing: ClassVar[tuple[str, ...]] = ("keys", "values")
    kinds = {"short": ("keys", "values")}  # noqa: RUF012
    stacks: ClassVar[tuple[type, ...]] = (FeedForward,)

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.past = config, config.tokens_carried
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, always_sees=self.past > 0)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.attention_map = AttentionMap(self.past, self.past)

    def memory_shapes(self, for_generation=False):
        config = self.config
        slots = self.past + (config.window_length if for_generation else 0)
        return dict.fromkeys(
            ("keys", "values"), (config.num_attention_heads, slots, config.head_dim)
        )

    def slots_per_window(self):
        return {"short": self.past}

    def forward(self, x, *memory, plan):
        # x: B T D
        packed = plan.pack_tokens(x)
        h = self.dropout(self.input_layernorm(packed))
        attended, memory = self.look_back(plan, self.memory_type(*memory), *self.project(h))
        packed = packed + self.self_attn.o_proj(merge_heads(plan.join(attended, 2)))
        packed = packed + self.dropout(self.mlp(self.post_attention_layernorm(packed)))
        # Not parts of longer tensors, which FSDP warns of.
        return plan.unpack_tokens(packed), *(held.contiguous() for held in memory)

    def project(self, h):
        """B T D, normalised -> queries, keys and values of its tokens."""
        return self.self_attn.queries(h), *self.self_attn.keys_values(h)

    def look_back(self, plan, memory, *projected):
        """What each chunk attended to, and the next memory, from `project`'s of packed tokens."""
        return self.read_chunks(plan, memory, *(plan.split(t, 2) for t in projected))

    def figures(self, memory, windows_read):
        """memory_rms: the size of the remembered values' numbers; keys have length one."""
        return {"memory_rms": mean_size(memory.values)} if self.past else {}

    def position_bias(self, chunk):
        """H T J or B H T J, for the chunk's queries towards [last window | window]."""
        furthest = self.config.window_length
        return chunk.bias(partial(self.self_attn.bias_by_distance, furthest=furthest), self.past, 0)

    def filled_slots(self, chunk):
        """How many slots of the last window each row may see (R,)."""
        return (chunk.windows_held("short") > 0) * self.past

    def read(self, chunk, bias, memory, q, k, v):
        """One cell: q, k, v: B H T K -> what was attended to (B H T K), the next memory."""
        past = self.past
        keys, values = chunk.so_far((memory.keys, memory.values), 2, past)
        keys, values = chunk.extend(keys, k, dim=2), chunk.extend(values, v, dim=2)
        filled = self.filled_slots(chunk)
        attended = self.self_attn(
            q, keys, values, bias, past, filled, chunk.in_order, chunk.weights
        )
        memory = memory._replace(keys=keys, values=values)
        return attended, self.close(memory, chunk) if chunk.closes else memory

    def close(self, memory, chunk):
        """The window is full: it becomes the last one."""
        chunk.remember(memory)
        length, held = self.config.window_length, (memory.keys, memory.values)
        keys, values = (chunk.where_closed(t.narrow(2, length, self.past), t) for t in held)
        return memory._replace(keys=keys, values=values)
