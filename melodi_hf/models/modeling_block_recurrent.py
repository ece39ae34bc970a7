"""Block-Recurrent Transformer (Hutchins et al., NeurIPS 2022, arXiv 2203.07852, section 3).

A sliding-window Transformer-XL (`sliding_window`) in which a layer near the top also carries n
state vectors C. Tokens attend to the state that the window before left; when a window is full, the
state attends to itself and to the window's tokens, and a gate lets in what it finds. The two
directions are parallel: each reads what the other was before.

    state    [ c c c ] -- attends to itself and to the window, gate --> [ c c c ] --> ...
                 ^                                                          ^
                 | attend to what the window before left                    |
    tokens   [ x x x x x x x x ]  window k                              [ x x x x x x x x ]

    tokens   x' = x + [attn(Q x; K x, V x) | attn(Q₂ x; K' S, V' S)] W      S = norm(C) + P
    state    A  = [attn(Q' S; K' S, V' S) | attn(Q₂' S; K x, V x)]          P, C₀ are learned

    skip     C' = gate(C, A W')
    single   C' = gate(C, tanh(FFN(A)))
    dual     C" = gate(C, A W'),  C' = gate(C", FFN(norm(C")))

    fixed    gate(C, y) = g ⊙ C + (1 - g) ⊙ y,  g = σ(b)
    lstm     gate(C, y) = σ(h F + b + 1) ⊙ C + σ(h I + b' - 1) ⊙ y    h: what y is projected from
    full     as fixed, with g = σ(h G + b + 1)

Where paper and released code (meliad, transformer/memory and transformer/nn_components) differ this
is the code: the state reads the keys of the last window, too (`state_reads_previous_window=False`
is the paper), and there is no tanh around y but in `single`, whereas the paper's LSTM gate has one
always. Keys of tokens and of the state are shared by all who attend to them; nothing on the way of
the state is dropped, nor are weights of attention to it; the recurrent layer keeps the cache of
every other layer. The variant with feedback to all layers is not here.

The state is kept in float32, for the steps of a slow average are lost in bfloat16. A window that is
not full leaves it as it is. During generation its keys and values are made as a window begins.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.output_capturing import OutputRecorder

from .attention import Temperature, attend, merge_heads, split_heads
from .attention_map import AttentionMap
from .configuration_block_recurrent import BlockRecurrentConfig
from .decoder import DecoderForCausalLM, DecoderModel, init_truncated_, make_known
from .generation import MemoryGenerationMixin
from .norm import RMSNorm, mean_size, unit
from .sliding_window import SlidingWindowLayer


class RecurrentMemory(NamedTuple):
    """Keys (of length one) and values of the last window and of the w tokens of the open one; the
    state that the last window left, and its keys and values, which have no slots while w = 0."""

    keys: Tensor  # B H W+w K
    values: Tensor  # B H W+w K
    state_vectors: Tensor  # B n D
    state_keys: Tensor  # B H n K
    state_values: Tensor  # B H n K

    @property
    def state(self):
        """The earlier name of `state_vectors`."""
        return self.state_vectors


class Queries(nn.Module):
    """Queries with a temperature of their own."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.temperature = Temperature(config.num_attention_heads)

    def forward(self, x):
        # x: B T D, normalised -> B H T K
        return unit(split_heads(self.q_proj(x), self.num_heads), self.eps, self.temperature(3))


class KeysValues(nn.Module):
    """Keys of length one, and values."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        width = config.num_attention_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)

    def forward(self, x):
        # x: B J D, normalised -> two of B H J K
        k = unit(split_heads(self.k_proj(x), self.num_heads), self.eps)
        return k, split_heads(self.v_proj(x), self.num_heads)


class GateLinear(nn.Linear):
    """What a gate makes of the content; drawn small, so that it begins near its bias."""


class FixedGate(nn.Module):
    """A moving average whose speed is learned, one per channel, and independent of the content."""

    def __init__(self, config, num_inputs):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, state, proposal, hidden):
        # state, proposal: B n D; hidden: B n num_inputs, what the proposal was projected from
        kept = self.bias.to(state.dtype).sigmoid()
        return torch.lerp(proposal, state, kept.expand_as(state))

    def openness(self):
        return 1 - self.bias.sigmoid().mean()


class LstmGate(nn.Module):
    """One gate for what is kept and one for what is let in, biased to remember."""

    def __init__(self, config, num_inputs):
        super().__init__()
        self.forget = GateLinear(num_inputs, config.hidden_size)
        self.input = GateLinear(num_inputs, config.hidden_size)

    def forward(self, state, proposal, hidden):
        kept = (self.forget(hidden) + 1).sigmoid().to(state.dtype)
        let_in = (self.input(hidden) - 1).sigmoid().to(state.dtype)
        return kept * state + let_in * proposal

    def openness(self):
        return (self.input.bias - 1).sigmoid().mean()


class FullGate(nn.Module):
    """What is let in takes the place of what is forgotten, as the content decides."""

    def __init__(self, config, num_inputs):
        super().__init__()
        self.forget = GateLinear(num_inputs, config.hidden_size)

    def forward(self, state, proposal, hidden):
        kept = (self.forget(hidden) + 1).sigmoid().to(state.dtype)
        return torch.lerp(proposal, state, kept)

    def openness(self):
        return 1 - (self.forget.bias + 1).sigmoid().mean()


def make_gate(config, num_inputs):
    """How a proposal that is projected from `num_inputs` channels enters the state."""
    if config.gate == "fixed":
        return FixedGate(config, num_inputs)
    if config.gate == "lstm":
        return LstmGate(config, num_inputs)
    return FullGate(config, num_inputs)


class GatedProjection(nn.Module):
    """`skip`: what attention found is projected and gated onto the state."""

    def __init__(self, config):
        super().__init__()
        found = 2 * config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(found, config.hidden_size, bias=False)
        self.gate = make_gate(config, found)

    def forward(self, state, attended):
        # state: B n D; attended: B n 2*H*K
        return self.gate(state, self.o_proj(attended).to(state.dtype), attended)

    def gates(self):
        return [self.gate]


class GatedFeedForward(nn.Module):
    """Two matrices with an activation between, gated onto the state."""

    def __init__(self, config, num_inputs, last):
        super().__init__()
        width, bias = config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(num_inputs, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.activation, self.last = ACT2FN[config.hidden_act], last
        self.gate = make_gate(config, width)

    def forward(self, state, x):
        hidden = self.activation(self.up_proj(x))
        return self.gate(state, self.last(self.down_proj(hidden)).to(state.dtype), hidden)

    def gates(self):
        return [self.gate]


class SingleGate(GatedFeedForward):
    """`single`: a feed-forward network reads what attention found."""

    def __init__(self, config):
        found = 2 * config.num_attention_heads * config.head_dim
        super().__init__(config, found, nn.Tanh())


class DualGates(nn.Module):
    """`dual`: a gate around attention and one around a feed-forward network, as in other layers
    there are residual connections."""

    def __init__(self, config):
        super().__init__()
        self.attention = GatedProjection(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedFeedForward(config, config.hidden_size, nn.Identity())

    def forward(self, state, attended):
        state = self.attention(state, attended)
        return self.mlp(state, self.norm(state))

    def gates(self):
        return [self.attention.gate, self.mlp.gate]


def make_update(config):
    """The way from what attention found to the next state."""
    if config.gate_configuration == "skip":
        return GatedProjection(config)
    if config.gate_configuration == "single":
        return SingleGate(config)
    return DualGates(config)


class BlockRecurrentLayer(SlidingWindowLayer):
    """A sliding-window layer with a state."""

    memory_type = RecurrentMemory
    window_axis = dict.fromkeys(("keys", "values", "state_keys", "state_values"), 2)
    filled_at_once = ("state_keys", "state_values")
    changed_by_closing = ("keys", "values", "state_vectors")
    kinds = SlidingWindowLayer.kinds | {"long": ("state_vectors", "state_keys", "state_values")}
    summaries_of_the_past = ("long",)
    kept_in_float32 = ("state_vectors",)

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        found = 2 * config.num_attention_heads * config.head_dim
        self.self_attn.o_proj = nn.Linear(found, config.hidden_size, bias=False)
        self.queries_to_state = Queries(config)
        shape = config.num_state_vectors, config.hidden_size
        self.initial_state = nn.Parameter(torch.empty(shape))
        # Who is who: without them all state vectors would see the same, and become the same.
        self.state_ids = nn.Parameter(torch.empty(shape))
        self.state_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.state_keys_values = KeysValues(config)
        self.state_queries = Queries(config)
        self.state_queries_to_tokens = Queries(config)
        self.state_update = make_update(config)
        self.unread = 0 if config.state_reads_previous_window else self.past  # by the state

    def memory_shapes(self, for_generation=False):
        config = self.config
        slots = config.num_state_vectors if for_generation else 0
        shape = config.num_attention_heads, slots, config.head_dim
        state = {"state_vectors": (config.num_state_vectors, config.hidden_size)}
        keys_values = dict.fromkeys(("state_keys", "state_values"), shape)
        return super().memory_shapes(for_generation) | state | keys_values

    def project(self, h):
        """As for all layers, the queries to the state as further heads."""
        q, k, v = super().project(h)
        return torch.cat((q, self.queries_to_state(h)), dim=1), k, v

    def read(self, chunk, bias, memory, q, k, v):
        """One cell: q: B 2H T K; k, v: B H T K -> what was attended to (B 2H T K), the memory."""
        q, q_to_state = q.chunk(2, dim=1)
        held = memory.state_keys, memory.state_values
        keys, values = chunk.where_opened(held, lambda: self.recall(memory, chunk))
        recalled = self.attend(q_to_state, keys, values)
        memory = memory._replace(state_keys=keys, state_values=values)
        attended, memory = super().read(chunk, bias, memory, q, k, v)
        return torch.cat((attended, recalled), dim=1), memory

    def attend(self, q, k, v, bias=None):
        """Without position bias and dropout."""
        return attend(q, k, v, bias, eager=self.config._attn_implementation == "eager")

    def state_after(self, windows, memory):
        """The state that so many windows (R,) left; if there are none, what was learned: R n D."""
        learned = self.initial_state.to(memory.state_vectors.dtype)
        return torch.where((windows == 0)[:, None, None], learned, memory.state_vectors)

    def named(self, state):
        """The state as it is attended to and attends: normalised, each vector with its id."""
        return self.state_layernorm(state) + self.state_ids

    def recall(self, memory, chunk):
        """The state's keys and values: two of R H n K."""
        state = self.state_after(chunk.windows_held("long"), memory)
        return self.state_keys_values(self.named(state))

    def close(self, memory, chunk):
        """The window is full: the state reads it, and it becomes the last one."""
        new = self.next_state(memory, chunk)
        closed = super().close(memory, chunk)
        return closed._replace(
            state_vectors=chunk.where_closed(new, memory.state_vectors),
            state_keys=chunk.emptied(memory.state_keys, 2),
            state_values=chunk.emptied(memory.state_values, 2),
        )

    def next_state(self, memory, chunk):
        """The state after a full window: R n D."""
        state = self.state_after(chunk.windows_held("long"), memory)
        h = self.named(state)
        within = self.attend(self.state_queries(h), memory.state_keys, memory.state_values)
        keys, values = (t[:, :, self.unread :] for t in (memory.keys, memory.values))
        filled = self.config.window_length + self.filled_slots(chunk)
        bias = self.self_attn.with_empty(None, keys.shape[2], filled)
        found = self.attend(self.state_queries_to_tokens(h), keys, values, bias)
        return self.state_update(state, merge_heads(torch.cat((within, found), dim=1)))

    def figures(self, memory, windows_read):
        """Besides that of the last window:

        gate_openness: the share of what is proposed that a gate lets in; for gates that look at the
            content, what they let in by their biases alone;
        state_rms: the size of the state's numbers, 0 before a window has moved it;
        state_spread: how far its vectors lie from their mean, as a share of their size; 0 if all
            are the same.
        """
        state = memory.state_vectors
        size, spread = mean_size(state), mean_size(state - state.mean(1, keepdim=True))
        openness = [gate.openness() for gate in self.state_update.gates()]
        return super().figures(memory, windows_read) | {
            "gate_openness": sum(openness) / len(openness),
            "state_rms": size,
            "state_spread": spread / size.clamp(min=1e-6),
        }


class BlockRecurrentModel(DecoderModel):
    """A Block-Recurrent Transformer without its head."""

    config_class = BlockRecurrentConfig
    _no_split_modules = ["SlidingWindowLayer", "BlockRecurrentLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SlidingWindowLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        is_recurrent = layer_idx in config.recurrent_layers
        return (BlockRecurrentLayer if is_recurrent else SlidingWindowLayer)(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_block_recurrent(module)


class BlockRecurrentForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """A Block-Recurrent Transformer as a language model."""

    config_class = BlockRecurrentConfig
    model_class = BlockRecurrentModel
    _no_split_modules = ["SlidingWindowLayer", "BlockRecurrentLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_block_recurrent(module)


def init_block_recurrent(module):
    """The ids like embeddings; the state and the gates small, but not zero: Adafactor's steps are
    in proportion to a parameter's size."""
    if isinstance(module, BlockRecurrentLayer):
        init.normal_(module.initial_state, std=0.1)
        init.normal_(module.state_ids, std=1.0)
    elif isinstance(module, FixedGate):
        init.normal_(module.bias, std=0.1)
    elif isinstance(module, GateLinear):
        init_truncated_(module.weight, (0.1 / module.in_features) ** 0.5)
        init.normal_(module.bias, std=0.1)


make_known(BlockRecurrentModel, BlockRecurrentForCausalLM)
