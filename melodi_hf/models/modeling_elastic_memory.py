"""Elastic Memory (Song et al., 2026, arXiv 2602.11212v1): an unofficial reconstruction.

The equations, the algorithm and the tables of the paper could not be had. This is built from its
abstract, its reviews and a reader's notes, with the mathematics of HiPPO-LegS, which is published;
what was not told is decided here and marked as ours.

In some layers the keys and values of the whole past are taken for samples of a signal, channel by
channel, and held as N coefficients each (`legs`). A block of W tokens attends to M points of the
reconstructed past beside its own tokens, all in one softmax; then its keys and values are taken in:

    block i              [ k̂ k̂ k̂ k̂ k̂ | x x x x x x x x ]    k̂, v̂ = R_i C_i     M points of the past
                           every x sees  x_i sees x_0..x_{i-1}
    coefficients         C_i  ->  C_{i+1} = P_i C_i + K_i [k | v]

Nothing is learned for it: the banks P, K and R follow from the index of the block. So the points
that are looked at can be exchanged after training (`set_sampling`); the memory stays what it is.

Ours: which layers have a memory, M, the two formulas of sampling, and the update without steps of a
differential equation, so that no length of context is built in; other layers see their own block
alone, or the W tokens before each token; gradients flow through the coefficients within a call;
a block that is not full is not taken in. Like all systems here it stands on MELODI's skeleton: keys
have length one when they are taken in, what is reconstructed from them is not normalised again and
has no position bias, and positions inside a block are T5's biases, where the paper rotates keys
after they were taken in. The ablation without compression is left out, since its memory would grow
with the document.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import OutputRecorder

from .attention import merge_heads, split_heads
from .attention_map import AttentionMap
from .configuration_elastic_memory import ElasticMemoryConfig
from .decoder import DecoderForCausalLM, DecoderModel, make_known
from .generation import MemoryGenerationMixin
from .legs import SAMPLINGS, Nodes, kept_basis, kept_transition, nodes, together, where_exact
from .norm import mean_size
from .sliding_window import SlidingWindowLayer


class ElasticMemory(NamedTuple):
    """What a layer carries: coefficients of the keys and values of all closed blocks; of the open
    one, keys and values of the M points of the past that it sees and of its w tokens. These two
    have no slots while w = 0."""

    key_coefficients: Tensor  # B N H*K, float32
    value_coefficients: Tensor  # B N H*K, float32
    keys: Tensor  # B H M+w K
    values: Tensor  # B H M+w K


COEFFICIENTS = ("key_coefficients", "value_coefficients")


class ElasticMemoryLayer(SlidingWindowLayer):
    """A layer whose blocks attend to themselves and to points of the whole past."""

    memory_type = ElasticMemory
    changed_by_closing = COEFFICIENTS
    kinds = {"long": COEFFICIENTS}  # noqa: RUF012
    summaries_of_the_past = ("long",)
    kept_in_float32 = COEFFICIENTS

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.past, self.points = config.num_memory_samples, SAMPLINGS[config.sampling]
        self.attention_map = AttentionMap(self.past, 0)
        self.nodes = nodes(config.memory_order)

    def memory_shapes(self, for_generation=False):
        config = self.config
        heads, per_head = config.num_attention_heads, config.head_dim
        slots = self.past + config.window_length if for_generation else 0
        coefficients = dict.fromkeys(COEFFICIENTS, (config.memory_order, heads * per_head))
        return coefficients | dict.fromkeys(("keys", "values"), (heads, slots, per_head))

    def slots_per_window(self):
        return {}

    def figures(self, memory, windows_read):
        """coefficient_rms: the size of the coefficients of the values; keys have length one."""
        return {"coefficient_rms": mean_size(memory.value_coefficients)}

    def nodes_on(self, device):
        """What banks are made from, beside what they are made for."""
        device = where_exact(device)
        if torch.compiler.is_compiling():  # a graph has those that it finds here
            return Nodes(*(tensor.to(device) for tensor in self.nodes))
        self.nodes = nodes(self.config.memory_order, device)
        return self.nodes

    def position_bias(self, chunk):
        bias = chunk.bias(self.self_attn.bias_by_distance, 0, 0)
        return nn.functional.pad(bias, (self.past, 0))  # points of the past have no distance

    def filled_slots(self, chunk):
        return (chunk.windows_held("long") > 0) * self.past

    def read(self, chunk, bias, memory, q, k, v):
        """One cell: q, k, v: B H T K -> what was attended to (B H T K), the next memory."""
        keys, values = chunk.begin(
            (memory.keys, memory.values), lambda: self.recall(memory, chunk), 2, self.past
        )
        keys, values = chunk.extend(keys, k, dim=2), chunk.extend(values, v, dim=2)
        filled = self.filled_slots(chunk)
        attended = self.self_attn(
            q, keys, values, bias, self.past, filled, chunk.in_order, chunk.weights
        )
        memory = memory._replace(keys=keys, values=values)
        return attended, self.close(memory, chunk) if chunk.closes else memory

    def recall(self, memory, chunk):
        """Keys and values at the points of the past that a block sees: two of B H M K."""
        known = self.nodes_on(memory.keys.device)

        def reconstruct(tokens_read, *coefficients):
            at = kept_basis(self.points, self.past, tokens_read, known, like=coefficients[0])
            return tuple(at @ held for held in coefficients)

        with maybe_autocast(memory.keys.device.type, enabled=False):
            read = (chunk.windows_read * self.config.window_length).clamp(min=1)
            past = together(reconstruct, read, *memory[:2])
        heads = self.config.num_attention_heads
        return tuple(split_heads(part.to(memory.keys.dtype), heads) for part in past)

    def close(self, memory, chunk):
        """The block is full: its keys and values are taken in."""
        chunk.remember(memory)
        length, known = self.config.window_length, self.nodes_on(memory.keys.device)

        def take_in(tokens_read, *held):
            past, block = kept_transition(tokens_read, length, known, like=held[0])
            return tuple(past @ c + block @ x for c, x in zip(held[:2], held[2:], strict=True))

        old = memory[:2]
        new = (
            merge_heads(slots.narrow(2, self.past, length)).to(old[0].dtype)
            for slots in (memory.keys, memory.values)
        )
        with maybe_autocast(memory.keys.device.type, enabled=False):
            taken = together(take_in, chunk.windows_read * length, *old, *new)
        fields = zip(COEFFICIENTS, taken, old, strict=True)
        closed = {name: chunk.where_closed(after, before) for name, after, before in fields}
        return memory._replace(
            **closed,
            keys=chunk.emptied(memory.keys, 2),
            values=chunk.emptied(memory.values, 2),
        )


class ElasticMemoryModel(DecoderModel):
    """Elastic Memory without its head."""

    config_class = ElasticMemoryConfig
    _no_split_modules = ["ElasticMemoryLayer", "SlidingWindowLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SlidingWindowLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        has_memory = layer_idx in config.layers_with_memory
        return (ElasticMemoryLayer if has_memory else SlidingWindowLayer)(config, layer_idx)

    def set_sampling(self, sampling):
        """From the next block that begins, look at other points of the past.

        sampling: "uniform" or "exponential", which is saved with the configuration; or a function
            points(num_samples, tokens_read) -> num_samples numbers in (0, 1], 1 being now and 0
            the beginning of the document. tokens_read is a tensor (an integer, or one for each row
            while a graph is captured, and then so are the points), as is the result. A function is
            not saved.

        Raises `ValueError` for another name; points outside (0, 1] are refused when they are used.
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


class ElasticMemoryForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """Elastic Memory as a language model."""

    config_class = ElasticMemoryConfig
    model_class = ElasticMemoryModel
    _no_split_modules = ["ElasticMemoryLayer", "SlidingWindowLayer"]  # noqa: RUF012

    def set_sampling(self, sampling):
        """As that of `ElasticMemoryModel`."""
        self.model.set_sampling(sampling)


make_known(ElasticMemoryModel, ElasticMemoryForCausalLM)
