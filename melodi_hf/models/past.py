"""The tokens that a call can look back to: remembered, of the open window, and its own.

    memory        [ k k k k k k k k k k ]        C tokens of closed windows, zeros before them
    open window                         [ k k k . ]    what was read of it before the call
    this call                                 [ k k k k k k k ]
    places         w-C              w-1  w ..  c ..            tokens of the document before each

A call never rewrites the memory: its windows look back to all three, and what is carried on is cut
out of them once, at the end of the call. So training holds the memory a few times, however many
windows a segment has.
"""

import torch

from .retrieval import NOWHERE, Source
from .tracing import is_traced


class Past:
    """What one layer can look back to in one call; no gradient reaches what is remembered."""

    def __init__(self, memory, opened, read, plan, window_length):
        """memory, opened, read: each a pair of keys and values, B H J K: of closed windows, of the
        open window, and of the call's tokens, row by row (`Plan.line_up`)."""
        self.memory = _detached(memory)
        # A copy: a cache may write over it before backward.
        self.opened = tuple(t.clone() for t in opened) if torch.is_grad_enabled() else opened
        self.read = read
        self.closed_ones = self.memory, _detached(self.opened), _detached(read)
        self.slots, self.window_length = memory[0].shape[2], window_length
        self.before, self.after = plan.tokens_before, plan.progress.tokens_read
        self.began = self.before - self.before % window_length  # where the open window did
        self.places = tuple(self._places(plan))

    def _places(self, plan):
        yield self._from(self.began - self.slots, self.slots)
        opened = self._from(self.began, self.opened[0].shape[2])
        yield opened.masked_fill(opened >= self.before[:, None], NOWHERE)
        read = self._from(self.before, plan.num_columns)
        yield read.masked_fill(read >= self.after[:, None], NOWHERE)

    def _from(self, first, count):
        return first[:, None] + torch.arange(count, device=first.device)

    def far(self, chunk):
        """Sources of all that windows closed before a chunk have left; without gradient."""
        least, most = chunk.begins
        gone = max(0, least - self.window_length + 1)  # slots that the chunk's window is beyond
        memory, opened, read = self.closed_ones
        return [
            self._source(memory, 0, min(gone, self.slots), self.slots),
            self._source(opened, 1, 0, self.window_length),
            self._source(read, 2, max(0, gone - self.slots), most),
        ]

    def near(self, chunk, windows):
        """Sources of the tokens of a chunk's window and the `windows` before it."""
        least, most = chunk.begins
        reach = windows * self.window_length
        first = max(0, least - self.window_length + 1 - reach)
        return [
            self._source(self.memory, 0, self.slots - reach, self.slots),
            self._source(self.opened, 1, 0, self.window_length),
            self._source(self.read, 2, first, most + chunk.tokens),
        ]

    def _source(self, pair, kind, first, last):
        keys, values = pair
        if first > 0 or last < keys.shape[2]:  # else the very tensors, which an index may know
            keys, values = keys[:, :, first:last], values[:, :, first:last]
        return Source(keys, values, self.places[kind][:, first:last])

    def closed(self, end, rows=None):
        """What a memory holds when the windows before the places `end` (R,) are closed.

        rows: which of the batch (R,), or None for all.
        """
        return self._cut(end - self.slots, self.slots, rows, self.closed_ones)

    def window(self, first, count, rows=None):
        """Keys and values of a window from the place `first` (R,) on; what was not read is
        anything."""
        return self._cut(first, count, rows, (self.opened, self.read))

    def _cut(self, first, count, rows, parts):
        rows = torch.arange(first.shape[0], device=first.device) if rows is None else rows
        wanted, before = self._from(first, count), self.before[rows, None]
        held = sum(keys.shape[2] for keys, _ in parts[:-1])
        skipped = held - self.opened[0].shape[2]  # slots of the memory, if it is among the parts
        slot = wanted - self.began[rows, None] + skipped
        column = (wanted - before).clamp(max=self.read[0].shape[2] - 1)
        slot = torch.where(wanted < before, slot, held + column)[:, None]  # R 1 count
        heads = torch.arange(self.read[0].shape[1], device=first.device)[:, None]
        for tensors in zip(*parts, strict=True):
            joined = torch.cat([tensor.to(tensors[-1].dtype) for tensor in tensors], dim=2)
            yield joined[rows[:, None, None], heads, slot]


def _detached(pair):
    # The very tensors where that is the same, which an index may know; a tangent shows nowhere.
    return tuple(t.detach() if t.requires_grad or is_traced() else t for t in pair)
