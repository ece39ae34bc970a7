"""Calls whose rows stand at different places of their documents, hold padding, or are compiled.

What `windows` tells of a call holds for each row of its own. In a graph nobody may look at how much
a row has, so its chunks are made for what could come; a step of generation is a token of each row,
which a cache has written in place.
"""

import torch

from .tracing import is_traced, is_transformed
from .windows import (
    Chunk,
    Plan,
    Progress,
    is_sealed,
    widen,
    widened,
)


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
        query = torch.cat((tokens, summaries.expand(tokens.shape[0], -1)), dim=1) + offset
        key = torch.arange(offset + window + len(summaries), device=device)
        bias = by_distance(query[:, :, None] - key)
        return bias.transpose(0, 1)  # H R T J -> R H T J

    def bias_before(self, by_distance, before):
        place = self.first[:, None] + torch.arange(self.tokens, device=before.device)
        return by_distance(place[..., None] + before).transpose(0, 1)  # H R T M -> R H T M


class StepChunk(RaggedChunk):
    """A token of each row inside a compiled graph, which decides when it runs whether any row
    begins a window."""

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
        if held.dtype != new.dtype or is_sealed(held):
            return super().extend(held, new, dim)
        slot = self.slots_read % self.window_length + held.shape[dim] - self.window_length
        place = (torch.arange(slot.shape[0], device=slot.device), *[slice(None)] * (dim - 1), slot)
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


class RaggedPlan(Plan):
    """The chunks of one call whose rows stand at different slots or hold padding.

    What is packed has one lane, in which the rows of a chunk follow one another.
    mask: B T, true at real tokens.
    """

    lanes = 1

    def __init__(self, chunks, starts, progress, mask):
        # starts: for each chunk, which of its row's real tokens is the first of it (R,)
        self.num_columns, self.chunks, self.progress = mask.shape[1], chunks, progress
        self.sizes = [chunk.tokens_read.shape[0] for chunk in chunks]  # R
        self.batch_size = mask.shape[0]
        self.tokens_before = progress.tokens_read - mask.sum(1)
        # Columns, those of real tokens first, B T.
        self.real = (~mask).long().argsort(dim=1, stable=True)
        self.gather, self.scatter = _ways(chunks, starts, self.real)

    @property
    def num_closing(self):
        return sum(
            rows for rows, chunk in zip(self.sizes, self.chunks, strict=True) if chunk.closes
        )

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
    """A call of one token of each row that neither begins its window nor closes it: somebody has
    looked, or a caller gives his word (`Progress.within`). Compiled it has no branch.

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
    in_place = in_place and not is_transformed()
    if progress.within:
        return OpenPlan(progress, mask, window_length)
    if mask is None and progress.fill is not None:
        return Plan(progress, num_columns, window_length, in_place)
    everything = mask is None
    if everything:
        shape = progress.tokens_read.shape[0], num_columns
        mask = torch.ones(shape, dtype=torch.bool, device=progress.tokens_read.device)
    if is_traced():
        return plan_unseen(progress, mask, window_length, in_place)
    fill = (progress.tokens_read % window_length).tolist()
    if everything and len(set(fill)) == 1:
        return Plan(progress._replace(fill=fill[0]), num_columns, window_length, in_place)
    if in_place and num_columns == 1:
        reading = [p for p, (is_real,) in zip(fill, mask.tolist(), strict=True) if is_real]
        if are_within(reading, window_length):
            return OpenPlan(progress, mask, window_length)
    return plan_rows(progress, fill, mask, window_length)


def are_within(slots, window_length):
    """Whether a token at each of these slots neither begins a window nor closes it."""
    return all(0 < slot < window_length - 1 for slot in slots)


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


def plan_unseen(progress, mask, window_length, in_place):
    """A plan inside a compiled graph: as many chunks as rows at any slot could need."""
    num_columns = mask.shape[1]
    furthest = window_length - 1 if progress.fill is None else progress.fill
    fill, left = progress.tokens_read % window_length, mask.sum(1)
    taken, chunks, starts = torch.zeros_like(left), [], []
    # A branch of a graph, which torch.func cannot transform.
    branches = num_columns == 1 and not is_transformed()
    step = WritingStepChunk if in_place else StepChunk
    kind = step if branches else RaggedChunk
    for i in range((furthest + num_columns + window_length - 1) // window_length):
        count = torch.minimum(left, window_length - fill)
        before = progress.tokens_read + taken
        tokens = window_length if window_length < num_columns else num_columns
        closes = furthest + num_columns >= (i + 1) * window_length and not branches
        chunks.append(kind(tokens, fill, count, before, window_length, closes=closes))
        chunks[-1].begins = (0, num_columns)
        starts.append(taken)
        taken, left, fill = taken + count, left - count, (fill + count)
        if branches:
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
    count = gather.shape[0]
    packed = torch.arange(count, device=real.device)
    scatter = packed.new_full((batch_size * columns + 1,), count)
    return gather, scatter.scatter(0, target, packed)[:-1]


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
