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
windows, then what is left of the rows. A row that has ended costs nothing; that is `RaggedPlan`.
Inside a compiled graph nobody may look at how much a row has, so there a `RaggedPlan` has as many
chunks as could be needed.
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
        self.closes = fill + tokens == window_length
        self.tokens_read, self.window_length = tokens_read, window_length
        # Which token of its row's in this call is the first of the chunk: the least and the most.
        self.begins = (0, 0)
        self.forgotten: dict[str, Tensor] = {}  # as in `Progress`, R
        self.snapshots: list | None = None  # of the memory, and
        self.weights: list | None = None  # of attention: layer by layer, if somebody asks

    @property
    def pattern(self):
        """Chunks of one call with equal patterns have equal position biases."""
        return self.tokens, self.fill

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
        return held.new_empty(_resize(held, dim, 0))

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
        if held.dtype != new.dtype or _is_sealed(held):
            return super().extend(held.narrow(dim, 0, first), new, dim)
        held.narrow(dim, first, self.tokens).copy_(new)
        return held.narrow(dim, 0, first + self.tokens)


class RaggedChunk(Chunk):
    """A chunk whose rows stand at different slots; some may have fewer tokens than others, or none.

    tokens: of the row that has most; fill, count: slots read before and tokens here, tensors (R,);
    closes: whether the window of any row may close; opens: whether any row may begin a window;
    slot: the slot at which every row stands that has tokens here, None if they differ.
    """

    in_order = False

    def __init__(  # noqa: PLR0913
        self,
        tokens,
        fill,
        count,
        tokens_read,
        window_length,
        rows=None,
        closes=True,
        opens=True,
        slot=None,
    ):
        super().__init__(tokens, 0, tokens_read, window_length, rows)
        self.slots_read, self.count, self.closes, self.opens = fill, count, closes, opens
        self.first = fill if slot is None else fill.new_full((1,), slot)
        self.is_closing = (count > 0) & (fill + count == window_length)
        self.is_opening = (count > 0) & (fill == 0)

    @property
    def pattern(self):
        return id(self)

    @property
    def end(self):
        return self.tokens_read + self.count

    @property
    def closing(self):
        return self.is_closing

    def so_far(self, held, dim, offset=0):
        return tuple(widen(tensor, dim, offset + self.window_length) for tensor in held)

    def begin(self, held, fresh, dim, offset):
        held = self.so_far(held, dim, offset)
        return self._opened(held, self.so_far(fresh(), dim, offset)) if self.opens else held

    def where_opened(self, held, fresh):
        return self._opened(held, fresh()) if self.opens else held

    def _opened(self, held, made):
        return tuple(
            torch.where(_rows(self.is_opening, old), new.to(old.dtype), widened(old, new.shape))
            for old, new in zip(held, made, strict=True)
        )

    def extend(self, held, new, dim):
        if self.tokens == 0:
            return super().extend(held, new, dim)
        tokens, summaries = new.split((self.tokens, new.shape[dim] - self.tokens), dim)
        offset, held = held.shape[dim] - self.window_length, held.to(new.dtype)
        place = torch.arange(self.tokens, device=held.device)
        # Where a row has no more tokens, slots are written with what they hold.
        slot = (self.slots_read[:, None] + place) % self.window_length + offset  # R T
        slot = _along(slot, dim, held).expand_as(tokens)
        is_real = _along(place < self.count[:, None], dim, held)
        window = held.scatter(dim, slot, torch.where(is_real, tokens, held.gather(dim, slot)))
        return torch.cat((window, summaries), dim) if summaries.shape[dim] else window

    def trim(self, extended, dim, offset=0):
        return extended.narrow(dim, 0, offset + self.window_length)

    def emptied(self, held, dim):
        return held

    def where_closed(self, new, old):
        new = widened(new, old.shape).to(old.dtype)
        return torch.where(_rows(self.is_closing, old), new, old)

    def bias(self, by_distance, offset, num_summary_tokens):
        device, window = self.first.device, self.window_length
        tokens = self.first[:, None] + torch.arange(self.tokens, device=device)
        summaries = window + torch.arange(self.closes * num_summary_tokens, device=device)
        query = torch.cat((tokens, summaries.expand(len(tokens), -1)), dim=1) + offset
        key = torch.arange(offset + window + len(summaries), device=device)
        bias = by_distance(query[:, :, None] - key)
        return bias.transpose(0, 1)  # H R T J -> R H T J

    def bias_before(self, by_distance, before):
        place = self.first[:, None] + torch.arange(self.tokens, device=before.device)
        return by_distance(place[..., None] + before).transpose(0, 1)  # H R T M -> R H T M


class StepChunk(RaggedChunk):
    """A token of each row inside a compiled graph, which decides when it runs whether any row
    begins a window."""

    def writing(self):
        """The chunk that does the same in place."""
        return WritingStepChunk(
            self.tokens,
            self.slots_read,
            self.count,
            self.tokens_read,
            self.window_length,
            closes=self.closes,
        )

    def where_opened(self, held, fresh):
        if not all(tensor.numel() for tensor in held):  # as training carries it between windows
            return super().where_opened(held, fresh)
        return self._if_any_opens(held, lambda held: self._opened(held, fresh()))

    def begin(self, held, fresh, dim, offset):
        held = self.so_far(held, dim, offset)
        begin = super().begin
        return self._if_any_opens(held, lambda held: begin(held, fresh, dim, offset))

    def _if_any_opens(self, held, make):
        shapes = [tensor.shape for tensor in held]

        def opened(*flat):
            made = make(tuple(t.view(shape) for t, shape in zip(flat, shapes, strict=True)))
            return tuple(new.flatten().clone() for new in made)

        def kept(*flat):
            return tuple(old.clone() for old in flat)

        flat = tuple(tensor.flatten() for tensor in held)  # as in `ClosingChunk`
        chosen = torch.cond(self.is_opening.any(), opened, kept, flat)
        return tuple(new.view(shape) for new, shape in zip(chosen, shapes, strict=True))


class WritingStepChunk(StepChunk):
    """The same where the memory is a cache's: the token is written into its tensors, and a compiled
    step copies no window."""

    def so_far(self, held, dim, offset=0):
        return held

    def begin(self, held, fresh, dim, offset):
        before = tuple(tensor.narrow(dim, 0, offset) for tensor in held)
        made = self._if_any_opens(before, lambda before: self._opened(before, fresh()))
        for old, new in zip(before, made, strict=True):
            old.copy_(new)
        return held

    def extend(self, held, new, dim):
        if held.dtype != new.dtype or _is_sealed(held):
            return super().extend(held, new, dim)
        slot = self.slots_read % self.window_length + held.shape[dim] - self.window_length
        place = (torch.arange(len(slot), device=slot.device), *[slice(None)] * (dim - 1), slot)
        new = new.squeeze(dim)
        held[place] = torch.where(_rows(self.count > 0, new), new, held[place])
        return held

    def trim(self, extended, dim, offset=0):
        return extended  # itself, by which the cache knows that it has it


class OpenChunk(WritingStepChunk):
    """The same where all rows that have a token stand within their windows: none begins and none is
    closed, and nothing is left to be decided when it runs."""

    def __init__(self, fill, count, tokens_read, window_length):
        super().__init__(1, fill, count, tokens_read, window_length, closes=False, opens=False)
        self.begins = (0, 1)

    def writing(self):
        return self

    def begin(self, held, fresh, dim, offset):
        return held

    def where_opened(self, held, fresh):
        return held


class ClosingChunk(RaggedChunk):
    """No tokens: the rows whose window is full close it. Run only if there are any, which a
    compiled graph decides when it runs."""

    def __init__(self, fill, tokens_read, window_length):
        none = torch.zeros_like(fill)
        super().__init__(0, fill, none, tokens_read, window_length, opens=False, slot=window_length)
        self.is_closing = fill == window_length

    @property
    def windows_read(self):
        return (self.tokens_read - 1) // self.window_length  # the full window is still open

    def run(self, cell, changed, bias, memory, *parts):
        operands = (*(getattr(memory, name) for name in changed), *parts)
        shapes, count = [operand.shape for operand in operands], len(changed)

        def close(*flat):
            given = [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
            held = _replaced(memory, changed, given[:count])
            output, new = cell(self, bias.make(self), held, *given[count:])
            return output.flatten(), *(getattr(new, name).flatten().clone() for name in changed)

        def leave(*flat):
            output, old = flat[count], flat[:count]
            return torch.zeros_like(output), *(part.clone() for part in old)

        # Flat, since torch may lay out anew what has several axes on its way into a branch.
        flat = tuple(operand.flatten() for operand in operands)
        output, *new = torch.cond(self.is_closing.any(), close, leave, flat)
        pairs = zip(new, shapes[:count], strict=True)
        new = [part.view(shape) for part, shape in pairs]
        return output.view(shapes[count]), _replaced(memory, changed, new)


class Plan:
    """The chunks of one call in which all rows stand at the same slot."""

    def __init__(self, progress, num_columns, window_length):
        self.num_columns = num_columns
        self.chunks = list(self._cut(progress, num_columns, window_length))
        self.tokens_before = progress.tokens_read  # of each row's document, B
        tokens_read = progress.tokens_read + num_columns
        self.progress = Progress(tokens_read, (progress.fill + num_columns) % window_length)
        self.lanes = tokens_read.shape[0]  # rows of what is packed

    def _cut(self, progress, num_columns, window_length):
        fill, done = progress.fill, 0
        while done < num_columns:
            tokens = min(window_length - fill, num_columns - done)
            chunk = Chunk(tokens, fill, progress.tokens_read + done, window_length)
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
        self.progress = self.progress._replace(forgotten=forgotten)
        for chunk in self.chunks:
            rows = slice(None) if chunk.rows is None else chunk.rows
            chunk.forgotten = {kind: count[rows] for kind, count in forgotten.items()}

    def record(self):
        """Have the chunks remember what a call that goes back would need."""
        for chunk in self.chunks:
            chunk.snapshots = []

    def write_in_place(self):
        """Have a window that stays open written behind its tokens: where the memory is a cache's,
        and nobody differentiates."""
        chunk = self.chunks[0]
        if chunk.fill > 0 and not chunk.closes:
            self.chunks[0] = WritingChunk(
                chunk.tokens, chunk.fill, chunk.tokens_read, chunk.window_length
            )

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


class RaggedPlan(Plan):
    """The chunks of one call whose rows stand at different slots or hold padding.

    What is packed has one lane, in which the rows of a chunk follow one another.
    mask: B T, true at real tokens.
    """

    lanes = 1

    def __init__(self, chunks, starts, progress, mask):
        # starts: for each chunk, which of its row's real tokens is the first of it (R,)
        self.num_columns, self.chunks, self.progress = mask.shape[1], chunks, progress
        self.sizes = [len(chunk.tokens_read) for chunk in chunks]  # R
        self.batch_size = len(mask)
        self.tokens_before = progress.tokens_read - mask.sum(1)
        # Columns, those of real tokens first, B T.
        self.real = (~mask).long().argsort(dim=1, stable=True)
        self.gather, self.scatter = _ways(chunks, starts, self.real)

    @property
    def num_closing(self):
        return sum(
            rows for rows, chunk in zip(self.sizes, self.chunks, strict=True) if chunk.closes
        )

    def write_in_place(self):
        # A step alone: the rows of other chunks are taken out of the cache, and put back.
        self.chunks = [
            chunk.writing() if isinstance(chunk, StepChunk) else chunk for chunk in self.chunks
        ]

    def pack_tokens(self, x):
        return x.flatten(0, 1).index_select(0, self.gather)[None]

    def unpack_tokens(self, packed):
        packed = torch.nn.functional.pad(packed[0], (0, 0, 0, 1))  # a zero row for the padding
        return packed.index_select(0, self.scatter).unflatten(0, (self.batch_size, -1))

    def line_up(self, packed, dim):
        flat = packed.movedim(dim, 1)
        columns = self.unpack_tokens(flat.flatten(2))
        rows = columns.gather(1, self.real[..., None].expand_as(columns))
        return rows.unflatten(2, flat.shape[2:]).movedim(1, dim)

    def split(self, packed, dim, num_summary_tokens=0):
        each = [chunk.tokens + chunk.closes * num_summary_tokens for chunk in self.chunks]
        shapes = list(zip(self.sizes, each, strict=True))
        pieces = packed.split([rows * tokens for rows, tokens in shapes], dim)
        return [
            piece.unflatten(dim, shape)[0].movedim(dim - 1, 0)
            for piece, shape in zip(pieces, shapes, strict=True)
        ]

    def join(self, pieces, dim):
        flat = (piece.movedim(0, dim - 1).flatten(dim - 1, dim) for piece in pieces)
        return torch.cat(list(flat), dim - 1)[None]

    def split_summaries(self, summaries):
        closing = zip(self.sizes, self.chunks, strict=True)
        return summaries[0].split([rows for rows, chunk in closing if chunk.closes])

    def join_summaries(self, pieces):
        return torch.cat(pieces)[None]


class OpenPlan(RaggedPlan):
    """A call of one token of each row that neither begins its window nor closes it, of which a
    caller gives his word (`Progress.within`): there is nothing to look at, and compiled no branch.

    mask: B 1, false at rows that have ended, which may stand anywhere; None if there are none.
    """

    def __init__(self, progress, mask, window_length):
        before = progress.tokens_read
        count = torch.ones_like(before) if mask is None else mask[:, 0].long()
        self.num_columns, self.batch_size = 1, before.shape[0]
        self.sizes = [self.batch_size]
        self.chunks = [OpenChunk(before % window_length, count, before, window_length)]
        self.tokens_before, self.progress = before, Progress(before + count, None)

    def pack_tokens(self, x):
        return x.transpose(0, 1)  # B 1 D -> 1 B D

    def unpack_tokens(self, packed):
        return packed.transpose(0, 1)

    def line_up(self, packed, dim):
        return packed.transpose(0, dim)


def make_plan(progress, num_columns, mask, window_length, in_place=False):
    """How a call of `num_columns` falls into windows. mask: B T, true at real tokens, or None;
    in_place: whether the memory may be written to."""
    if progress.within:
        return OpenPlan(progress, mask, window_length)
    if mask is None and progress.fill is not None:
        return Plan(progress, num_columns, window_length)
    everything = mask is None
    if everything:
        shape = progress.tokens_read.shape[0], num_columns
        mask = torch.ones(shape, dtype=torch.bool, device=progress.tokens_read.device)
    if torch.compiler.is_compiling():
        return plan_unseen(progress, mask, window_length)
    fill = (progress.tokens_read % window_length).tolist()
    if everything and len(set(fill)) == 1:
        return Plan(progress._replace(fill=fill[0]), num_columns, window_length)
    if in_place and num_columns == 1:
        reading = [p for p, (is_real,) in zip(fill, mask.tolist(), strict=True) if is_real]
        if all(0 < p < window_length - 1 for p in reading):
            return OpenPlan(progress, mask, window_length)
    return plan_rows(progress, fill, mask, window_length)


def plan_rows(progress, fill, mask, window_length):
    """A plan for rows of which `fill` (B integers) and the mask tell how much each has to read."""
    counts, chunks, starts = mask.sum(1), [], []
    have = counts.tolist()
    for rows, first, slots, tokens in _cut_rows(fill, have, window_length):
        index, start = torch.tensor([rows, first], device=mask.device)
        before = progress.tokens_read[index] + start
        some = index if len(rows) < len(fill) else None
        alike = len(set(slots)) == 1 and len(set(tokens)) == 1 and tokens[0] > 0
        if alike:
            chunks.append(Chunk(tokens[0], slots[0], before, window_length, some))
        else:
            chunks.append(ragged_chunk(slots, tokens, before, window_length, some))
        chunks[-1].begins = (min(first), max(first))
        starts.append(start)
    end = {(p + n) % window_length for p, n in zip(fill, have, strict=True)}
    after = Progress(progress.tokens_read + counts, end.pop() if len(end) == 1 else None)
    return RaggedPlan(chunks, starts, after, mask)


def _cut_rows(fill, have, window_length):
    # One tuple per chunk of lists with a number per row: which rows, the first of its tokens, the
    # slot where it goes, and how many there are. First what does not begin a whole window, then
    # window by window, then what is left.
    pairs = list(zip(fill, have, strict=True))
    heads = [min(n, window_length - p) if p or n < window_length else 0 for p, n in pairs]
    windows = [(n - head) // window_length for n, head in zip(have, heads, strict=True)]
    done = [head + k * window_length for head, k in zip(heads, windows, strict=True)]
    # Rows that close a window apart from those that do not: closing costs more than a token.
    closing = [b for b, head in enumerate(heads) if head > 0 and fill[b] + head == window_length]
    others = [b for b, head in enumerate(heads) if head > 0 and fill[b] + head < window_length]
    nothing = [] if any(have) else list(range(len(have)))  # but padding
    for rows in filter(None, (closing, others, nothing)):
        yield rows, [0] * len(rows), [fill[b] for b in rows], [heads[b] for b in rows]
    for i in range(max(windows)):
        rows = [b for b, k in enumerate(windows) if k > i]
        begun = [heads[b] + i * window_length for b in rows]
        yield rows, begun, [0] * len(rows), [window_length] * len(rows)
    rows = [b for b, n in enumerate(have) if n > done[b]]
    if rows:
        yield rows, [done[b] for b in rows], [0] * len(rows), [have[b] - done[b] for b in rows]


def ragged_chunk(slots, tokens, tokens_read, window_length, rows):
    """A chunk whose rows, of which all is known, stand at `slots` and have `tokens` (lists)."""
    active = {(p, n) for p, n in zip(slots, tokens, strict=True) if n > 0}
    at = {p for p, _ in active}
    fill, count = torch.tensor([slots, tokens], device=tokens_read.device)
    return RaggedChunk(
        max(1, *tokens),
        fill,
        count,
        tokens_read,
        window_length,
        rows,
        closes=any(p + n == window_length for p, n in active),
        opens=0 in at,
        slot=at.pop() if len(at) == 1 else None,
    )


def plan_unseen(progress, mask, window_length):
    """A plan inside a compiled graph: as many chunks as rows at any slot could need."""
    num_columns = mask.shape[1]
    furthest = window_length - 1 if progress.fill is None else progress.fill
    fill, left = progress.tokens_read % window_length, mask.sum(1)
    taken, chunks, starts = torch.zeros_like(left), [], []
    for i in range((furthest + num_columns + window_length - 1) // window_length):
        count = torch.minimum(left, window_length - fill)
        before = progress.tokens_read + taken
        tokens = min(window_length, num_columns)
        closes = furthest + num_columns >= (i + 1) * window_length and num_columns > 1
        kind = StepChunk if num_columns == 1 else RaggedChunk
        chunks.append(kind(tokens, fill, count, before, window_length, closes=closes))
        chunks[-1].begins = (0, num_columns)
        starts.append(taken)
        taken, left, fill = taken + count, left - count, (fill + count)
        if num_columns == 1:
            chunks.append(ClosingChunk(fill, before + count, window_length))
            starts.append(taken)
        fill = fill % window_length
    return RaggedPlan(chunks, starts, Progress(progress.tokens_read + taken, None), mask)


def _ways(chunks, starts, real):
    # Where each packed token comes from (N,), and where each column of the call lies (B*T,): both
    # flat. Slots that a row does not fill come from anywhere; padding lies behind everything.
    # real: B T, the columns of each row, those of real tokens first.
    batch_size, columns = real.shape
    everyone = torch.arange(batch_size, device=real.device)
    sources, targets = [], []
    for chunk, start in zip(chunks, starts, strict=True):
        rows = (everyone if chunk.rows is None else chunk.rows)[:, None]
        token = torch.arange(chunk.tokens, device=real.device)
        index = (start[:, None] + token).clamp(max=columns - 1)
        source = rows * columns + real[rows, index]
        is_read = token < (chunk.end - chunk.tokens_read)[:, None]
        sources.append(source.flatten())
        targets.append(source.masked_fill(~is_read, batch_size * columns).flatten())
    gather, target = torch.cat(sources), torch.cat(targets)
    packed = torch.arange(len(gather), device=real.device)
    scatter = packed.new_full((batch_size * columns + 1,), len(gather))
    return gather, scatter.scatter(0, target, packed)[:-1]


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
    return widened(tensor, _resize(tensor, dim, width))


def put_rows(old, new, rows):
    """`old` with `rows` (R,) replaced by those of `new`, which may have fewer or more slots."""
    if new.numel() == 0:
        return old
    slots = [max(sizes) for sizes in zip(old.shape[1:], new.shape[1:], strict=True)]
    old, new = widened(old, (len(old), *slots)), widened(new, (len(new), *slots))
    return old.to(new.dtype).index_copy(0, rows, new)


def _is_sealed(tensor):
    # What was made in inference mode may be written to in it alone.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return tensor.is_inference()


def _replaced(memory, names, tensors):
    for name, tensor in zip(names, tensors, strict=True):
        memory = memory._replace(**{name: tensor})
    return memory


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
