"""Elastic Memory (Song et al., 2026, arXiv 2602.11212v1): an unofficial reconstruction.

We could not obtain the equations, the algorithm and the tables of the paper. This is built from its
abstract, its reviews and a reader's notes, with the published mathematics of HiPPO-LegS; choices
that these sources leave open are made here and marked as ours.

Some layers treat the keys and values of the whole past as samples of a signal per channel and store
N coefficients for each (`legs`). A block of W tokens attends to M points of the reconstructed past
and to its own tokens in one softmax; then the coefficients are updated with its keys and values:

    block i              [ k̂ k̂ k̂ k̂ k̂ | x x x x x x x x ]    k̂, v̂ = R_i C_i     M points of the past
                           every x sees  x_i sees x_0..x_{i-1}
    coefficients         C_i  ->  C_{i+1} = P_i C_i + K_i [k | v]

Nothing is learned for it: the matrices P, K and R follow from the index of the block. So the points
can be changed after training (`set_sampling`) without effect on the memory.

Ours: which layers have a memory, M, the two formulas of sampling, and the update without steps of a
differential equation, so that no context length is built in; other layers attend to their own block
alone, or to the W tokens before each token; gradients flow through the coefficients within a call;
an incomplete block does not change them. Like all systems here it has MELODI's skeleton: keys have
length one when they enter the coefficients, reconstructed keys are not normalised again and have no
position bias, and positions inside a block are T5's biases, where the paper rotates keys after they
entered. The ablation without compression is left out: its memory would grow with the document.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_elastic_memory import ElasticMemoryConfig
from .decoder import DecoderForCausalLM, DecoderModel, register_auto_classes
from .layer import Field, MemoryLayer
from .legs import (
    SAMPLINGS,
    Nodes,
    cached_basis,
    cached_transition,
    float64_device,
    gauss_legendre_nodes,
    group_by_position,
)
from .modules import Attention, mean_rms, merge_heads, split_heads
from .sliding_window import SlidingWindowLayer


class ElasticMemory(NamedTuple):
    """Coefficients of the keys and values of all complete blocks, and the open block.

    keys, values: of the M points of the past and of the w tokens; no slots between blocks.
    """

    key_coefficients: Any  # B N H*K, float32
    value_coefficients: Any  # B N H*K, float32
    keys: Any  # B H M+w K
    values: Any  # B H M+w K


class UnplacedSlotsAttention(Attention):
    """Attention to [slots without positions | window]."""

    def position_bias(self, step, num_summaries=0):
        bias = step.bias(self.bias_by_distance, 0, num_summaries)
        return nn.functional.pad(bias, (self.num_slots, 0))


class ElasticMemoryLayer(MemoryLayer):
    """A layer whose blocks attend to their tokens and to points of the whole past."""

    def __init__(self, config, layer_idx):
        super().__init__(config, UnplacedSlotsAttention(config, config.num_memory_samples))
        self.points = SAMPLINGS[config.sampling]
        self.nodes = gauss_legendre_nodes(config.memory_order)

    def memory_fields(self):
        config, slots = self.config, self.config.num_memory_samples + self.config.window_length
        heads, per_head = config.num_attention_heads, config.head_dim
        coefficients = Field((config.memory_order, heads * per_head), "long", in_float32=True)
        keys = Field((heads, slots, per_head), window_axis=2)
        return ElasticMemory(coefficients, coefficients, keys, keys)

    def metrics(self, memory, windows_read):
        """Compute coefficient_rms: root mean square of the coefficients of the values."""
        return {"coefficient_rms": mean_rms(memory.value_coefficients)}

    def nodes_on(self, device):
        """Return the nodes that banks are computed from, on a device."""
        device = float64_device(device)
        if torch.compiler.is_compiling():  # the nodes become constants of the graph
            return Nodes(*(tensor.to(device) for tensor in self.nodes))
        self.nodes = gauss_legendre_nodes(self.config.memory_order, device)
        return self.nodes

    def attend(self, h, memory, window):
        filled = (window.windows_in_memory("long") > 0) * self.config.num_memory_samples
        q = self.self_attn.queries(h)
        return self.self_attn(q, memory.keys, memory.values, filled, window)

    def recall(self, memory, window):
        """Reconstruct keys and values at the points of the past: R H M K."""
        config, nodes = self.config, self.nodes_on(memory.keys.device)

        def reconstruct(tokens_read, *coefficients):
            arguments = self.points, config.num_memory_samples, tokens_read, nodes
            basis = cached_basis(*arguments, like=coefficients[0])
            return tuple(basis @ c for c in coefficients)

        with maybe_autocast(memory.keys.device.type, enabled=False):
            read = (window.windows_read * config.window_length).clamp(min=1)
            past = group_by_position(reconstruct, read, *memory[:2])
        dtype, heads = memory.keys.dtype, config.num_attention_heads
        keys, values = (split_heads(part.to(dtype), heads) for part in past)
        return memory._replace(keys=keys, values=values)

    def close(self, memory, summaries, window):
        length, nodes = self.config.window_length, self.nodes_on(memory.keys.device)

        def update(tokens_read, *tensors):
            past, block = cached_transition(tokens_read, length, nodes, like=tensors[0])
            pairs = zip(tensors[:2], tensors[2:], strict=True)
            return tuple(past @ c + block @ x for c, x in pairs)

        old = memory[:2]
        new = (
            merge_heads(slots[:, :, -length:]).to(old[0].dtype)
            for slots in (memory.keys, memory.values)
        )
        with maybe_autocast(memory.keys.device.type, enabled=False):
            keys, values = group_by_position(update, window.windows_read * length, *old, *new)
        return memory._replace(key_coefficients=keys, value_coefficients=values), summaries, None


class ElasticMemoryModel(DecoderModel):
    """Elastic Memory without its head."""

    config_class = ElasticMemoryConfig
    _no_split_modules = ["ElasticMemoryLayer", "SlidingWindowLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        has_memory = layer_idx in config.layers_with_memory
        return (ElasticMemoryLayer if has_memory else SlidingWindowLayer)(config, layer_idx)

    def set_sampling(self, sampling):
        """Set the points of the past that the blocks from the next one on attend to.

        Args:
            sampling: "uniform" or "exponential", which is saved with the configuration; or a
                function points(num_samples, tokens_read), which is not saved and returns a tensor
                of num_samples numbers in (0, 1], 0 being the beginning of the document and 1 now.
                tokens_read is a tensor, one integer, or one for each row while a graph is traced;
                then it returns the points of each row.

        Raises:
            ValueError: for another name. Points outside (0, 1] raise when they are first used.
        """
        if not callable(sampling):
            if sampling not in SAMPLINGS:
                raise ValueError(
                    f"sampling is {sampling!r}: give one of {', '.join(map(repr, SAMPLINGS))}, or "
                    f"a function points(num_samples, tokens_read)"
                )
            self.config.sampling = sampling
            sampling = SAMPLINGS[sampling]
        for layer in self.layers:
            if isinstance(layer, ElasticMemoryLayer):
                layer.points = sampling


class ElasticMemoryForCausalLM(DecoderForCausalLM):
    """Elastic Memory as a language model."""

    config_class = ElasticMemoryConfig
    model_class = ElasticMemoryModel

    def set_sampling(self, sampling):
        """Set the points of the past, see `ElasticMemoryModel.set_sampling`."""
        self.model.set_sampling(sampling)


register_auto_classes(ElasticMemoryModel, ElasticMemoryForCausalLM)
