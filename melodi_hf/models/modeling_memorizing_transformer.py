"""Memorizing Transformer (Wu, Rabe, Hutchins & Szegedy, ICLR 2022, sections 3.1 and 3.2).

A sliding-window Transformer-XL, one layer of which also remembers keys and values of M tokens that
are long past. They carry no positions, and no gradient reaches them:

    memory        [ m m m m m m m m m m m m ]  <- the nearest k for each query and head, or all
    last window                 [ k v k v k v ]  <- attends
    window                                    [ x x x x x x ] - joins the memory when it closes

    A = g A_memory + (1 - g) A_window,     g = sigmoid(b), b per head        (gate)
    A = softmax over both together                                           (joint)

That is `placement="in_stack"`. What MELODI is compared with is "side" (released code, base_memory2
with mem_densekv): a layer of its own behind one of the stack, whose tokens attend to the memory and
to all tokens before them in their segment of several windows, without positions; a segment joins
the memory once it is read. As released, that layer's input is added to its output once more.

Differs from the paper: the nearest keys are found exactly, unless an index of faiss is named, and
the skeleton is that of all systems here. Differs from the released code: every row writes at a
place of its own, where its own document stands, so the order of the slots is that of the tokens
and not that of a ring; no position is attached to either. Empty slots are zeros, which are attended
to unless `mask_empty_memory` is set; what is retrieved is never an empty slot.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, merge_heads
from .attention_map import AttentionMap
from .configuration_memorizing_transformer import MemorizingTransformerConfig
from .decoder import DecoderForCausalLM, DecoderModel, FeedForward, make_known
from .faiss_search import FaissSearch
from .generation import MemoryGenerationMixin
from .norm import RMSNorm, mean_size
from .past import Past
from .retrieval import FLOOR, Found, attend_to_nearest, attend_to_places, find_nearest
from .sliding_window import SlidingWindowLayer, WindowMemory


class MemorizingMemory(NamedTuple):
    """Keys (of length one) and values: of the last window and of the w tokens of the open one; and
    of the C tokens of closed windows that are remembered, oldest first."""

    keys: Tensor  # B H W+w K
    values: Tensor  # B H W+w K
    memory_keys: Tensor  # B H C K
    memory_values: Tensor  # B H C K


class SideMemory(NamedTuple):
    """The same of a layer of the stack and the side layer behind it; the latter has an open window
    of its own, and nothing else before it than what is remembered."""

    keys: Tensor  # B H W+w K
    values: Tensor  # B H W+w K
    side_keys: Tensor  # B H w K
    side_values: Tensor  # B H w K
    memory_keys: Tensor  # B H C K
    memory_values: Tensor  # B H C K


# The ways to look at the memory: (q, sources, low, high, rows) -> Found


class AttendToNearest:
    """Each query attends to the keys that are nearest to it."""

    def __init__(self, config):
        self.count, self.find = config.num_retrieved, find_nearest
        if config.faiss_index is not None:
            self.find = FaissSearch(config.faiss_index, config.head_dim)

    def __call__(self, q, sources, low, high, rows):
        index = self.find(q.detach(), sources, low, high, self.count, rows)
        return attend_to_nearest(q, sources, index, rows)


def from_the_beginning(low, first):
    """The oldest place that is seen: none before the first of what is remembered."""
    return torch.maximum(low, first)


def empty_slots_too(low, first):
    """The oldest place that is seen, be it empty."""
    return low


# The ways to bring both together: what part of the memory's answer is taken


class Gate(nn.Module):
    """A learned number per head."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, near, far):
        return self.weight.sigmoid()[:, None, None]


class Joint(nn.Module):
    """The part that a softmax over both would give."""

    def forward(self, near, far):
        return (far.log_sum - near.log_sum).sigmoid()[..., None]


class SummedAttention(Attention):
    """Attention that tells the logarithm of its weights' sum too, in a last channel. As in the
    released code, no weight is dropped where memory and window share one softmax."""

    def forward(self, q, k, v, bias, num_slots, filled, in_order=False, kept=None):
        bias = self.with_empty(bias, num_slots, filled)
        scores = (q @ k.transpose(-1, -2)).float() + bias
        log_sum = torch.cat((scores, torch.full_like(scores[..., :1], FLOOR)), -1).logsumexp(-1)
        weights = (scores - log_sum[..., None]).exp()
        if kept is not None:
            kept.append(weights)
        attended = weights.to(v.dtype) @ v
        return torch.cat((attended.float(), log_sum[..., None]), dim=-1)


class NoPosition(nn.Module):
    """A bias of zero for every distance."""

    def forward(self, distance):
        return torch.zeros(1, *[1] * distance.dim(), device=distance.device)


class MemoryReader(nn.Module):
    """How a layer looks at what it remembers, and what it remembers next."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dense, gated = config.retrieval == "dense", config.memory_combination == "gate"
        self.attend_far = attend_to_places if dense else AttendToNearest(config)
        hides = config.mask_empty_memory or not dense
        self.oldest = from_the_beginning if hides else empty_slots_too
        self.combination = Gate(config) if gated else Joint()

    def memory_shapes(self):
        config = self.config
        slots = (config.num_attention_heads, config.memory_slots, config.head_dim)
        return {"memory_keys": slots, "memory_values": slots}

    def past(self, plan, memory, opened, k, v):
        """What a call can look back to. opened: keys and values of the open window; k, v: of the
        call's packed tokens."""
        read = plan.line_up(k, 2), plan.line_up(v, 2)
        remembered = memory.memory_keys, memory.memory_values
        return Past(remembered, opened, read, plan, self.config.window_length)

    def forward(self, chunk, q, near, past):
        """What a chunk found altogether (R H T K), and the part of it that is the memory's.

        q: R H T K; near: what it found nearby.
        """
        low, segment = self.reach(chunk)
        far = self.attend_far(q, past.far(chunk), low[:, None], segment[:, None], chunk.rows)
        share = self.combination(near, far)
        found = near.values.to(q.dtype)
        return found + share.to(q.dtype) * (far.values - found), share

    def reach(self, chunk):
        """Places (R,): of the oldest token that is remembered, and where the chunk's segment
        begins. What was forgotten is before both."""
        window = self.window_start(chunk)
        forgotten = window - chunk.windows_held("long") * self.config.window_length
        length = self.config.segment_windows * self.config.window_length
        segment = torch.maximum(window - window % length, forgotten)
        return self.oldest(segment - self.config.memory_length, forgotten), segment

    def window_start(self, chunk):
        """The place of the first token of the chunk's window (R,)."""
        return chunk.windows_read * self.config.window_length

    def remembered(self, plan, past, memory):
        """Keys and values of closed windows after the call; the same tensors if none closed."""
        if not any(chunk.closes for chunk in plan.chunks):
            return memory.memory_keys, memory.memory_values
        after = plan.progress.tokens_read
        return past.closed(after - after % self.config.window_length)

    def figures(self, memory, windows_read):
        """queue_fill: the part of the remembered slots that hold a token;
        queue_rms: the size of the remembered values' numbers;
        gate_openness: the share of attention's output that comes from the memory, if a gate says.
        """
        slots = memory.memory_keys.shape[2]
        filled = (windows_read * self.config.window_length).clamp(max=slots)  # B
        fill = (filled / slots)[:, None, None]
        values = memory.memory_values.flatten(1, 2).float() * fill.clamp(min=1 / slots).rsqrt()
        told = {"queue_fill": fill.mean(), "queue_rms": mean_size(values)}
        if isinstance(self.combination, Gate):
            told["gate_openness"] = self.combination.weight.sigmoid().mean()
        return told


class MemorizingLayer(SlidingWindowLayer):
    """A layer of the stack that also remembers."""

    memory_type = MemorizingMemory
    kinds = {  # noqa: RUF012
        "short": ("keys", "values"),
        "long": ("memory_keys", "memory_values"),
    }

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.memory_reader = MemoryReader(config)
        self.found = found_alone
        if config.memory_combination == "joint":
            self.self_attn = SummedAttention(config, always_sees=True)
            self.found = found_with_sum
        if not config.memory_layer_position_bias:
            self.self_attn.position = NoPosition()

    def memory_shapes(self, for_generation=False):
        return super().memory_shapes(for_generation) | self.memory_reader.memory_shapes()

    def slots_per_window(self):
        return super().slots_per_window() | {"long": self.config.window_length}

    def look_back(self, plan, memory, q, k, v):
        opened = memory.keys[:, :, self.past :], memory.values[:, :, self.past :]
        past = self.memory_reader.past(plan, memory, opened, k, v)
        window = WindowMemory(memory.keys, memory.values)
        near, window = super().look_back(plan, window, q, k, v)
        chunks = zip(plan.chunks, plan.split(q, 2), near, strict=True)
        attended = [self.look_far(chunk, piece, found, past) for chunk, piece, found in chunks]
        remembered = self.memory_reader.remembered(plan, past, memory)
        return attended, MemorizingMemory(*window, *remembered)

    def look_far(self, chunk, q, near, past):
        """What a chunk found in its window and in the memory, R H T K."""
        if chunk.snapshots is not None and chunk.closes:
            # What was kept of the full window lacks what was remembered by then.
            full, start = chunk.snapshots.pop(), self.memory_reader.window_start(chunk)
            chunk.remember(MemorizingMemory(*full, *past.closed(start, chunk.rows)))
        if chunk.tokens == 0:
            return q
        attended, share = self.memory_reader(chunk, q, self.found(near), past)
        if chunk.weights is not None:
            chunk.weights.append(chunk.weights.pop() * (1 - share))
        return attended

    def figures(self, memory, windows_read):
        """Those of the window and those of `MemoryReader`."""
        told = self.memory_reader.figures(memory, windows_read)
        return super().figures(memory, windows_read) | told


def found_alone(attended):
    """What attention to the window returned; a gate does not ask for its weights' sum."""
    return Found(attended, attended[..., 0])


def found_with_sum(attended):
    """What `SummedAttention` returned."""
    return Found(attended[..., :-1], attended[..., -1])


class SideLayer(nn.Module):
    """A layer beside the stack: it attends to its segment and to what it remembers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, always_sees=True)
        self.self_attn.position = NoPosition()
        self.memory_reader = MemoryReader(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.leave = add_input if config.side_residual == "double" else leave_input

    def forward(self, x, memory, plan):
        # x: B T D; memory: `SideMemory`, of which this layer's fields are replaced
        given = plan.pack_tokens(x)
        h = self.dropout(self.input_layernorm(given))
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        opened = memory.side_keys, memory.side_values
        past = self.memory_reader.past(plan, memory, opened, k, v)
        chunks = zip(plan.chunks, plan.split(q, 2), strict=True)
        attended = [self.look_back(chunk, piece, past) for chunk, piece in chunks]
        packed = given + self.self_attn.o_proj(merge_heads(plan.join(attended, 2)))
        packed = packed + self.dropout(self.mlp(self.post_attention_layernorm(packed)))
        self.remember(plan, past)
        return plan.unpack_tokens(self.leave(packed, given)), self.next(plan, past, memory)

    def look_back(self, chunk, q, past):
        """What a chunk found in its segment and in the memory, R H T K."""
        if chunk.tokens == 0:
            return q
        place = chunk.tokens_read[:, None] + torch.arange(chunk.tokens, device=q.device)
        _, segment = self.memory_reader.reach(chunk)
        sources = past.near(chunk, self.config.segment_windows - 1)
        near = attend_to_places(q, sources, segment[:, None], place, chunk.rows)
        attended, _ = self.memory_reader(chunk, q, near, past)
        return attended

    def next(self, plan, past, memory):
        """The memory after the call."""
        length, after = self.config.window_length, plan.progress
        count = length if after.fill is None else after.fill
        keys, values = past.window(after.tokens_read - after.tokens_read % length, count)
        remembered = self.memory_reader.remembered(plan, past, memory)
        return SideMemory(memory.keys, memory.values, keys, values, *remembered)

    def remember(self, plan, past):
        """Complete what the layer before it kept of full windows."""
        for chunk in plan.chunks:
            if chunk.snapshots is not None and chunk.closes:
                start, rows = self.memory_reader.window_start(chunk), chunk.rows
                window = past.window(start, self.config.window_length, rows)
                full = chunk.snapshots.pop()
                chunk.remember(SideMemory(*full, *window, *past.closed(start, rows)))


class LayerBeforeSide(SlidingWindowLayer):
    """A layer of the stack and the side layer behind it: to a cache they are one."""

    memory_type = SideMemory
    window_axis = dict.fromkeys(("keys", "values", "side_keys", "side_values"), 2)
    kinds = MemorizingLayer.kinds

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.side = SideLayer(config)

    def memory_shapes(self, for_generation=False):
        config = self.config
        slots = config.window_length if for_generation else 0
        shape = (config.num_attention_heads, slots, config.head_dim)
        window = super().memory_shapes(for_generation)
        opened = dict.fromkeys(("side_keys", "side_values"), shape)
        return window | opened | self.side.memory_reader.memory_shapes()

    def slots_per_window(self):
        return super().slots_per_window() | {"long": self.config.window_length}

    def forward(self, x, *memory, plan):
        x, *memory = super().forward(x, *memory, plan=plan)
        x, memory = self.side(x, SideMemory(*memory), plan)
        return x, *(held.contiguous() for held in memory)

    def look_back(self, plan, memory, q, k, v):
        window = WindowMemory(memory.keys, memory.values)
        attended, window = super().look_back(plan, window, q, k, v)
        return attended, SideMemory(*window, *memory[2:])

    def figures(self, memory, windows_read):
        """Those of the window and those of `MemoryReader`."""
        told = self.side.memory_reader.figures(memory, windows_read)
        return super().figures(memory, windows_read) | told


def add_input(y, x):
    """As released: what the side layer makes of its input, residual and all, is added to it."""
    return y + x


def leave_input(y, x):
    """As any layer."""
    return y


class MemorizingTransformerModel(DecoderModel):
    """A Memorizing Transformer without its head."""

    config_class = MemorizingTransformerConfig
    _no_split_modules = ["SlidingWindowLayer", "MemorizingLayer", "LayerBeforeSide"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SlidingWindowLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        if layer_idx != config.memory_layer:
            return SlidingWindowLayer(config, layer_idx)
        in_stack = config.placement == "in_stack"
        return (MemorizingLayer if in_stack else LayerBeforeSide)(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_memorizing(module)


class MemorizingTransformerForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """A Memorizing Transformer as a language model."""

    config_class = MemorizingTransformerConfig
    model_class = MemorizingTransformerModel
    _no_split_modules = ["SlidingWindowLayer", "MemorizingLayer", "LayerBeforeSide"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_memorizing(module)


def init_memorizing(module):
    """Gates are half open."""
    if isinstance(module, Gate):
        init.zeros_(module.weight)


make_known(MemorizingTransformerModel, MemorizingTransformerForCausalLM)
