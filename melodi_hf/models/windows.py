"""How the columns of one call fall into windows, row by row.

Windows are anchored at the first real token of each row and counted in its real tokens. A call is
cut into *chunks*: the first continues the window that is open, each later one begins the next. A
chunk that fills its window closes it, and there the summary tokens, if a model has any, follow:

    columns     x x x | x x x x x x x x | x x x x x      window_length 8, 5 tokens read before
    chunk       0     | 1               | 2
    closes      yes   | yes             | no
    packed      x x x u u | x x x x x x x x u u | x x x x x

If all rows stand at the same place (training, one document, equal prompts), chunks are slices and
nothing depends on the content of a tensor: that is `Plan`. If they do not, each chunk takes only
the rows that have something to read: first what is left of windows that are open, then whole
windows, then what is left of the rows. A row that has ended costs nothing; that is `RaggedPlan`,
in `ragged`.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .position import spread_by_distance


class Progress(NamedTuple):
    """How far each row has read its document."""

    tokens_read: Tensor  # B, int64
    fill: int | None  # tokens of the open window if all rows are known to hold as many, else None
    # Kind of memory -> B, the oldest windows that were taken out of it.
    forgotten: dict[str, Tensor] = {}  # noqa: RUF012
    # Whether the next call is known to have one token, which begins and closes no row's window.
    within: bool = False

    def restart(self, rows):
        """The rows of a mask (B,) begin a new document."""
        rows = rows.to(self.tokens_read.device)
        tokens_read = self.tokens_read.masked_fill(rows, 0)
        forgotten = {kind: count.masked_fill(rows, 0) for kind, count in self.forgotten.items()}
        return Progress(tokens_read, 0 if self.fill == 0 else None, forgotten)


class Chunk:
    """Tokens of one call that belong to one window, of rows that stand at the same slot of it.

    tokens: how many; fill: slots of the window that were read before; closes: whether the chunk
    completes it; tokens_read (R,): tokens of the document before the chunk; rows: which of the
    batch (R,), or None for all.
    """

    in_order = True  # queries are the last of the keys

    def __init__(self, tokens, fill, tokens_read, window_length, rows=None):
        self.tokens, self.fill, self.rows = tokens, fill, rows
        self.closes = bool(fill + tokens == window_length)
        self.tokens_read, self.window_length = tokens_read, window_length
        # Which token of its row's in this call is the first of the chunk: the least and the most.
        self.begins = (0, 0)
        self.forgotten: dict[str, Tensor] = {}  # as in `Progress`, R
        self.snapshots: list | None = None  # of the memory, and
        self.weights: list | None = None  # of attention: layer by layer, if somebody asks

    @property
    def pattern(self):
        """Chunks of one call with equal patterns have equal position biases: whole windows."""
        return "window" if self.closes and self.fill == 0 else id(self)

    @property
    def windows_read(self):
        """Windows that each row has closed before this chunk (R,)."""
        return self.tokens_read // self.window_length

    def windows_held(self, kind):
        """The latest of them, of which a memory of this kind may hold something (R,)."""
        return self.windows_read - self.forgotten.get(kind, 0)

    @property
    def end(self):
        """Tokens that each row has read after this chunk (R,)."""
        return self.tokens_read + self.tokens

    @property
    def closing(self):
        """The rows whose window closes here, a mask (R,)."""
        return torch.full_like(self.tokens_read, self.closes, dtype=torch.bool)

    def run(self, cell, changed, bias, memory, *parts):
        """One cell, `cell(chunk, bias, memory, *parts) -> (output, memory)`, for the chunk's rows.

        changed: names of the memory's fields that differ when a window was closed; bias: gives a
        chunk its position bias (`PositionBiases`).
        """
        bias = bias(self)
        if self.rows is None:
            return cell(self, bias, memory, *parts)
        chosen = type(memory)(*(tensor.index_select(0, self.rows) for tensor in memory))
        output, new = cell(self, bias, chosen, *parts)
        fields = (
            old if part is same else put_rows(old, part, self.rows)
            for old, same, part in zip(memory, chosen, new, strict=True)
        )
        return output, type(memory)(*fields)

    def remember(self, memory):
        """The memory as a window is full and not closed yet, if anybody will come back to it."""
        if self.snapshots is not None:
            self.snapshots.append(memory)

    def so_far(self, held, dim, offset=0):
        """What the window holds, behind `offset` slots along `dim` that are not its own; a tuple of
        tensors, as `held`."""
        return tuple(tensor.narrow(dim, 0, offset + self.fill) for tensor in held)

    def begin(self, held, fresh, dim, offset):
        """The same where the first `offset` slots are made when the window begins: by `fresh()`,
        which is better not called without need."""
        return fresh() if self.fill == 0 else self.so_far(held, dim, offset)

    def where_opened(self, held, fresh):
        """What stays the same throughout a window: `fresh()` in the rows whose window begins here,
        else `held`; both are tuples of tensors."""
        return fresh() if self.fill == 0 else held

    def extend(self, held, new, dim):
        """Write the chunk's tokens (and the summary tokens that follow them) behind `held`."""
        return torch.cat((held.to(new.dtype), new), dim) if held.shape[dim] else new

    def trim(self, extended, dim, offset=0):
        """`extended` without the summary tokens."""
        return extended.narrow(dim, 0, offset + self.fill + self.tokens)

    def emptied(self, held, dim):
        """What a window holds after it was closed: nothing, and nothing kept alive by a view."""
        return held.new_empty(resize(held, dim, 0))

    def where_closed(self, new, old):
        """`new` in the rows whose window closes here, else `old`."""
        return new

    def bias(self, by_distance, offset, num_summary_tokens):
        """Bias of all queries of the chunk towards [`offset` memory slots | window | summaries].

        by_distance: distances in tokens (any shape) -> biases (H, that shape).
        Returns H T J, T counting the summary tokens.
        """
        queries = self.tokens + self.closes * num_summary_tokens
        return banded_bias(by_distance, queries, offset + self.fill + queries, self.tokens_read)

    def bias_before(self, by_distance, before):
        """Bias of the chunk's tokens towards slots that lie `before` (M,) tokens before the window:
        H T M."""
        place = self.fill + torch.arange(self.tokens, device=before.device)
        return by_distance(place[:, None] + before)


class WritingChunk(Chunk):
    """A chunk that leaves its window open and writes behind what that holds, in place: a token of
    generation would otherwise copy the window in every layer. Slots behind what was read are never
    looked at, so whoever still has the memory before this chunk sees no difference."""

    def so_far(self, held, dim, offset=0):
        return held

    def extend(self, held, new, dim):
        first = held.shape[dim] - self.window_length + self.fill
        if held.dtype != new.dtype or is_sealed(held):
            return super().extend(held.narrow(dim, 0, first), new, dim)
        held.narrow(dim, first, self.tokens).copy_(new)
        return held.narrow(dim, 0, first + self.tokens)


class Plan:
    """The chunks of one call in which all rows stand at the same slot."""

    def __init__(self, progress, num_columns, window_length, in_place=False):
        # in_place: whether the memory may be written to
        self.num_columns = num_columns
        self.chunks = list(self._cut(progress, num_columns, window_length, in_place))
        self.tokens_before = progress.tokens_read  # of each row's document, B
        tokens_read = progress.tokens_read + num_columns
        self.progress = Progress(tokens_read, (progress.fill + num_columns) % window_length)
        self.lanes = tokens_read.shape[0]  # rows of what is packed

    def _cut(self, progress, num_columns, window_length, in_place):
        fill, done = progress.fill, 0
        while done < num_columns:
            room, left = window_length - fill, num_columns - done
            tokens = left if left < room else room  # a branch, where min() gives an expression
            goes_on = in_place and 0 < fill < window_length - tokens  # in a window that stays open
            kind = WritingChunk if goes_on else Chunk
            chunk = kind(tokens, fill, progress.tokens_read + done, window_length)
            chunk.begins = (done, done)
            yield chunk
            fill, done = 0, done + tokens

    @property
    def num_closing(self):
        """Windows of a lane that may close in this call."""
        return sum(chunk.closes for chunk in self.chunks)

    def part(self, chunks):
        """Some chunks, one after the other, as a call of their own."""
        part, last = copy.copy(self), chunks[-1]
        part.chunks, part.tokens_before = chunks, chunks[0].tokens_read
        part.num_columns = sum(chunk.tokens for chunk in chunks)
        fill = (last.fill + last.tokens) % last.window_length
        part.progress = self.progress._replace(tokens_read=last.end, fill=fill)
        return part

    def leave_out(self, forgotten):
        """Tell the chunks, and who reads on, what was taken out of the memory."""
        # Not by _replace, whose result torch 2.9 cannot return from a graph.
        tokens_read, fill, _, within = self.progress
        self.progress = Progress(tokens_read, fill, forgotten, within)
        for chunk in self.chunks:
            rows = slice(None) if chunk.rows is None else chunk.rows
            chunk.forgotten = {kind: count[rows] for kind, count in forgotten.items()}

    def record(self):
        """Have the chunks remember what a call that goes back would need."""
        for chunk in self.chunks:
            chunk.snapshots = []

    def keep_weights(self):
        """Have the chunks that have tokens keep the weights of attention."""
        for chunk in self.chunks:
            chunk.weights = [] if chunk.tokens else None

    def pack_tokens(self, x):
        """B T D in the caller's columns -> lanes, tokens of all chunks, D."""
        return x

    def unpack_tokens(self, packed):
        """The way back; columns without a token are zero."""
        return packed

    def line_up(self, packed, dim):
        """What was packed along `dim`, as B rows whose tokens precede their padding."""
        return packed

    def pack(self, x, summaries):
        """x: B T D; summaries: lanes C U D, C = `num_closing` -> tokens and summaries, packed."""
        tokens = self.split(self.pack_tokens(x), 1)
        following = iter(self.split_summaries(summaries))
        return self.join(
            [
                torch.cat((piece, next(following)), dim=1) if chunk.closes else piece
                for chunk, piece in zip(self.chunks, tokens, strict=True)
            ],
            1,
        )

    def unpack(self, pieces, num_summary_tokens):
        """The way back, from one tensor per chunk."""
        tokens, summaries = [], []
        for chunk, piece in zip(self.chunks, pieces, strict=True):
            x, u = piece.split((chunk.tokens, chunk.closes * num_summary_tokens), dim=1)
            tokens.append(x)
            summaries += [u] if chunk.closes else []
        none = tokens[0].new_empty(self.lanes, 0, num_summary_tokens, tokens[0].shape[-1])
        return (
            self.unpack_tokens(self.join(tokens, 1)),
            self.join_summaries(summaries) if summaries else none,
        )

    def split(self, packed, dim, num_summary_tokens=0):
        """One piece per chunk of what was packed, the chunk's rows first."""
        sizes = [chunk.tokens + chunk.closes * num_summary_tokens for chunk in self.chunks]
        return packed.split(sizes, dim) if len(sizes) > 1 else (packed,)

    def join(self, pieces, dim):
        """The way back."""
        return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]

    def split_summaries(self, summaries):
        """lanes C U D -> the summary tokens of each chunk that closes, R U D."""
        return summaries.unbind(1)

    def join_summaries(self, pieces):
        """The way back."""
        return torch.stack(pieces, dim=1)


def banded_bias(by_distance, num_queries, num_keys, like):
    """Bias of `num_queries` tokens towards `num_keys` keys of which they are the last.

    Returns H T J, on the device of `like`.
    """
    distance = num_keys - 1 - torch.arange(num_queries + num_keys - 1, device=like.device)
    values = by_distance(distance)
    if num_queries == 1:  # a token of generation
        return values[:, None]
    return spread_by_distance(values, num_queries, num_keys)


def slide(queue, new, dim):
    """Append to a queue, and forget the oldest beyond its length."""
    length = queue.shape[dim]
    joined = torch.cat((queue.to(new.dtype), new), dim)
    return joined.narrow(dim, joined.shape[dim] - length, length)


def widened(tensor, shape):
    """Zeros behind `tensor` along each axis, up to `shape`."""
    missing = [full - size for full, size in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    pad = [slots for after in reversed(missing) for slots in (0, after)]
    return torch.nn.functional.pad(tensor, pad)


def widen(tensor, dim, width):
    """Zeros behind `tensor` along `dim`, up to `width`."""
    return widened(tensor, resize(tensor, dim, width))


def put_rows(old, new, rows):
    """`old` with `rows` (R,) replaced by those of `new`, which may have fewer or more slots."""
    if new.numel() == 0:
        return old
    slots = [max(sizes) for sizes in zip(old.shape[1:], new.shape[1:], strict=True)]
    old, new = widened(old, (old.shape[0], *slots)), widened(new, (new.shape[0], *slots))
    return old.to(new.dtype).index_copy(0, rows, new)


def is_sealed(tensor):
    # What was made in inference mode may be written to in it alone.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return tensor.is_inference()


def resize(tensor, dim, width):
    shape = list(tensor.shape)
    shape[dim] = width
    return shape
