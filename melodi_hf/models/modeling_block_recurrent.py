"""Block-Recurrent Transformer (Hutchins et al., NeurIPS 2022, arXiv 2203.07852, section 3).

A sliding-window Transformer-XL (`sliding_window`) in which a layer near the top also carries n
state vectors C. Tokens attend to the state after the window before; when a window is full, the
state attends to itself and to the tokens of the window, and is updated through a gate. The two
directions are parallel: each attends to the other as it was before.

    state    [ c c c ] -- attends to itself and to the window, gate --> [ c c c ] --> ...
                 ^                                                          ^
                 | attend to the state after the window before              |
    tokens   [ x x x x x x x x ]  window k                              [ x x x x x x x x ]

    tokens   x' = x + [attn(Q x; K x, V x) | attn(Q₂ x; K' S, V' S)] W      S = norm(C) + P
    state    A  = [attn(Q' S; K' S, V' S) | attn(Q₂' S; K x, V x)]          P, C₀ are learned

    skip     C' = gate(C, A W')
    single   C' = gate(C, tanh(FFN(A)))
    dual     C" = gate(C, A W'),  C' = gate(C", FFN(norm(C")))

    fixed    gate(C, y) = g ⊙ C + (1 - g) ⊙ y,  g = σ(b)
    lstm     gate(C, y) = σ(h F + b + 1) ⊙ C + σ(h I + b' - 1) ⊙ y    h: the input of y's projection
    full     as fixed, with g = σ(h G + b + 1)

Where the paper and the released code (meliad, transformer/memory and transformer/nn_components)
differ, this follows the code: the state attends to the last window, too (in the paper not:
`state_reads_previous_window=False`), and only `single` has a tanh around y, whereas the LSTM gate
of the paper always has one. Queries of tokens and of the state attend to the same keys; there is no
dropout on the state and on attention to it; the recurrent layer has the cache of the other layers.
The variant with feedback to all layers is not implemented.

The state is in float32: bfloat16 loses the steps of a slow average. An incomplete window does not
change it. During generation its keys and values are computed at the beginning of a window.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_block_recurrent import BlockRecurrentConfig
from .decoder import DecoderForCausalLM, DecoderModel, init_truncated_, register_auto_classes
from .layer import Field
from .modules import RMSNorm, Temperature, attend, mean_rms, merge_heads, split_heads, unit
from .sliding_window import SlidingWindowLayer


class RecurrentMemory(NamedTuple):
    """Keys (of length one) and values of the last and the open window, and the state.

    state_vectors: after the last window; its keys and values have no slots between windows.
    """

    keys: Any  # B H W+w K
    values: Any  # B H W+w K
    state_vectors: Any  # B n D
    state_keys: Any  # B H n K
    state_values: Any  # B H n K

    @property
    def state(self) -> Tensor:
        """Earlier name of `state_vectors`."""
        return self.state_vectors


class Queries(nn.Module):
    """Projection to queries, with a temperature."""

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
    """Projection to keys of length one and values."""

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
    """Linear layer of a gate; initialised small, so that the gate starts near its bias."""


class FixedGate(nn.Module):
    """A moving average with a learned rate per channel that does not depend on the content."""

    def __init__(self, config, num_inputs):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, state, proposal, hidden):
        # state, proposal: B n D; hidden: B n num_inputs, the input of its projection
        keep = self.bias.to(state.dtype).sigmoid()
        return torch.lerp(proposal, state, keep.expand_as(state))

    def openness(self):
        return 1 - self.bias.sigmoid().mean()


class LstmGate(nn.Module):
    """A forget gate and an input gate, whose biases favour the old state."""

    def __init__(self, config, num_inputs):
        super().__init__()
        self.forget = GateLinear(num_inputs, config.hidden_size)
        self.input = GateLinear(num_inputs, config.hidden_size)

    def forward(self, state, proposal, hidden):
        keep = (self.forget(hidden) + 1).sigmoid().to(state.dtype)
        write = (self.input(hidden) - 1).sigmoid().to(state.dtype)
        return keep * state + write * proposal

    def openness(self):
        return (self.input.bias - 1).sigmoid().mean()


class FullGate(nn.Module):
    """One gate that depends on the content: proposal and state have weights of sum one."""

    def __init__(self, config, num_inputs):
        super().__init__()
        self.forget = GateLinear(num_inputs, config.hidden_size)

    def forward(self, state, proposal, hidden):
        keep = (self.forget(hidden) + 1).sigmoid().to(state.dtype)
        return torch.lerp(proposal, state, keep)

    def openness(self):
        return 1 - (self.forget.bias + 1).sigmoid().mean()


def make_gate(config, num_inputs):
    """Make the gate for a proposal that is projected from `num_inputs` channels."""
    if config.gate == "fixed":
        return FixedGate(config, num_inputs)
    if config.gate == "lstm":
        return LstmGate(config, num_inputs)
    return FullGate(config, num_inputs)


class GatedProjection(nn.Module):
    """`skip`: project the output of attention, and gate it into the state."""

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
    """A feed-forward network whose output is gated into the state."""

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
    """`single`: apply a feed-forward network to the output of attention."""

    def __init__(self, config):
        found = 2 * config.num_attention_heads * config.head_dim
        super().__init__(config, found, nn.Tanh())


class DualGates(nn.Module):
    """`dual`: gates in place of the residual connections of attention and feed-forward network."""

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
    """Make the module that computes the next state from the output of attention."""
    if config.gate_configuration == "skip":
        return GatedProjection(config)
    if config.gate_configuration == "single":
        return SingleGate(config)
    return DualGates(config)


class BlockRecurrentLayer(SlidingWindowLayer):
    """A sliding-window layer with a state."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        attended = 2 * config.num_attention_heads * config.head_dim
        self.self_attn.o_proj = nn.Linear(attended, config.hidden_size, bias=False)
        self.queries_to_state = Queries(config)
        shape = config.num_state_vectors, config.hidden_size
        self.initial_state = nn.Parameter(torch.empty(shape))
        # Without ids all state vectors would attend to the same tokens and become equal.
        self.state_ids = nn.Parameter(torch.empty(shape))
        self.state_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.state_keys_values = KeysValues(config)
        self.state_queries = Queries(config)
        self.state_queries_to_tokens = Queries(config)
        self.state_update = make_update(config)
        self.unread = 0 if config.state_reads_previous_window else self.past  # by the state

    def memory_fields(self):
        config, vectors = self.config, self.config.num_state_vectors
        shape = config.num_attention_heads, vectors, config.head_dim
        state = Field(shape, "long", window_axis=2, grows=False)
        state_vectors = Field((vectors, config.hidden_size), "long", in_float32=True)
        keys, values = super().memory_fields()
        return RecurrentMemory(keys, values, state_vectors, state, state)

    def recall(self, memory, window):
        state = self.named_state(self.last_state(memory, window))
        keys, values = self.state_keys_values(state)
        return memory._replace(state_keys=keys, state_values=values)

    def attend(self, h, memory, window):
        q = self.queries_to_state(h)
        recalled = self.attend_freely(q, memory.state_keys, memory.state_values)
        attended, weights = super().attend(h, memory, window)
        return torch.cat((attended, recalled), dim=1), weights

    def attend_freely(self, q, k, v, bias=None):
        """Attend without position bias and dropout."""
        return attend(q, k, v, bias, eager=self.config._attn_implementation == "eager")

    def last_state(self, memory, window):
        """Return the state after the last window, or the initial one: R n D."""
        is_first = window.windows_in_memory("long") == 0
        learned = self.initial_state.to(memory.state_vectors.dtype)
        return torch.where(is_first[:, None, None], learned, memory.state_vectors)

    def named_state(self, state):
        """Normalise the state and add the ids: the input of attention to and from it."""
        return self.state_layernorm(state) + self.state_ids

    def close(self, memory, summaries, window):
        new = self.next_state(memory, window)
        memory, summaries, loss = super().close(memory, summaries, window)
        return memory._replace(state_vectors=new), summaries, loss

    def next_state(self, memory, window):
        """Update the state after a full window: R n D."""
        state = self.last_state(memory, window)
        h = self.named_state(state)
        q = self.state_queries(h)
        in_state = self.attend_freely(q, memory.state_keys, memory.state_values)
        keys, values = (t[:, :, self.unread :] for t in (memory.keys, memory.values))
        filled = self.config.window_length + self.filled_slots(window)
        bias = self.self_attn.mask_empty(None, keys.shape[2], filled)
        in_tokens = self.attend_freely(self.state_queries_to_tokens(h), keys, values, bias)
        return self.state_update(state, merge_heads(torch.cat((in_state, in_tokens), dim=1)))

    def metrics(self, memory, windows_read):
        """Compute, in addition to the metric of the last window:

        gate_openness: the weight of the proposal in the gates; for gates that depend on the
            content, the weight that their biases alone give;
        state_rms: root mean square of the state, 0 before the first window is full;
        state_spread: root mean square of the differences of its vectors from their mean, divided
            by state_rms; 0 if all vectors are equal.
        """
        state = memory.state_vectors
        size, spread = mean_rms(state), mean_rms(state - state.mean(1, keepdim=True))
        openness = [gate.openness() for gate in self.state_update.gates()]
        return super().metrics(memory, windows_read) | {
            "gate_openness": sum(openness) / len(openness),
            "state_rms": size,
            "state_spread": spread / size.clamp(min=1e-6),
        }


class BlockRecurrentModel(DecoderModel):
    """A Block-Recurrent Transformer without its head."""

    config_class = BlockRecurrentConfig
    _no_split_modules = ["SlidingWindowLayer", "BlockRecurrentLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def make_layer(self, config, layer_idx):
        is_recurrent = layer_idx in config.recurrent_layers
        return (BlockRecurrentLayer if is_recurrent else SlidingWindowLayer)(config, layer_idx)

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise ids like embeddings, and the state and the gates with small numbers.

        Not with zeros: steps of Adafactor are proportional to the size of a parameter.
        """
        super()._init_weights(module)
        if isinstance(module, BlockRecurrentLayer):
            init.normal_(module.initial_state, std=0.1)
            init.normal_(module.state_ids, std=1.0)
        elif isinstance(module, FixedGate):
            init.normal_(module.bias, std=0.1)
        elif isinstance(module, GateLinear):
            init_truncated_(module.weight, (0.1 / module.in_features) ** 0.5)
            init.normal_(module.bias, std=0.1)


class BlockRecurrentForCausalLM(DecoderForCausalLM):
    """A Block-Recurrent Transformer as a language model."""

    config_class = BlockRecurrentConfig
    model_class = BlockRecurrentModel


register_auto_classes(BlockRecurrentModel, BlockRecurrentForCausalLM)
