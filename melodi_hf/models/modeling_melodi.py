"""MELODI: exploring memory compression for long contexts (Chen et al., ICLR 2025).

A window of W tokens is read with U summary tokens behind it. In every layer the window attends to
S tokens that the window before left in that layer (short-term memory); what comes out is mixed
along the token axis into the summary tokens of the next layer and the short-term memory of the
next window. One layer in the middle also pushes L tokens into a queue (long-term memory) and
attends to it with the same queries through a gate (paper, sections 3.1 to 3.4):

                     layer n+1                         [ x x x x x x x x | u u ]
                                                         ^ as they are     ^ mixed
    short memory k-1 [ z z ] <- attends - window k     [ x x x x x x x x | u u ] - mixed -> [ z z ]
    queue            [ m m m m m m ] <- gate -                                   - mixed -> push m

    z_k   = Mix_S(x, u)          m_k = Mix_L(x, u)          u' = Mix_U(x, u)
    A     = g ⊙ A_self + (1 - g) ⊙ A_queue,                g = sigmoid(gate), per head and channel

Where paper and released code differ this is the code: tokens never attend to themselves; the gate
is per head and channel and stands at the self-attention; a mixer normalises its inputs and adds
the summary tokens only if it has as many outputs as there are summary tokens (the queue's never
does); empty memory is zeros that are attended to (`mask_empty_memory` hides it, as the paper has
it); between segments of training the queue keeps tokens, projected anew with the weights of the
day. During generation it keeps keys and values.

Context tokens never see the summary tokens of their own window: these are run once, when the
window is full, and reading a window in pieces is exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, merge_heads
from .attention_map import AttentionMap
from .configuration_melodi import MelodiConfig
from .decoder import DecoderForCausalLM, DecoderLayer, DecoderModel, FeedForward, make_known
from .generation import MemoryGenerationMixin
from .norm import RMSNorm, mean_size
from .windows import slide


class MelodiMemory(NamedTuple):
    """What a layer carries. Training holds the queue as tokens and has no slots for its keys and
    values; generation holds keys and values, and tokens only if its memory was converted from that
    of training. The last three belong to the open window, w of whose tokens are read; they have no
    slots while w = 0."""

    short: Tensor  # B S D
    long_tokens: Tensor  # B M D, oldest first
    long_keys: Tensor  # B H M K
    long_values: Tensor  # B H M K
    keys: Tensor  # B H S+w K, of the short-term memory and the tokens
    values: Tensor  # B H S+w K
    outputs: Tensor  # B w D, tokens after the layer: what will be mixed

    @property
    def long(self):
        """The earlier name of `long_tokens`."""
        return self.long_tokens


class TokenMixer(nn.Module):
    """Tokens of a window, made from all of it by a matrix along the token axis."""

    def __init__(self, config, num_outputs):
        super().__init__()
        tokens = config.window_length + config.num_summary_tokens
        self.mix = nn.Linear(tokens, num_outputs)

    def forward(self, h, num_tokens):
        # h: B W+U D, of which num_tokens = W -> B num_outputs D
        return self.mix(h.transpose(1, 2)).transpose(1, 2)


class NormalisedTokenMixer(TokenMixer):
    """A mixer with as many outputs as summary tokens: it normalises its inputs and refines the
    summary tokens instead of replacing them."""

    def __init__(self, config):
        super().__init__(config, config.num_summary_tokens)
        self.token_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.summary_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, h, num_tokens):
        x, u = h.split((num_tokens, h.shape[1] - num_tokens), dim=1)
        normed = torch.cat((self.token_norm(x), self.summary_norm(u)), dim=1)
        return u + super().forward(normed, num_tokens)


class KeepSummaries(nn.Module):
    """No branching: the summary tokens go on as they are."""

    def forward(self, h, num_tokens):
        return h[:, num_tokens:]


class KeepNothing(nn.Module):
    """Nothing stays of the window."""

    def forward(self, h, num_tokens):
        return h[:, :0]


def short_mixer(config):
    """The way from a window to the short-term memory of the next."""
    if config.num_short_memory_tokens == 0:
        return KeepNothing()
    if not config.mix_tokens:
        return KeepSummaries()
    if config.num_short_memory_tokens == config.num_summary_tokens:
        return NormalisedTokenMixer(config)
    return TokenMixer(config, config.num_short_memory_tokens)


def summary_mixer(config, is_long):
    """The way from a layer's summary tokens to the next layer's. Without short-term memory the
    released code mixes them in long-term layers alone."""
    mixes = config.mix_tokens and config.num_summary_tokens > 0
    if mixes and (config.num_short_memory_tokens > 0 or is_long):
        return NormalisedTokenMixer(config)
    return KeepSummaries()


class MelodiLayer(DecoderLayer):
    """A layer with short-term memory."""

    memory_type = MelodiMemory
    window_axis = {"keys": 2, "values": 2, "outputs": 1}  # noqa: RUF012
    changed_by_closing = ("short", "long_tokens", "long_keys", "long_values")
    kinds = {  # noqa: RUF012
        "short": ("short",),
        "long": ("long_tokens", "long_keys", "long_values"),
    }
    long_length = 0
    stacks = FeedForward, TokenMixer, NormalisedTokenMixer, KeepSummaries, KeepNothing
    own_fields = ("long_tokens", "long_keys", "long_values")

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.num_short = config.num_short_memory_tokens
        self.num_summaries = config.num_summary_tokens
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, always_sees=config.num_short_memory_tokens > 0)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.summary_mixer = summary_mixer(config, is_long=layer_idx in config.long_memory_layers)
        self.short_mixer = short_mixer(config)
        self.attention_map = AttentionMap(config.num_short_memory_tokens, 0)

    def memory_shapes(self, for_generation=False):
        config, queue = self.config, self.long_length
        heads, per_head = config.num_attention_heads, config.head_dim
        short, hidden = config.num_short_memory_tokens, config.hidden_size
        window = config.window_length if for_generation else 0
        as_keys, as_tokens = (queue, 0) if for_generation else (0, queue)
        slots = short + window if for_generation else 0
        return {
            "short": (short, hidden),
            "long_tokens": (as_tokens, hidden),
            "long_keys": (heads, as_keys, per_head),
            "long_values": (heads, as_keys, per_head),
            "keys": (heads, slots, per_head),
            "values": (heads, slots, per_head),
            "outputs": (window, hidden),
        }

    def slots_per_window(self):
        short, pushed = self.config.num_short_memory_tokens, self.config.num_long_memory_tokens
        return {"short": short, "long": pushed if self.long_length else 0}

    def forward(self, x, summaries, *memory, plan):
        # x: B T D; summaries: lanes C U D, C the windows that close in this call
        num_summaries = self.num_summaries
        h = plan.pack(x, summaries)
        normed = self.dropout(self.input_layernorm(h))
        q, (k, v) = self.self_attn.queries(normed), self.self_attn.keys_values(normed)
        given = MelodiMemory(*memory)
        parts = (plan.split(t, dim, num_summaries) for t, dim in ((h, 1), (q, 2), (k, 2), (v, 2)))
        pieces, memory = self.read_chunks(plan, self.open(given), *parts)
        x, summaries = plan.unpack(pieces, num_summaries)
        return x, summaries, *self.shut(memory, given)

    def position_bias(self, chunk):
        """H T J or B H T J, for the chunk's queries towards [short memory | window | summaries]."""
        return chunk.bias(self.self_attn.bias_by_distance, self.num_short, self.num_summaries)

    def read(self, chunk, bias, memory, h, q, k, v):
        """One cell: a chunk of one window through one layer.

        h: B T D, its tokens and, if it closes its window, the summary tokens; q, k, v: B H T K, its
        projections -> B T D, the next memory.
        """
        num_short = self.num_short
        keys, values = chunk.begin(
            (memory.keys, memory.values), lambda: self.recall(memory.short), 2, num_short
        )
        keys, values = chunk.extend(keys, k, dim=2), chunk.extend(values, v, dim=2)
        filled = (chunk.windows_held("short") > 0) * num_short
        attended = self.self_attn(
            q, keys, values, bias, num_short, filled, chunk.in_order, chunk.weights
        )
        attended = self.consult_queue(q, attended, memory, chunk)
        h = h + self.self_attn.o_proj(merge_heads(attended))
        h = h + self.dropout(self.mlp(self.post_attention_layernorm(h)))
        outputs = chunk.extend(*chunk.so_far((memory.outputs,), 1), h, dim=1)
        memory = memory._replace(
            keys=chunk.trim(keys, 2, num_short),
            values=chunk.trim(values, 2, num_short),
            outputs=chunk.trim(outputs, 1),
        )
        return self.close(h, outputs, memory, chunk) if chunk.closes else (h, memory)

    def recall(self, tokens):
        """Keys and values of remembered tokens: B J D -> two of B H J K."""
        if tokens.shape[1] == 0:  # which not every kind of linear layer takes
            heads, per_head = self.config.num_attention_heads, self.config.head_dim
            none = tokens.new_empty(tokens.shape[0], heads, 0, per_head)
            return none, none
        return self.self_attn.keys_values(self.dropout(self.input_layernorm(tokens)))

    def close(self, h, outputs, memory, chunk):
        """The window is full (`outputs`: B W+U D): mix what stays of it."""
        chunk.remember(memory)
        memory, length = self.push(outputs, memory, chunk), self.config.window_length
        summaries = self.summary_mixer(outputs, length)
        short = chunk.where_closed(self.short_mixer(outputs, length), memory.short)
        h = torch.cat((h[:, : chunk.tokens], summaries), dim=1)
        return h, memory._replace(
            short=short,
            keys=chunk.emptied(memory.keys, 2),
            values=chunk.emptied(memory.values, 2),
            outputs=chunk.emptied(memory.outputs, 1),
        )

    def consult_queue(self, q, attended, memory, chunk):
        """Long-term memory has its turn."""
        return attended

    def push(self, outputs, memory, chunk):
        """Long-term memory takes what it wants of a full window (`outputs`: B W+U D)."""
        return memory

    def figures(self, memory, windows_read):
        """short_memory_rms: the size of the short-term memory's numbers."""
        if self.config.num_short_memory_tokens == 0:
            return {}
        return {"short_memory_rms": mean_size(memory.short)}


class LongTermMelodiLayer(MelodiLayer):
    """A layer with short-term and long-term memory."""

    needed_in_training = ("long_tokens",)
    own_steps = ("consult_queue", "push")
    own_parts = ("gate", "long_mixer")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        pushed = config.num_long_memory_tokens
        self.long_mixer = TokenMixer(config, pushed) if pushed else KeepNothing()

    @property
    def long_length(self):  # type: ignore[override]
        return self.config.long_memory_length

    def open(self, memory):
        # In training the tokens are projected anew: gradients reach the weights, not the tokens.
        if memory.long_keys.shape[2]:
            return memory
        keys, values = self.recall(memory.long_tokens)
        return memory._replace(long_keys=keys, long_values=values)

    def shut(self, memory, given):
        if given.long_keys.shape[2] == self.long_length:
            return memory
        # Not the part of a longer queue that `slide` made: FSDP warns of parts.
        tokens = memory.long_tokens.clone(memory_format=torch.contiguous_format)
        return memory._replace(
            long_tokens=tokens, long_keys=given.long_keys, long_values=given.long_values
        )

    def to_generation(self, memory):
        return super().to_generation(self.open(memory))

    def to_training(self, memory, fill):
        none = memory.long_keys[:, :, :0]
        return super().to_training(memory._replace(long_keys=none, long_values=none), fill)

    def filled_slots(self, windows_read):
        pushed = windows_read * self.config.num_long_memory_tokens
        return pushed.clamp(max=self.long_length)

    def consult_queue(self, q, attended, memory, chunk):
        slots, filled = self.long_length, self.filled_slots(chunk.windows_held("long"))
        remembered = self.self_attn(q, memory.long_keys, memory.long_values, None, slots, filled)
        gate = self.gate.sigmoid()[:, None].to(attended.dtype)
        return torch.lerp(remembered, attended, gate.expand_as(attended))

    def figures(self, memory, windows_read):
        """Besides those of the short-term memory:

        gate_openness: 1 - g, the share of attention's output that comes from the queue;
        queue_fill: the part of the queue's slots that hold a token;
        queue_rms: the size of these tokens' numbers.
        """
        filled = self.filled_slots(windows_read)  # B
        fill = (filled / self.long_length)[:, None, None]
        tokens = memory.long_tokens.float() * fill.clamp(min=1 / self.long_length).rsqrt()
        return super().figures(memory, windows_read) | {
            "gate_openness": 1 - self.gate.sigmoid().mean(),
            "queue_fill": fill.mean(),
            "queue_rms": mean_size(tokens),
        }

    def push(self, outputs, memory, chunk):
        pushed = self.long_mixer(outputs, self.config.window_length)
        keys, values = self.recall(pushed)

        def behind(queue, new, dim):
            return chunk.where_closed(slide(queue, new, dim), queue)

        return memory._replace(
            long_tokens=behind(memory.long_tokens, pushed, 1),
            long_keys=behind(memory.long_keys, keys, 2),
            long_values=behind(memory.long_values, values, 2),
        )


class MelodiModel(DecoderModel):
    """MELODI without its head."""

    config_class = MelodiConfig
    _no_split_modules = ["MelodiLayer", "LongTermMelodiLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MelodiLayer,
        "attentions": OutputRecorder(AttentionMap, index=0),
    }

    def __init__(self, config):
        super().__init__(config)
        shape = config.num_summary_tokens, config.hidden_size
        self.summary_embeddings = nn.Parameter(torch.empty(shape))
        self.post_init()

    def make_layer(self, config, layer_idx):
        is_long = layer_idx in config.long_memory_layers
        return (LongTermMelodiLayer if is_long else MelodiLayer)(config, layer_idx)

    def streams(self, x, plan):
        # Summary tokens ride with each window that closes: lanes C U D
        summaries = self.summary_embeddings.to(x.dtype)
        return x, summaries.expand(plan.lanes, plan.num_closing, -1, -1)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_melodi(module)


class MelodiForCausalLM(DecoderForCausalLM, MemoryGenerationMixin):
    """MELODI as a language model."""

    config_class = MelodiConfig
    model_class = MelodiModel
    _no_split_modules = ["MelodiLayer", "LongTermMelodiLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_melodi(module)


def init_melodi(module):
    """Summary tokens and gates: normal with deviation 1/4, cut at two of them, not rescaled."""
    for name in ("summary_embeddings", "gate"):
        if name in module._parameters:
            init.trunc_normal_(module._parameters[name], std=0.25, a=-0.5, b=0.5)


make_known(MelodiModel, MelodiForCausalLM)
