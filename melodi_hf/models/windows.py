"""How the columns of one call fall into windows, row by row.

Windows are anchored at the first real token of each row and counted in its real tokens. A call is
cut into *chunks*: the first continues the window that is open, each later one begins the next. A
chunk that fills its window closes it, and there the summary tokens, if a model has any, follow:

    columns     x x x | x x x x x x x x | x x x x x      window_length 8, 5 tokens read before
    chunk       0     | 1               | 2
    closes      yes   | yes             | no
    packed      x x x u u | x x x x x x x x u u | x x x x x

If all rows stand at the same place (training, one document, equal prompts), chunks are slices and
nothing depends on the content of a tensor. If they do not, rows are moved to the left chunk by
chunk; what a row lacks is filled with tokens that nobody reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .position import spread_by_distance


class Progress(NamedTuple):
    """How far each row has read its document."""

    tokens_read: Tensor  # B, int64
    fill: int | None  # tokens of the open window if all rows hold as many, else None

    def restart(self, rows):
        """The rows of a mask (B,) begin a new document."""
        tokens_read = self.tokens_read.masked_fill(rows.to(self.tokens_read.device), 0)
        return Progress(tokens_read, 0 if self.fill == 0 else None)


class Chunk:
    """Tokens of one call that belong to one window; all rows stand at the same slot of it.

    tokens: how many; fill: slots of the window that were read before; closes: whether the chunk
    completes it; tokens_read (B,): tokens of the document before the chunk.
    """

    in_order = True  # queries are the last of the keys

    def __init__(self, tokens, fill, closes, tokens_read, window_length):
        self.tokens, self.fill, self.closes = tokens, fill, closes
        self.tokens_read, self.window_length = tokens_read, window_length

    @property
    def pattern(self):
        """Chunks of one call with equal patterns have equal position biases."""
        return self.tokens, self.fill, self.closes

    @property
    def windows_read(self):
        """Windows that each row has closed before this chunk (B,)."""
        return self.tokens_read // self.window_length

    def begin(self, held, fresh, dim, offset=0):
        """What the window holds, `fresh()` if the chunk begins it; `held`, `fresh()`: tuples.

        `offset` slots along `dim` precede the window's own.
        """
        if self.fill == 0:
            return fresh()
        return tuple(tensor.narrow(dim, 0, offset + self.fill) for tensor in held)

    def extend(self, held, new, dim):
        """Write the chunk's tokens (and the summary tokens that follow them) behind `held`."""
        return torch.cat((held.to(new.dtype), new), dim) if held.shape[dim] else new

    def hold(self, extended, dim, offset=0):
        """The part of `extended` that the window keeps after this chunk."""
        return extended.narrow(dim, 0, 0) if self.closes else extended

    def where_closed(self, new, old):
        """`new` in the rows whose window closes here, else `old`."""
        return new

    def last(self, held, new, dim):
        """Push the chunk's tokens into a queue as long as `held`, forgetting its oldest slots."""
        queue = torch.cat((held.to(new.dtype), new), dim)
        return queue.narrow(dim, queue.shape[dim] - held.shape[dim], held.shape[dim])

    def bias(self, by_distance, offset, num_summary_tokens):
        """Bias of all queries of the chunk towards [`offset` memory slots | window | summaries].

        by_distance: distances in tokens (any shape) -> biases (H, that shape).
        Returns H T J, T counting the summary tokens.
        """
        queries = self.tokens + self.closes * num_summary_tokens
        return banded_bias(by_distance, queries, offset + self.fill + queries, self.tokens_read)


class RaggedChunk(Chunk):
    """A chunk whose rows stand at different slots; some may have fewer tokens than others, or none.

    fill, count: slots read before and real tokens of each row, lists of B integers.
    """

    in_order = False

    def __init__(self, fill, count, tokens_read, window_length):
        pairs = list(zip(fill, count, strict=True))
        closing = [n > 0 and p + n == window_length for p, n in pairs]
        super().__init__(max(1, *count), fill, any(closing), tokens_read, window_length)
        device = tokens_read.device
        active = {p for p, n in pairs if n > 0}
        # Rows without tokens here may take any slot: then one bias often serves all rows.
        shared = active.pop() if len(active) == 1 else None
        first = fill if shared is None else [shared] * len(fill)
        self.first = torch.tensor(first if shared is None else first[:1], device=device)
        self.slots_read = torch.tensor(fill, device=device)
        self.count = torch.tensor(count, device=device)
        self.closing = torch.tensor(closing, device=device)
        self.opening = torch.tensor([n > 0 and p == 0 for p, n in pairs], device=device)
        self.any_opens = any(n > 0 and p == 0 for p, n in pairs)

    @property
    def pattern(self):
        return id(self)

    def begin(self, held, fresh, dim, offset=0):
        width = offset + self.window_length
        held = tuple(widen(tensor, dim, width) for tensor in held)
        if not self.any_opens:
            return held
        return tuple(
            torch.where(_rows(self.opening, old), widen(new, dim, width).to(old.dtype), old)
            for old, new in zip(held, fresh(), strict=True)
        )

    def extend(self, held, new, dim):
        tokens = new.narrow(dim, 0, self.tokens)
        offset = held.shape[dim] - self.window_length
        slot = torch.arange(held.shape[dim], device=held.device) - offset
        source = slot - self.slots_read[:, None]  # B, slots: which token of the chunk lies there
        written = (source >= 0) & (source < self.count[:, None])
        source = _along(source.clamp(0, self.tokens - 1), dim, held)
        window = tokens.gather(dim, source.expand(_resize(tokens, dim, held.shape[dim])))
        window = torch.where(_along(written, dim, held), window, held.to(new.dtype))
        return torch.cat((window, new.narrow(dim, self.tokens, new.shape[dim] - self.tokens)), dim)

    def hold(self, extended, dim, offset=0):
        return extended.narrow(dim, 0, offset + self.window_length)

    def where_closed(self, new, old):
        return torch.where(_rows(self.closing, old), new.to(old.dtype), old)

    def last(self, held, new, dim):
        length = held.shape[dim]
        queue = torch.cat((held.to(new.dtype), new), dim)
        source = self.count[:, None] + torch.arange(length, device=held.device)
        return queue.gather(dim, _along(source, dim, held).expand_as(held))

    def bias(self, by_distance, offset, num_summary_tokens):
        device, window = self.first.device, self.window_length
        tokens = self.first[:, None] + torch.arange(self.tokens, device=device)
        summaries = window + torch.arange(self.closes * num_summary_tokens, device=device)
        query = torch.cat((tokens, summaries.expand(len(tokens), -1)), dim=1) + offset
        key = torch.arange(offset + window + len(summaries), device=device)
        bias = by_distance(query[:, :, None] - key)
        return bias.transpose(0, 1)  # H B T J -> B H T J


class Plan:
    """The chunks of one call in which all rows stand at the same slot."""

    def __init__(self, progress, num_columns, window_length):
        self.num_columns, self.window_length = num_columns, window_length
        self.chunks = list(self._cut(progress, num_columns))
        tokens_read = progress.tokens_read + num_columns
        self.progress = Progress(tokens_read, (progress.fill + num_columns) % window_length)

    def _cut(self, progress, num_columns):
        fill, done = progress.fill, 0
        while done < num_columns:
            tokens = min(self.window_length - fill, num_columns - done)
            closes = fill + tokens == self.window_length
            yield Chunk(tokens, fill, closes, progress.tokens_read + done, self.window_length)
            fill, done = 0, done + tokens

    @property
    def num_closing(self):
        """Windows that close in this call (in at least one row)."""
        return sum(chunk.closes for chunk in self.chunks)

    def pack_tokens(self, x):
        """B T D in the caller's columns -> B, tokens of all chunks, D."""
        return x

    def unpack_tokens(self, packed):
        """The way back; columns without a token are zero."""
        return packed

    def pack(self, x, summaries):
        """x: B T D; summaries: B C U D, C = `num_closing` -> each chunk's tokens and summaries."""
        tokens = self.pack_tokens(x).split([chunk.tokens for chunk in self.chunks], dim=1)
        following = iter(summaries.unbind(1))
        pieces = []
        for chunk, piece in zip(self.chunks, tokens, strict=True):
            pieces += [piece, next(following)] if chunk.closes else [piece]
        return torch.cat(pieces, dim=1)

    def unpack(self, pieces, num_summary_tokens):
        """The way back, from one tensor per chunk."""
        tokens, summaries = [], []
        for chunk, piece in zip(self.chunks, pieces, strict=True):
            x, u = piece.split((chunk.tokens, chunk.closes * num_summary_tokens), dim=1)
            tokens.append(x)
            summaries += [u] if chunk.closes else []
        batch_size, _, channels = tokens[0].shape
        none = tokens[0].new_empty(batch_size, 0, num_summary_tokens, channels)
        return (
            self.unpack_tokens(torch.cat(tokens, dim=1)),
            torch.stack(summaries, dim=1) if summaries else none,
        )

    def split(self, packed, dim, num_summary_tokens=0):
        """One piece per chunk of what was packed."""
        sizes = [chunk.tokens + chunk.closes * num_summary_tokens for chunk in self.chunks]
        return packed.split(sizes, dim)


class RaggedPlan(Plan):
    """The chunks of one call whose rows stand at different slots or hold padding.

    mask: B T, true at real tokens.
    """

    def __init__(self, progress, mask, window_length):
        self.num_columns, self.window_length = mask.shape[1], window_length
        fill = (progress.tokens_read % window_length).tolist()
        counts = mask.sum(1)
        self.chunks, sources = [], []
        taken, left = [0] * len(fill), counts.tolist()
        while any(left) or not self.chunks:
            count = [min(n, window_length - p) for p, n in zip(fill, left, strict=True)]
            before = progress.tokens_read + torch.tensor(taken, device=mask.device)
            self.chunks.append(RaggedChunk(fill, count, before, window_length))
            sources.append(_columns(taken, count, mask.device))
            taken = [a + n for a, n in zip(taken, count, strict=True)]
            left = [a - n for a, n in zip(left, count, strict=True)]
            fill = [(p + n) % window_length for p, n in zip(fill, count, strict=True)]
        self._index(mask, torch.cat(sources, dim=1))
        together = fill[0] if len(set(fill)) == 1 else None
        self.progress = Progress(progress.tokens_read + counts, together)

    def _index(self, mask, source):
        # source: B P, which of its real tokens each row has in each packed column, -1 for none
        real = (~mask).long().argsort(dim=1, stable=True)  # columns, those of real tokens first
        batch_size, columns = mask.shape
        self.gather = real.gather(1, source.clamp(min=0))
        packed = torch.arange(source.shape[1], device=mask.device).expand_as(source)
        way_back = packed.new_full((batch_size, columns + 1), source.shape[1])
        way_back.scatter_(1, self.gather.masked_fill(source < 0, columns), packed)
        self.scatter = way_back[:, :columns]

    def pack_tokens(self, x):
        return x.gather(1, self.gather[..., None].expand(-1, -1, x.shape[-1]))

    def unpack_tokens(self, packed):
        packed = torch.nn.functional.pad(packed, (0, 0, 0, 1))  # a zero column for the padding
        return packed.gather(1, self.scatter[..., None].expand(-1, -1, packed.shape[-1]))


def banded_bias(by_distance, num_queries, num_keys, like):
    """Bias of `num_queries` tokens towards `num_keys` keys of which they are the last.

    Returns H T J, on the device of `like`.
    """
    distance = num_keys - 1 - torch.arange(num_queries + num_keys - 1, device=like.device)
    return spread_by_distance(by_distance(distance), num_queries, num_keys)


def widen(tensor, dim, width):
    """Append zeros along `dim` up to `width`."""
    missing = width - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


def _columns(taken, count, device):
    # B, max(count): taken, taken + 1, ... for as many as the row has, then -1
    widest = range(max(1, *count))
    rows = [[t + i if i < n else -1 for i in widest] for t, n in zip(taken, count, strict=True)]
    return torch.tensor(rows, device=device, dtype=torch.long)


def _rows(mask, like):  # B -> B 1 1 ...
    return mask.view(-1, *[1] * (like.dim() - 1))


def _along(index, dim, like):  # B J -> B 1 .. J .. 1, J along dim
    shape = [1] * like.dim()
    shape[0], shape[dim] = index.shape
    return index.view(shape)


def _resize(tensor, dim, width):
    shape = list(tensor.shape)
    shape[dim] = width
    return shape
