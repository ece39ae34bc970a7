"""Compressive Transformer (Rae et al., ICLR 2020, section 3): old memories are compressed.

Each layer stores its inputs, the hidden states of the last windows (the memory) and, for those
before, one slot for every c of them (the compressed memory). A window attends to both entirely:

    compressed       memory             window k
    [ z z z z z z ]  [ m m m m m m ] <- [ x x x x x x ]    x_i sees all z, all m and x_0..x_{i-1}
              ^         |       ^           |
              |         | f     +-----------+              then the window enters the memory, and
              +- z z z -+                                  the states that it evicts are compressed

    old = memory[:W]
    compressed' = (compressed, f(old))[-n_cm:]       memory' = (memory, x)[-n_m:]

The functions f and their losses are in `compression`. No gradient passes through the memories,
except for a learned f without an auxiliary loss (`compression_loss="none"`): then gradients flow
within a call through the compressed memory into f and the states that it compressed, which needs
calls of two windows or more. Otherwise the next-token loss trains everything except f, and the
auxiliary loss trains f alone. The auxiliary loss is computed in training only. Each window that
evicts states has one, the sum over all layers; it counts once for each token of the window and is
divided by the number of targets, as the next-token loss is.

Keys and values of the memories are computed when states enter them, at the end of a window; in
training also at the beginning of a call, with the current weights.

Differs from the paper: pre-norm with RMS norms, unit keys and queries, T5's relative biases and no
attention of a token to itself, as in all baselines here; so the states are those of the residual
stream. A slot of the compressed memory counts as one position, or as c
(`compressed_position="scaled"`). Empty slots are masked unless `mask_empty_memory` is False.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .compression import make_compression, make_loss
from .configuration_compressive_transformer import CompressiveTransformerConfig
from .decoder import DecoderForCausalLM, DecoderModel, init_truncated_, register_auto_classes
from .layer import Field, MemoryLayer
from .modules import Attention, mean_rms
from .windows import Step, append_fifo


class CompressiveMemory(NamedTuple):
    """Hidden states of the memory and of the compressed memory, and the open window of w tokens.

    Generation stores keys and values of both memories, M = n_cm + n_m slots, and no states of the
    compressed one; training recomputes keys and values at the beginning of each call.
    """

    memory: Any  # B n_m D, oldest first
    compressed: Any  # B n_cm D, oldest first
    keys: Any  # B H M+w K
    values: Any  # B H M+w K
    inputs: Any  # B w D, the window's hidden states before the layer
    loss: Any  # B 0, unused; files of earlier versions have it


class ScaledAttention(Attention):
    """Attention in which each compressed slot counts as c positions."""

    def position_bias(self, step, num_summaries=0):
        far_slots, rate = self.config.slots_carried, self.config.compression_rate
        near_slots = self.num_slots - far_slots
        slot = torch.arange(far_slots, 0, -1, device=step.tokens_read.device)
        far = step.bias_before(self.bias_by_distance, near_slots + slot * rate)
        near = step.bias(self.bias_by_distance, near_slots, num_summaries)
        return torch.cat((far, near), dim=-1)


class CompressiveLayer(MemoryLayer):
    """A layer with a memory and a compressed memory."""

    def __init__(self, config, layer_idx):
        self.memory_length, self.compressed_length = config.tokens_carried, config.slots_carried
        sizes = {
            "num_slots": config.slots_carried + config.tokens_carried,
            "token_slots": config.tokens_carried,
        }
        is_scaled = config.compressed_position == "scaled"
        super().__init__(config, (ScaledAttention if is_scaled else Attention)(config, **sizes))
        self.compression = make_compression(config)
        self.reconstruction = make_loss(config)
        self.has_auxiliary_loss = self.reconstruction is not None
        self.keep = nn.Identity() if config.learns_through_memory else StopGradient()

    def memory_fields(self):
        config, hidden = self.config, self.config.hidden_size
        length, slots = config.window_length, config.slots_carried + config.tokens_carried
        keys = Field(
            (config.num_attention_heads, slots + length, config.head_dim),
            window_axis=2,
            projected_from=("compressed", "memory"),
        )
        return CompressiveMemory(
            memory=Field((config.tokens_carried, hidden), "short", length),
            compressed=Field(
                (config.slots_carried, hidden), "long", config.slots_compressed, held_in="training"
            ),
            keys=keys,
            values=keys,
            inputs=Field((length, hidden), window_axis=1),
            loss=Field((0,)),
        )

    def attend(self, h, memory, window):
        q = self.self_attn.queries(h)
        filled = self.filled_slots(memory.keys)
        return self.self_attn(q, memory.keys, memory.values, filled, window)

    def filled_slots(self, keys):
        """Find the filled slots of both memories (R M): only keys of empty slots are zero.

        Counting is not enough: after the memory was dropped, empty slots enter the compressed
        memory behind older ones.
        """
        return (keys[:, 0, : self.self_attn.num_slots] != 0).any(-1)

    def close(self, memory, summaries, window):
        """Append the states of the window, and compress those that leave the memory."""
        length = self.config.window_length
        old, states = memory.memory[:, :length], memory.inputs
        is_evicted = window.windows_in_memory("short") >= self.memory_length // length  # R
        compressed = self.compression(old, partial(self.received_attention, memory, window))
        loss = None
        if self.has_auxiliary_loss and window.trains:
            norm, attention = self.input_layernorm, self.self_attn
            lost = self.reconstruction(norm, attention, states.detach(), old, compressed)
            loss = lost * is_evicted * length  # counts once for each token
        # A convolution maps empty slots to its bias.
        compressed = self.keep(compressed).masked_fill(~is_evicted[:, None, None], 0)
        entering = zip(self.project(compressed), self.project(states.detach()), strict=True)
        pairs = zip((memory.keys, memory.values), entering, strict=True)
        keys, values = (self.push(slots, *new) for slots, new in pairs)
        memory = memory._replace(
            memory=append_fifo(memory.memory, self.keep(states), 1),
            compressed=append_fifo(memory.compressed, compressed, 1),
            keys=keys,
            values=values,
        )
        return memory, summaries, loss

    def push(self, slots, compressed, states):
        """Append to the keys or values of both memories: R H M K."""
        sizes = self.compressed_length, self.memory_length
        far, near = slots[:, :, : sum(sizes)].split(sizes, dim=2)
        return torch.cat((append_fifo(far, compressed, 2), append_fifo(near, states, 2)), dim=2)

    @torch.no_grad()
    def received_attention(self, memory, window):
        """Compute the attention that the oldest states received from the full window: R W.

        It is the mean over heads and queries, computed again for the whole window, so that the
        result does not depend on how calls divide the window.
        """
        attention, length = self.self_attn, self.config.window_length
        bias = attention.position_bias(Step(length, length, 0, window.tokens_read))
        bias = attention.mask_empty(bias, attention.num_slots, self.filled_slots(memory.keys))
        q = attention.queries(self.input_layernorm(memory.inputs))
        weights = (q @ memory.keys.transpose(-1, -2) + bias).float().softmax(-1)
        first = self.compressed_length
        return weights[..., first : first + length].mean((1, 2))

    def metrics(self, memory, windows_read):
        """Compute memory_rms and compressed_rms: root mean squares of the memories."""
        return {
            "memory_rms": mean_rms(memory.memory),
            "compressed_rms": mean_rms(memory.compressed),
        }


class StopGradient(nn.Module):
    """Return its input without a gradient."""

    def forward(self, x):
        return x.detach()


class CompressiveTransformerModel(DecoderModel):
    """A Compressive Transformer without its head."""

    config_class = CompressiveTransformerConfig
    _no_split_modules = ["CompressiveLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        return CompressiveLayer(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise convolutions as matrices, with the standard deviation 1/sqrt(inputs)."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d) and module.bias is not None:
            init_truncated_(module.weight, module.weight[0].numel() ** -0.5)
            init.zeros_(module.bias)


class CompressiveTransformerForCausalLM(DecoderForCausalLM):
    """A Compressive Transformer as a language model."""

    config_class = CompressiveTransformerConfig
    model_class = CompressiveTransformerModel


register_auto_classes(CompressiveTransformerModel, CompressiveTransformerForCausalLM)
