"""A layer whose tokens attend to the W tokens before each, in this window and the last one.

    memory of window k-1   [ k v k v k v k v ]
    window k               [ x x x x x x x x ]   x_i sees memory i..W and x_0..x_{i-1}
    memory of window k     the keys and values of its own tokens

At the beginning of a document the memory is zeros, which are attended to unless
`mask_empty_memory` is set. `tokens_carried` of the configuration is the length of the memory.
"""

from typing import Any, NamedTuple

from .layer import Field, MemoryLayer
from .modules import Attention, mean_rms


class WindowMemory(NamedTuple):
    """Keys (of length one) and values of the last window, and of the w tokens of the open one."""

    keys: Any  # B H W+w K
    values: Any  # B H W+w K


class SlidingWindowLayer(MemoryLayer):
    """A layer whose tokens attend to the W tokens before each.

    attention: the class of its attention.
    """

    def __init__(self, config, layer_idx, attention=Attention):
        past = self.past = config.tokens_carried
        sizes = {"num_slots": past, "token_slots": past, "furthest": config.window_length}
        super().__init__(config, attention(config, always_sees=past > 0, **sizes))

    def memory_fields(self):
        return WindowMemory(*[window_field(self.config, self.config.tokens_carried)] * 2)

    def attend(self, h, memory, window):
        q = self.self_attn.queries(h)
        return self.self_attn(q, memory.keys, memory.values, self.filled_slots(window), window)

    def filled_slots(self, window):
        """Count the slots of the last window that are filled in each row (R,)."""
        return (window.windows_in_memory("short") > 0) * self.past

    def close(self, memory, summaries, window):
        length = self.config.window_length
        keys, values = (t.narrow(2, length, self.past) for t in (memory.keys, memory.values))
        return memory._replace(keys=keys, values=values), summaries, None

    def metrics(self, memory, windows_read):
        """Compute memory_rms: root mean square of the values of the last window."""
        return {"memory_rms": mean_rms(memory.values)} if self.past else {}


class ClearedWindowLayer(SlidingWindowLayer):
    """A `SlidingWindowLayer` whose memory is emptied after every `context_windows` windows."""

    def filled_slots(self, window):
        since = window.windows_read % self.config.context_windows
        return super().filled_slots(window) * (since > 0)


def window_field(config, past):
    """Describe keys or values of the open window and the `past` tokens before it."""
    shape = config.num_attention_heads, past + config.window_length, config.head_dim
    return Field(shape, "short", past, window_axis=2, between=past)
