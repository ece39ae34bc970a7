"""Memorizing Transformer (Wu, Rabe, Hutchins & Szegedy, ICLR 2022, sections 3.1 and 3.2).

A sliding-window Transformer-XL, one layer of which also has a memory: the keys and values of the
last M tokens before the window, without positions and without gradient:

    memory        [ m m m m m m m m m m m m ]  <- the nearest k for each query and head, or all
    last window                 [ k v k v k v ]  <- attends
    window                                    [ x x x x x x ] - enters the memory when it is full

    A = g A_memory + (1 - g) A_window,     g = sigmoid(b), b per head        (gate)
    A = softmax over both together                                           (joint)

That is `placement="in_stack"`. The MELODI paper compares with "side" (released code, base_memory2
with mem_densekv): an additional layer after one of the stack, whose tokens attend to the memory and
to all tokens before them in their segment of several windows, without positions; a segment enters
the memory when it is complete. As released, the input of that layer is added to its output twice.

Differs from the paper: the nearest keys are found exactly, unless `faiss_index` is set, and the
skeleton is that of all systems here. Differs from the released code: each row has its own number of
tokens, so slots are in the order of the tokens and not in that of a ring buffer; neither has
positions. Empty slots are zeros, which are attended to unless `mask_empty_memory` is set; with
`retrieval="top_k"` no empty slot is retrieved.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .configuration_memorizing_transformer import MemorizingTransformerConfig
from .decoder import DecoderForCausalLM, DecoderModel, register_auto_classes
from .faiss_search import FaissSearch
from .kernels import is_traced
from .layer import Field, MemoryLayer
from .modules import Attention, mean_rms
from .retrieval import (
    NULL_KEY_SCORE,
    AttentionOutput,
    Source,
    attend_to_nearest,
    attend_to_range,
    find_nearest,
)
from .sliding_window import SlidingWindowLayer


class MemorizingMemory(NamedTuple):
    """Keys (of length one) and values of the last and the open window, and of the memory.

    The memory has C tokens of complete windows, oldest first; within a call its fields may be
    tuples of parts, one for each window that entered it.
    """

    keys: Any  # B H W+w K
    values: Any  # B H W+w K
    memory_keys: Any  # B H C K
    memory_values: Any  # B H C K


class SideMemory(NamedTuple):
    """Keys and values of a layer of the stack and of the side layer after it.

    The side layer has those of the open window and of the memory.
    """

    keys: Any  # B H W+w K
    values: Any  # B H W+w K
    side_keys: Any  # B H w K
    side_values: Any  # B H w K
    memory_keys: Any  # B H C K
    memory_values: Any  # B H C K


# Attention to the memory: (q, sources, low, high) -> AttentionOutput


class AttendToNearest:
    """Attend to the `num_retrieved` keys with the greatest scores for each query."""

    def __init__(self, config):
        self.count, self.find = config.num_retrieved, find_nearest
        if config.faiss_index is not None:
            self.find = FaissSearch(config.faiss_index, config.head_dim)

    def __call__(self, q, sources, low, high):
        index = self.find(q.detach(), sources, low, high, self.count)
        return attend_to_nearest(q, sources, index)


# Combination with the window: the weight of the output of the memory


class Gate(nn.Module):
    """A learned weight per head."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, near, far):
        return self.weight.sigmoid()[:, None, None]


class Joint(nn.Module):
    """The weight that one softmax over both gives."""

    def forward(self, near, far):
        return (far.log_sum - near.log_sum).sigmoid()[..., None]


class SummedAttention(Attention):
    """Attention that also returns the log-sum-exp of its scores.

    As in the released code it has no dropout.
    """

    def forward(self, q, k, v, filled, window):
        bias = self.mask_empty(window.bias, self.num_slots, filled)
        scores = (q @ k.transpose(-1, -2)).float() + bias
        null = torch.full_like(scores[..., :1], NULL_KEY_SCORE)
        log_sum = torch.cat((scores, null), -1).logsumexp(-1)
        weights = (scores - log_sum[..., None]).exp()
        return AttentionOutput(weights.to(v.dtype) @ v, log_sum), weights


class NoPosition(nn.Module):
    """A position bias of zero."""

    def forward(self, distance):
        return torch.zeros(1, *[1] * distance.dim(), device=distance.device)


class MemoryReader(nn.Module):
    """The memory of a layer, and attention to it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        is_dense = config.retrieval == "dense"
        self.attend = attend_to_range if is_dense else AttendToNearest(config)
        self.hides_empty = config.mask_empty_memory or not is_dense
        self.combination = Gate(config) if config.memory_combination == "gate" else Joint()

    def forward(self, q, near, memory, window):
        """Attend to the memory, and combine the result with that of the window.

        Args:
            q: R H T K.
            near: `AttentionOutput` of the window.

        Returns:
            R H T K, and the weight of the memory in it.
        """
        low, segment = self.reach(window)
        sources = [
            Source(source.keys.detach(), source.values.detach(), source.start)
            if is_traced() or source.keys.requires_grad  # tangents of forward mode, too
            else source
            for source in self.sources(memory, window, self.config.memory_slots)
        ]
        far = self.attend(q, sources, low[:, None], segment[:, None])
        share = self.combination(near, far)
        found = near.values.to(q.dtype)
        return found + share.to(q.dtype) * (far.values - found), share

    def reach(self, window):
        """Find the positions (R,) of the oldest token of the memory and of the segment's first one.

        Dropped tokens are before both.
        """
        start = window.windows_read * window.length
        first = start - window.windows_in_memory("long") * window.length
        segment = torch.maximum(
            start - start % (self.config.segment_windows * window.length), first
        )
        low = segment - self.config.memory_length
        return torch.maximum(low, first) if self.hides_empty else low, segment

    def sources(self, memory, window, slots):
        """List the newest `slots` tokens of the memory, part by part."""
        keys, values = memory.memory_keys, memory.memory_values
        parts = [(keys, values)] if torch.is_tensor(keys) else list(zip(keys, values, strict=True))
        skipped = sum(k.shape[2] for k, _ in parts) - slots
        start, sources = window.windows_read * window.length - slots, []
        for k, v in parts:
            first = min(max(skipped, 0), k.shape[2])
            skipped -= k.shape[2]
            if first:  # else the same tensors, for which an index may be cached
                k, v = k[:, :, first:], v[:, :, first:]
            sources.append(Source(k, v, start))
            start = start + k.shape[2]
        return sources

    def append(self, memory, keys, values):
        """Append the tokens of a full window to the memory, as a separate part."""
        new_tokens = {"memory_keys": keys, "memory_values": values}
        parts = {
            name: (*((old,) if torch.is_tensor(old := getattr(memory, name)) else old), new)
            for name, new in new_tokens.items()
        }
        return memory._replace(**parts)

    def metrics(self, memory, windows_read):
        """Compute:

        queue_fill: the fraction of the slots that are filled;
        queue_rms: root mean square of the values of the memory;
        gate_openness: the weight of the memory in the output of attention, if there is a gate.
        """
        slots = memory.memory_keys.shape[2]
        filled = (windows_read * self.config.window_length).clamp(max=slots)  # B
        filled_share = (filled / slots)[:, None, None]
        values = (
            memory.memory_values.flatten(1, 2).float() * filled_share.clamp(min=1 / slots).rsqrt()
        )
        metrics = {"queue_fill": filled_share.mean(), "queue_rms": mean_rms(values)}
        if isinstance(self.combination, Gate):
            metrics["gate_openness"] = self.combination.weight.sigmoid().mean()
        return metrics


class MemorizingLayer(SlidingWindowLayer):
    """A layer of the stack with a memory."""

    def __init__(self, config, layer_idx):
        is_joint = config.memory_combination == "joint"
        super().__init__(config, layer_idx, SummedAttention if is_joint else Attention)
        self.memory_reader = MemoryReader(config)
        self.is_joint = is_joint
        if not config.memory_layer_position_bias:
            self.self_attn.position = NoPosition()

    def memory_fields(self):
        return MemorizingMemory(*super().memory_fields(), *memory_field(self.config))

    def attend(self, h, memory, window):
        q = self.self_attn.queries(h)
        filled = self.filled_slots(window)
        near, weights = self.self_attn(q, memory.keys, memory.values, filled, window)
        if not self.is_joint:  # a gate does not use the log-sum-exp
            near = AttentionOutput(near, near[..., 0])
        attended, share = self.memory_reader(q, near, memory, window)
        return attended, weights * (1 - share) if window.return_weights else None

    def close(self, memory, summaries, window):
        length = self.config.window_length
        tokens = (t[:, :, -length:] for t in (memory.keys, memory.values))
        return super().close(self.memory_reader.append(memory, *tokens), summaries, window)

    def metrics(self, memory, windows_read):
        """Compute the metrics of the window and those of `MemoryReader`."""
        metrics = self.memory_reader.metrics(memory, windows_read)
        return super().metrics(memory, windows_read) | metrics


class SideLayer(MemoryLayer):
    """A layer after one of the stack that attends to its segment and to the memory."""

    def __init__(self, config):
        attention = Attention(config)
        attention.position = NoPosition()
        super().__init__(config, attention)
        self.memory_reader = MemoryReader(config)

    def memory_fields(self):
        config = self.config
        shape = config.num_attention_heads, config.window_length, config.head_dim
        return MemorizingMemory(*[Field(shape, window_axis=2)] * 2, *memory_field(config))

    def attend(self, h, memory, window):
        q, reader = self.self_attn.queries(h), self.memory_reader
        position = window.tokens_read[:, None] + torch.arange(q.shape[2], device=q.device)
        _, segment = reader.reach(window)
        opened = Source(memory.keys, memory.values, window.windows_read * window.length)
        before = reader.sources(memory, window, (self.config.segment_windows - 1) * window.length)
        near = attend_to_range(q, [*before, opened], segment[:, None], position)
        return reader(q, near, memory, window)[0], None

    def close(self, memory, summaries, window):
        return self.memory_reader.append(memory, memory.keys, memory.values), summaries, None


class SlidingWindowWithSideLayer(SlidingWindowLayer):
    """A layer of the stack and the side layer after it, with one common memory."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.side = SideLayer(config)
        self.adds_input = config.side_residual == "double"  # as released
        self.carried_fields = SideMemory(*self.fields, *self.side.fields)

    def forward(self, x, summaries, *memory, plan):
        x, summaries, loss, outputs, *window = super().forward(x, summaries, *memory[:2], plan=plan)
        # Without gradient checkpointing of its own: this layer is checkpointed.
        side = nn.Module.__call__(self.side, x, summaries, *memory[2:], plan=plan)
        y, summaries, _, side_outputs, *rest = side
        if outputs is not None:
            pairs = zip(outputs, side_outputs, strict=True)
            outputs = [stack._replace(snapshot=side_memory(stack, side)) for stack, side in pairs]
        return x + y if self.adds_input else y, summaries, loss, outputs, *window, *rest

    def metrics(self, memory, windows_read):
        """Compute the metrics of the window and those of `MemoryReader`."""
        metrics = self.side.memory_reader.metrics(memory, windows_read)
        return super().metrics(memory, windows_read) | metrics


def side_memory(stack, side):
    """Combine the snapshots of a layer of the stack and its side layer."""
    return SideMemory(*stack.snapshot, *side.snapshot) if stack.snapshot is not None else None


def memory_field(config):
    """Describe the keys and values of the memory."""
    shape = config.num_attention_heads, config.memory_slots, config.head_dim
    return [Field(shape, "long", config.window_length)] * 2


class MemorizingTransformerModel(DecoderModel):
    """A Memorizing Transformer without its head."""

    config_class = MemorizingTransformerConfig
    _no_split_modules = [  # noqa: RUF012
        "SlidingWindowLayer",
        "MemorizingLayer",
        "SlidingWindowWithSideLayer",
    ]

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        if layer_idx != config.memory_layer:
            return SlidingWindowLayer(config, layer_idx)
        in_stack = config.placement == "in_stack"
        return (MemorizingLayer if in_stack else SlidingWindowWithSideLayer)(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise gates to give memory and window the same weight."""
        super()._init_weights(module)
        if isinstance(module, Gate):
            init.zeros_(module.weight)


class MemorizingTransformerForCausalLM(DecoderForCausalLM):
    """A Memorizing Transformer as a language model."""

    config_class = MemorizingTransformerConfig
    model_class = MemorizingTransformerModel


register_auto_classes(MemorizingTransformerModel, MemorizingTransformerForCausalLM)
