"""MELODI: exploring memory compression for long contexts (Chen et al., ICLR 2025).

A window of W tokens is read with U summary tokens behind it. In every layer the window attends to
S tokens that the window before left in that layer (short-term memory); its outputs are mixed along
the token axis into the summary tokens of the next layer and the short-term memory of the next
window. One layer in the middle also appends L tokens to a queue (long-term memory) and attends to
it with the same queries through a gate (paper, sections 3.1 to 3.4):

                     layer n+1                         [ x x x x x x x x | u u ]
                                                         ^ unchanged       ^ mixed
    short memory k-1 [ z z ] <- attends - window k     [ x x x x x x x x | u u ] - mixed -> [ z z ]
    queue            [ m m m m m m ] <- gate -                                   - mixed -> append m

    z_k   = Mix_S(x, u)          m_k = Mix_L(x, u)          u' = Mix_U(x, u)
    A     = g ⊙ A_self + (1 - g) ⊙ A_queue,                g = sigmoid(gate), per head and channel

Where paper and released code differ this is the code: tokens never attend to themselves; the gate
is per head and channel and weights the self-attention; a mixer normalises its inputs and adds the
summary tokens only if it has as many outputs as there are summary tokens (the queue's never does);
empty memory is zeros that are attended to (`mask_empty_memory` hides it, as in the paper); between
segments of training the queue holds tokens, which are projected with the current weights. During
generation it holds keys and values.

Tokens never see the summary tokens of their own window: these are run once, when the window is
full, and reading a window in pieces is exact.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_melodi import MelodiConfig
from .decoder import DecoderForCausalLM, DecoderModel, register_auto_classes
from .layer import Field, MemoryLayer
from .modules import Attention, RMSNorm, mean_rms
from .windows import append_fifo


class MelodiMemory(NamedTuple):
    """Memory of a layer.

    Training holds the queue as tokens, generation as keys and values (and tokens, if its memory was
    converted from that of training). The last three have no slots between two windows.
    """

    short: Any  # B S D
    long_tokens: Any  # B M D, oldest first
    long_keys: Any  # B H M K
    long_values: Any  # B H M K
    keys: Any  # B H S+w K, of the short-term memory and the w tokens of the open window
    values: Any  # B H S+w K
    outputs: Any  # B w D, tokens after the layer: inputs of the mixers

    @property
    def long(self) -> Tensor:
        """The earlier name of `long_tokens`."""
        return self.long_tokens


class TokenMixer(nn.Module):
    """Make tokens from a whole window by a matrix along the token axis."""

    def __init__(self, config, num_outputs):
        super().__init__()
        self.mix = nn.Linear(config.window_length + config.num_summary_tokens, num_outputs)

    def forward(self, x, summaries):
        # B W D, B U D -> B num_outputs D
        return self.mix(torch.cat((x, summaries), dim=1).transpose(1, 2)).transpose(1, 2)


class NormalisedTokenMixer(TokenMixer):
    """A mixer with as many outputs as summary tokens.

    It normalises its inputs and adds its outputs to the summary tokens.
    """

    def __init__(self, config):
        super().__init__(config, config.num_summary_tokens)
        self.token_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.summary_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, summaries):
        return summaries + super().forward(self.token_norm(x), self.summary_norm(summaries))


class IdentityMixer(nn.Module):
    """Return the summary tokens unchanged."""

    def forward(self, x, summaries):
        return summaries


class EmptyMixer(nn.Module):
    """Return no tokens."""

    def forward(self, x, summaries):
        return summaries[:, :0]


def make_short_mixer(config):
    """Make the mixer whose outputs are the short-term memory of the next window."""
    if config.num_short_memory_tokens == 0:
        return EmptyMixer()
    if not config.mix_tokens:
        return IdentityMixer()
    if config.num_short_memory_tokens == config.num_summary_tokens:
        return NormalisedTokenMixer(config)
    return TokenMixer(config, config.num_short_memory_tokens)


def make_summary_mixer(config, is_long):
    """Make the mixer of the next layer's summary tokens. Without short-term memory the released
    code mixes them in long-term layers alone."""
    mixes = config.mix_tokens and config.num_summary_tokens > 0
    has_mixer = mixes and (config.num_short_memory_tokens > 0 or is_long)
    return NormalisedTokenMixer(config) if has_mixer else IdentityMixer()


class MelodiLayer(MemoryLayer):
    """A layer with short-term memory."""

    long_length = 0

    def __init__(self, config, layer_idx):
        short = config.num_short_memory_tokens
        super().__init__(config, Attention(config, num_slots=short, always_sees=short > 0))
        is_long = layer_idx in config.long_memory_layers
        self.summary_mixer = make_summary_mixer(config, is_long)
        self.short_mixer = make_short_mixer(config)

    def memory_fields(self):
        config, hidden, short = (
            self.config,
            self.config.hidden_size,
            self.config.num_short_memory_tokens,
        )
        heads, per_head, window = config.num_attention_heads, config.head_dim, config.window_length
        queue, pushed = self.long_length, config.num_long_memory_tokens if self.long_length else 0
        keys = Field((heads, short + window, per_head), window_axis=2)
        source = ("long_tokens",) if queue else ()
        long_keys = Field(
            (heads, queue, per_head), "long", pushed, projected_from=source, held_in="generation"
        )
        return MelodiMemory(
            short=Field((short, hidden), "short", short),
            long_tokens=Field((queue, hidden), "long", pushed, held_in="training"),
            long_keys=long_keys,
            long_values=long_keys,
            keys=keys,
            values=keys,
            outputs=Field((window, hidden), window_axis=1),
        )

    def recall(self, memory, window):
        keys, values = self.project(memory.short)
        return memory._replace(keys=keys, values=values)

    def attend(self, h, memory, window):
        return self.attend_window(self.self_attn.queries(h), memory, window)

    def attend_window(self, q, memory, window):
        """Attend to the short-term memory and the window."""
        filled = (window.windows_in_memory("short") > 0) * self.config.num_short_memory_tokens
        return self.self_attn(q, memory.keys, memory.values, filled, window)

    def close(self, memory, summaries, window):
        short = self.short_mixer(memory.outputs, summaries)
        mixed = self.summary_mixer(memory.outputs, summaries)
        return memory._replace(short=short), mixed, None

    def metrics(self, memory, windows_read):
        """short_memory_rms: root mean square of the short-term memory."""
        has_short = self.config.num_short_memory_tokens > 0
        return {"short_memory_rms": mean_rms(memory.short)} if has_short else {}


class LongTermMelodiLayer(MelodiLayer):
    """A layer with short-term and long-term memory."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        pushed = config.num_long_memory_tokens
        self.long_mixer = TokenMixer(config, pushed) if pushed else EmptyMixer()

    @property
    def long_length(self):  # type: ignore[override]
        return self.config.long_memory_length

    def attend(self, h, memory, window):
        q = self.self_attn.queries(h)
        attended, weights = self.attend_window(q, memory, window)
        filled = self.filled_slots(window.windows_in_memory("long"))
        remembered = self.self_attn.attend_slots(q, memory.long_keys, memory.long_values, filled)
        gate = self.gate.sigmoid()[:, None].to(attended.dtype)
        return torch.lerp(remembered, attended, gate.expand_as(attended)), weights

    def filled_slots(self, windows_read):
        """Slots of the queue that hold a token."""
        pushed = windows_read * self.config.num_long_memory_tokens
        return pushed.clamp(max=self.long_length)

    def close(self, memory, summaries, window):
        pushed = self.long_mixer(memory.outputs, summaries)
        keys, values = self.project(pushed)
        queues = {
            "long_tokens": append_fifo(memory.long_tokens, pushed, 1),
            "long_keys": append_fifo(memory.long_keys, keys, 2),
            "long_values": append_fifo(memory.long_values, values, 2),
        }
        return super().close(memory._replace(**queues), summaries, window)

    def metrics(self, memory, windows_read):
        """Compute, besides those of the short-term memory:

        gate_openness: 1 - g, the share of the queue in the output of attention;
        queue_fill: the share of the queue's slots that hold a token;
        queue_rms: root mean square of these tokens.
        """
        filled = self.filled_slots(windows_read)  # B
        filled_share = (filled / self.long_length)[:, None, None]
        tokens = memory.long_tokens.float() * filled_share.clamp(min=1 / self.long_length).rsqrt()
        return super().metrics(memory, windows_read) | {
            "gate_openness": 1 - self.gate.sigmoid().mean(),
            "queue_fill": filled_share.mean(),
            "queue_rms": mean_rms(tokens),
        }


class MelodiModel(DecoderModel):
    """MELODI without its head."""

    config_class = MelodiConfig
    _no_split_modules = ["MelodiLayer", "LongTermMelodiLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        shape = config.num_summary_tokens, config.hidden_size
        self.summary_embeddings = nn.Parameter(torch.empty(shape))
        self.post_init()

    def make_layer(self, config, layer_idx):
        is_long = layer_idx in config.long_memory_layers
        return (LongTermMelodiLayer if is_long else MelodiLayer)(config, layer_idx)

    def first_summaries(self, x, num_closing):
        return self.summary_embeddings.to(x.dtype).expand(num_closing, -1, -1)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Normal with deviation 1/4, cut at two of them, not rescaled.
        for name in ("summary_embeddings", "gate"):
            if name in module._parameters:
                init.trunc_normal_(module._parameters[name], std=0.25, a=-0.5, b=0.5)


class MelodiForCausalLM(DecoderForCausalLM):
    """MELODI as a language model."""

    config_class = MelodiConfig
    model_class = MelodiModel


register_auto_classes(MelodiModel, MelodiForCausalLM)
