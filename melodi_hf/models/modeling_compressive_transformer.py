"""Compressive Transformer (Rae et al., ICLR 2020, section 3): old memories are not lost at once.

Each layer holds the hidden states that it was given in the last windows (the memory) and, of those
before, one slot for c of them (the compressed memory). A window attends to all of both:

    compressed       memory             window k
    [ z z z z z z ]  [ m m m m m m ] <- [ x x x x x x ]    x_i sees all z, all m and x_0..x_{i-1}
              ^         |       ^           |
              |         | f     +-----------+              then the window enters the memory, and
              +- z z z -+                                  what it drives out is compressed

    old = memory[:W]
    compressed' = (compressed, f(old))[-n_cm:]       memory' = (memory, x)[-n_m:]

How f compresses and what it is trained on is in `compression`. No gradient passes through the
memories, but for a learned f without a loss of its own (`compression_loss="none"`): then it flows
through the compressed memory, within a call, into f and into the states that it compressed; it
takes calls of two windows or more. Otherwise the loss of the next token trains everything but f
and the auxiliary loss f alone. The auxiliary loss is computed in training alone. Each window that
sends states out of the memory has one, the sum of those of all layers; it counts once for each of
the window's tokens, and is divided by the number of targets as the loss of the next token is.

Keys and values of the memories are made once: when a window closes, of what it sends there; in
training also at the beginning of a call, with the weights of the day.

Differs from the paper: pre-norm with RMS norms, unit keys and queries, T5's relative biases and no
attention to oneself, as in all baselines here; so the states are those of the residual stream. A
slot of the compressed memory counts as one position, or as c (`compressed_position="scaled"`).
Empty slots are hidden unless `mask_empty_memory` is switched off.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, merge_heads
from .attention_map import AttentionMap
from .compression import make_compression, make_loss
from .configuration_compressive_transformer import CompressiveTransformerConfig
from .decoder import (
    DecoderForCausalLM,
    DecoderLayer,
    DecoderModel,
    FeedForward,
    init_truncated_,
    make_known,
)
from .generation import MemoryGenerationMixin
from .norm import RMSNorm, mean_size
from .windows import Chunk, slide


class CompressiveMemory(NamedTuple):
    """What a layer carries. Of the compressed memory, training holds hidden states and generation
    their keys and values. The last four belong to the open window, w of whose tokens are read."""

    memory: Tensor  # B n_m D, oldest first
    compressed: Tensor  # B n_cm D, oldest first; generation needs no slots
    keys: Tensor  # B H M+w K, M = n_cm + n_m in generation and within a call, 0 between others
    values: Tensor  # B H M+w K
    inputs: Tensor  # B w D, the window's hidden states before the layer
    loss: Tensor  # B 1, the auxiliary loss of the call so far; B 0 if nobody trains on it


class CompressiveLayer(DecoderLayer):
    """A layer with a memory and a compressed one."""

    memory_type = CompressiveMemory
    window_axis = {"keys": 2, "values": 2, "inputs": 1}  # noqa: RUF012
    changed_by_closing = ("memory", "compressed", "keys", "values")
    kinds = {"short": ("memory",), "long": ("compressed",)}  # noqa: RUF012
    needed_in_training = ("compressed",)

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.memory_length = config.tokens_carried
        self.compressed_length = config.slots_carried
        self.slots = self.compressed_length + self.memory_length
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, always_sees=True)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.compression = make_compression(config)
        self.reconstruction = make_loss(config)
        self.keep = keep if config.learns_through_memory else cut
        self.attention_map = AttentionMap(self.slots, self.memory_length)

    def memory_shapes(self, for_generation=False):
        config, hidden = self.config, self.config.hidden_size
        window = config.window_length if for_generation else 0
        slots = self.slots + window if for_generation else 0
        keys = config.num_attention_heads, slots, config.head_dim
        return {
            "memory": (self.memory_length, hidden),
            "compressed": (0 if for_generation else self.compressed_length, hidden),
            "keys": keys,
            "values": keys,
            "inputs": (window, hidden),
            "loss": (0,),
        }

    def slots_per_window(self):
        return {"short": self.config.window_length, "long": self.config.slots_compressed}

    def forward(self, x, loss, *memory, plan):
        # x: B T D; loss: 1, of the layers before, or 0 if nobody trains on it
        packed = plan.pack_tokens(x)
        h = self.dropout(self.input_layernorm(packed))
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        given = CompressiveMemory(*memory)
        parts = (plan.split(t, dim) for t, dim in ((q, 2), (k, 2), (v, 2), (packed, 1)))
        attended, after = self.read_chunks(plan, self.open_beside(given, loss), *parts)
        packed = packed + self.self_attn.o_proj(merge_heads(plan.join(attended, 2)))
        packed = packed + self.dropout(self.mlp(self.post_attention_layernorm(packed)))
        loss = loss + after.loss.sum(0)
        return plan.unpack_tokens(packed), loss, *self.shut(after, given)

    def open_beside(self, memory, loss):
        """Before the first window of a call: in training states are projected anew."""
        memory = memory._replace(loss=loss.new_zeros(memory.memory.shape[0], loss.shape[0]))
        if self.holds_keys(memory):
            return memory
        keys, values = self.recall(torch.cat((memory.compressed, memory.memory), dim=1))
        keys = torch.cat((keys, memory.keys.to(keys.dtype)), dim=2)
        return memory._replace(
            keys=keys, values=torch.cat((values, memory.values.to(values.dtype)), dim=2)
        )

    def shut(self, memory, given):
        """After the last window of a call: training carries keys and values of the open window."""
        memory = memory._replace(loss=given.loss)
        if not self.holds_keys(given):
            keys, values = (t[:, :, self.slots :] for t in (memory.keys, memory.values))
            memory = memory._replace(keys=keys, values=values)
        # Not parts of longer tensors, which FSDP warns of.
        return CompressiveMemory(*(held.contiguous() for held in memory))

    def holds_keys(self, memory):
        """Whether a memory has the keys and values of what is remembered, as in generation."""
        return memory.keys.shape[2] > self.config.window_length

    def to_generation(self, memory):
        return super().to_generation(self.open_beside(memory, memory.loss.new_zeros(0)))

    def to_training(self, memory, fill):
        memory = super().to_training(memory, fill)
        keys, values = (t[:, :, self.slots :] for t in (memory.keys, memory.values))
        return memory._replace(keys=keys, values=values)

    def recall(self, states):
        """Keys and values of remembered states: B J D -> two of B H J K."""
        return self.self_attn.keys_values(self.dropout(self.input_layernorm(states)))

    def position_bias(self, chunk):
        """H T J or B H T J, for the chunk's queries towards [compressed | memory | window]."""
        return chunk.bias(self.self_attn.bias_by_distance, self.slots, 0)

    def read(self, chunk, bias, memory, q, k, v, x):
        """One cell: q, k, v: B H T K; x: B T D -> what was attended to (B H T K), the memory."""
        keys, values = chunk.so_far((memory.keys, memory.values), 2, self.slots)
        keys, values = chunk.extend(keys, k, dim=2), chunk.extend(values, v, dim=2)
        attended = self.self_attn(
            q, keys, values, bias, self.slots, self.filled(keys), chunk.in_order, chunk.weights
        )
        inputs = chunk.extend(*chunk.so_far((memory.inputs,), 1), x, dim=1)
        memory = memory._replace(keys=keys, values=values, inputs=inputs)
        return attended, self.close(memory, chunk) if chunk.closes else memory

    def filled(self, keys):
        """Which slots of the memories hold something (B M): the key of an empty one is zero, all
        others have length one. Counting would not do: what enters the compressed memory after the
        memory forgot is empty, with older slots before it."""
        return (keys[:, 0, : self.slots] != 0).any(-1)

    def evicts(self, chunk):
        """Whether the states that would leave the memory, were the window full, are real (R,)."""
        return chunk.windows_held("short") >= self.memory_length // self.config.window_length

    def close(self, memory, chunk):
        """The window is full: its states are remembered, and the oldest ones compressed."""
        chunk.remember(memory)
        old, window = memory.memory[:, : self.config.window_length], memory.inputs
        evicts = self.evicts(chunk)
        compressed = self.compression(old, partial(self.received, memory, chunk))
        loss = memory.loss
        if loss.shape[1]:
            norm, attention = self.input_layernorm, self.self_attn
            lost = self.reconstruction(norm, attention, window.detach(), old, compressed)
            loss = chunk.where_closed(loss + (lost * evicts)[:, None], loss)
        # What a convolution makes of empty slots is no memory.
        compressed = self.keep(compressed).masked_fill(~evicts[:, None, None], 0)
        entering = zip(self.recall(compressed), self.recall(window.detach()), strict=True)
        keys, values = (
            chunk.where_closed(self.push(held, *new), held)
            for held, new in zip((memory.keys, memory.values), entering, strict=True)
        )
        pairs = ((memory.memory, self.keep(window)), (memory.compressed, compressed))
        states, slots = (chunk.where_closed(slide(held, new, 1), held) for held, new in pairs)
        inputs = chunk.emptied(memory.inputs, 1)
        return CompressiveMemory(states, slots, keys, values, inputs, loss)

    def push(self, held, compressed, states):
        """Keys or values of both memories, B H M K, after new ones came into each."""
        sizes = self.compressed_length, self.memory_length
        far, near = held[:, :, : self.slots].split(sizes, dim=2)
        return torch.cat((slide(far, compressed, 2), slide(near, states, 2)), dim=2)

    @torch.no_grad()
    def received(self, memory, chunk):
        """The attention that each of the oldest states received from the full window: B W, the mean
        over heads and queries. The window is asked once more, so that it does not matter in which
        pieces it was read."""
        length, first = self.config.window_length, self.compressed_length
        bias = self.position_bias(Chunk(length, 0, chunk.tokens_read, length))
        bias = self.self_attn.with_empty(bias, self.slots, self.filled(memory.keys))
        q = self.self_attn.queries(self.input_layernorm(memory.inputs))
        weights = (q @ memory.keys.transpose(-1, -2) + bias).float().softmax(-1)
        return weights[..., first : first + length].mean((1, 2))

    def figures(self, memory, windows_read):
        """memory_rms, compressed_rms: the size of the numbers in the memories."""
        return {
            "memory_rms": mean_size(memory.memory),
            "compressed_rms": mean_size(memory.compressed),
        }


class ScaledCompressiveLayer(CompressiveLayer):
    """The same; beyond the memory each slot is c tokens further away than the one after it."""

    def position_bias(self, chunk):
        slot = torch.arange(self.compressed_length, 0, -1, device=chunk.tokens_read.device)
        before = self.memory_length + slot * self.config.compression_rate
        by_distance = self.self_attn.bias_by_distance
        near = chunk.bias(by_distance, self.memory_length, 0)
        return torch.cat((chunk.bias_before(by_distance, before), near), dim=-1)


def keep(tensor):
    """With its gradient."""
    return tensor


def cut(tensor):
    """Loses its gradient."""
    return tensor.detach()


class CompressiveTransformerModel(DecoderModel):
    """A Compressive Transformer without its head."""

    config_class = CompressiveTransformerConfig
    _no_split_modules = ["CompressiveLayer", "ScaledCompressiveLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CompressiveLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        scaled = config.compressed_position == "scaled"
        return (ScaledCompressiveLayer if scaled else CompressiveLayer)(config, layer_idx)

    def streams(self, x, plan):
        # The auxiliary loss rides with the tokens, and has no slot where nobody trains on it.
        trains = self.config.compression_loss != "none" and self.training
        return x, x.new_zeros(int(trains and torch.is_grad_enabled()), dtype=torch.float32)

    def auxiliary_loss(self, loss):
        return loss[0] * self.config.window_length if len(loss) else None

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_convolution(module)


class CompressiveTransformerForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """A Compressive Transformer as a language model."""

    config_class = CompressiveTransformerConfig
    model_class = CompressiveTransformerModel
    _no_split_modules = ["CompressiveLayer", "ScaledCompressiveLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_convolution(module)


def init_convolution(module):
    """As all kernels: the sum over what one output reads keeps its size."""
    if isinstance(module, nn.Conv1d) and module.bias is not None:
        init_truncated_(module.weight, module.weight[0].numel() ** -0.5)
        init.zeros_(module.bias)


make_known(CompressiveTransformerModel, CompressiveTransformerForCausalLM)
