"""Which tokens of which rows of a call fall into which window.

Windows begin at the first real token of a row and are counted in its real tokens. A call is a list
of steps; the tokens of a step lie in one window of each of its rows:

    tokens      x x x | x x x x x x x x | x x x x x      window_length 8, 5 tokens read before
    step        0     | 1               | 2
    closes      yes   | yes             | no

There are two forms. In a `Step` all rows stand at the same offset in their window, and nothing
depends on the content of a tensor. In an `OffsetStep` offsets and numbers of tokens are tensors. A
call with padding, or whose rows stand at different offsets, first completes the open windows, then
reads whole windows, then what is left; each step has only the rows that have tokens in it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .kernels import is_traced, is_transformed
from .modules import spread_by_distance


class Progress(NamedTuple):
    """How far each row has read its document."""

    tokens_read: Tensor  # B, int64
    offset: int | None  # tokens in the open window, if known to be equal in all rows
    forgotten: dict[str, Tensor] = {}  # noqa: RUF012 kind of memory -> B, oldest windows dropped
    # Whether the next call is known to be one token per row that begins and completes no window.
    is_mid_window: bool = False

    def reset_rows(self, rows):
        """Start new documents in the rows of a mask (B,)."""
        rows = rows.to(self.tokens_read.device)
        forgotten = {kind: count.masked_fill(rows, 0) for kind, count in self.forgotten.items()}
        offset = 0 if self.offset == 0 else None
        return Progress(self.tokens_read.masked_fill(rows, 0), offset, forgotten)


class Window(NamedTuple):
    """What a layer needs to know about the window, for the R rows of a step."""

    length: int  # W
    tokens_read: Tensor  # R, tokens of the document before the step
    windows_read: Tensor  # R, windows that were completed before this one (torch 2.9: no property)
    forgotten: dict[str, Tensor]  # kind of memory -> R, oldest windows dropped
    bias: Tensor  # H T J or R H T J, position bias; hides what is not before the query
    in_order: bool  # the queries are the last of the keys
    return_weights: bool  # attention weights are asked for
    trains: bool  # gradients are computed in training mode, so auxiliary losses are needed

    def windows_in_memory(self, kind):
        """The latest of them that a memory of this kind may hold (R,)."""
        return self.windows_read - self.forgotten.get(kind, 0)


class StepOutput(NamedTuple):
    """What a layer returns for one step."""

    x: Tensor  # R T D
    summaries: Tensor  # R U D, U = 0 unless the window was completed
    loss: Tensor | None  # auxiliary loss, summed over rows
    weights: Tensor | None  # R H T J, of attention
    snapshot: Any  # the memory when the window was full and not yet closed


class Step:
    """Tokens of one window, of rows at the same offset in it.

    Args:
        window_length: W.
        tokens: how many.
        offset: tokens of the window that were read before.
        tokens_read (R,): tokens of the document before the step.
        rows (R,): which of the batch, or None for all.
        in_place: whether tokens may be written into the tensors of the memory.
    """

    in_order = True

    def __init__(self, window_length, tokens, offset, tokens_read, rows=None, in_place=False):
        self.window_length, self.tokens, self.offset = window_length, tokens, offset
        self.tokens_read, self.rows = tokens_read, rows
        self.opens, self.closes = offset == 0, bool(offset + tokens == window_length)
        self.in_place = in_place and not (self.opens or self.closes)
        self.forgotten: dict[str, Tensor] = {}

    @property
    def num_rows(self):
        return self.tokens_read.shape[0]

    @property
    def pattern(self):
        """Steps of one call with equal patterns have equal position biases."""
        return "window" if self.opens and self.closes else id(self)

    @property
    def tokens_after(self):
        """Tokens that each row has read after the step (R,)."""
        return self.tokens_read + self.tokens

    @property
    def is_closing(self):
        """Rows whose window is full after the step, a mask (R,)."""
        return torch.full_like(self.tokens_read, self.closes, dtype=torch.bool)

    @property
    def keeps_parts(self):
        """Whether queues may be held in parts (tuples), which `join_parts` joins after the call."""
        return self.rows is None

    def window(self, bias, plan):
        """Describe the window to a layer."""
        flags = self.in_order, plan.return_weights, plan.trains
        read = self.tokens_read, self.tokens_read // self.window_length
        return Window(self.window_length, *read, self.forgotten, bias, *flags)

    def select_rows(self, memory):
        """The memory of the rows of this step."""
        if self.rows is None:
            return memory
        return type(memory)(*(tensor.index_select(0, self.rows) for tensor in memory))

    def update_rows(self, memory, selected, new):
        """`memory` with what became of the rows of this step."""
        if self.rows is None:
            return new
        fields = (
            old if after is before else index_copy_rows(old, after, self.rows)
            for old, before, after in zip(memory, selected, new, strict=True)
        )
        return type(new)(*fields)

    def merge_opened(self, fresh, held):
        """`fresh` in the rows whose window begins here, else `held`; both are memories."""
        return fresh

    def merge_closed(self, new, old):
        """`new` in the rows whose window is full, else `old`; both are memories."""
        return new

    def append(self, held, new, axis, context):
        """Append tokens, and summary tokens behind them, to what a window holds along an axis.

        held: `context` slots that precede the window, and at least those read before.
        """
        first = context + self.offset
        if self.in_place and held.dtype == new.dtype and not is_locked_inference_tensor(held):
            held.narrow(axis, first, self.tokens).copy_(new)
            return held.narrow(axis, 0, first + self.tokens)
        return torch.cat((held.narrow(axis, 0, first).to(new.dtype), new), axis) if first else new

    def without_summaries(self, extended, axis, context):
        """What `append` returned, without the summary tokens."""
        return extended.narrow(axis, 0, context + self.offset + self.tokens)

    def empty_slots(self, held, axis):
        """What a window holds once it is closed."""
        return held.new_empty(resize(held, axis, 0))

    def bias(self, by_distance, context, num_summaries):
        """Bias of the queries of this step towards [context | window | summary tokens].

        by_distance: distances in tokens (any shape) -> biases (H, that shape). Returns H T J, the
        summary tokens are among T and J.
        """
        queries = self.tokens + self.closes * num_summaries
        keys = context + self.offset + queries
        distance = keys - 1 - torch.arange(queries + keys - 1, device=self.tokens_read.device)
        values = by_distance(distance)
        return values[:, None] if queries == 1 else spread_by_distance(values, queries, keys)

    def bias_before(self, by_distance, before):
        """Bias towards slots that lie `before` (M,) tokens before the window: H T M."""
        place = self.offset + torch.arange(self.tokens, device=before.device)
        return by_distance(place[:, None] + before)


class OffsetStep(Step):
    """Tokens of one window of each row, whose rows stand at different offsets.

    Args:
        tokens: of the row that has most.
        offset, count (R,): tokens of the window that were read before, and that are read here.
        opens, closes: whether the window of any row may begin, may become full.
        common_offset: that of all rows with tokens here, or None.
    """

    in_order = False
    keeps_parts = False

    def __init__(  # noqa: PLR0913
        self,
        window_length,
        tokens,
        offset,
        count,
        tokens_read,
        rows=None,
        opens=True,
        closes=True,
        common_offset=None,
        in_place=False,
    ):
        super().__init__(window_length, tokens, 0, tokens_read, rows)
        self.offsets, self.count, self.opens, self.closes = offset, count, opens, closes
        self.first = offset if common_offset is None else offset.new_full((1,), common_offset)
        self.in_place = in_place

    pattern = property(id)

    @property
    def tokens_after(self):
        return self.tokens_read + self.count

    @property
    def is_closing(self):
        return (self.count > 0) & (self.offsets + self.count == self.window_length)

    def merge_opened(self, fresh, held):
        return self._merge((self.count > 0) & (self.offsets == 0), fresh, held)

    def merge_closed(self, new, old):
        return self._merge(self.is_closing, new, old)

    def _merge(self, rows, new, old):
        return type(old)(
            *(
                before if after is before else where_rows(rows, after, before)
                for after, before in zip(new, old, strict=True)
            )
        )

    def append(self, held, new, axis, context):
        slot = (self.offsets[:, None] + torch.arange(self.tokens, device=held.device)) % (
            self.window_length
        ) + context
        if self._writes_token(held, new):
            return self._write_token(held, new, axis, slot[:, 0])
        tokens, summaries = new.split((self.tokens, new.shape[axis] - self.tokens), axis)
        width = context + self.window_length
        held = pad_to_shape(held, resize(held, axis, width)).to(new.dtype)
        slot = along(slot, axis, held).expand_as(tokens)
        is_token = torch.arange(self.tokens, device=held.device) < self.count[:, None]
        # Where a row has no more tokens, slots are written with what they hold.
        tokens = torch.where(along(is_token, axis, held), tokens, held.gather(axis, slot))
        window = held.scatter(axis, slot, tokens)
        return torch.cat((window, summaries), axis) if summaries.shape[axis] else window

    def _writes_token(self, held, new):
        return self.in_place and held.dtype == new.dtype and not is_locked_inference_tensor(held)

    def _write_token(self, held, new, axis, slot):
        rows = torch.arange(self.num_rows, device=slot.device)
        place = (rows, *[slice(None)] * (axis - 1), slot)
        held[place] = where_rows(self.count > 0, new.squeeze(axis), held[place])
        return held

    def without_summaries(self, extended, axis, context):
        return extended.narrow(axis, 0, context + self.window_length)

    def empty_slots(self, held, axis):
        return held

    def bias(self, by_distance, context, num_summaries):
        device, window = self.first.device, self.window_length
        tokens = self.first[:, None] + torch.arange(self.tokens, device=device)
        summaries = window + torch.arange(self.closes * num_summaries, device=device)
        query = torch.cat((tokens, summaries.expand(tokens.shape[0], -1)), dim=1) + context
        key = torch.arange(context + window + len(summaries), device=device)
        return by_distance(query[:, :, None] - key).transpose(0, 1)  # R H T J

    def bias_before(self, by_distance, before):
        place = self.first[:, None] + torch.arange(self.tokens, device=before.device)
        return by_distance(place[..., None] + before).transpose(0, 1)  # R H T M


class Plan:
    """The steps of one call, and the order in which layers hold its tokens.

    Args:
        steps: one after the other.
        progress: after the call.
        num_columns: of the call, padding included.
    """

    rebuilds_context = True  # in training, where a call begins with the weights of this step
    return_weights = False  # of attention
    trains = False  # auxiliary losses are needed
    records = False  # what layers return for each step is wanted

    def __init__(self, steps, progress, num_columns):
        self.steps, self.progress, self.num_columns = steps, progress, num_columns
        for step in steps:
            rows = slice(None) if step.rows is None else step.rows
            step.forgotten = {kind: count[rows] for kind, count in progress.forgotten.items()}

    @property
    def num_closing(self):
        """Windows that may become full in this call, over all rows."""
        return sum(step.num_rows for step in self.steps if step.closes)

    def run(self, read, position_bias, memory, x, summaries):
        """Read all steps with one layer.

        Args:
            read: (step, window, memory, x, summaries) -> `StepOutput`, memory.
            position_bias: step -> its bias.
            memory: the layer's, of all rows.
            x, summaries: what `pack` and `split_summaries` take.

        Returns:
            A `StepOutput` per step, and the memory after the call.
        """
        outputs, biases = [], {}
        tokens, summaries = self.split(x), self.split_summaries(summaries)
        for step, piece, ends in zip(self.steps, tokens, summaries, strict=True):
            if step.pattern not in biases:
                biases[step.pattern] = position_bias(step)
            memory = memory if step.keeps_parts else join_parts(memory)
            held = step.select_rows(memory)
            window = step.window(biases[step.pattern], self)
            output, new = read(step, window, held, piece, ends)
            memory = step.update_rows(memory, held, new)
            outputs.append(output)
        return outputs, memory

    def pack(self, x):
        """B T D, the columns of the call -> the tokens in the order of the steps."""
        return x

    def unpack(self, packed):
        """Undo `pack`; columns without a token are zero."""
        return packed

    def split(self, packed):
        """One tensor per step, R T D."""
        return packed.split([step.tokens for step in self.steps], dim=1)

    def join(self, pieces):
        """Undo `split`."""
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def split_summaries(self, summaries):
        """N U D, N = `num_closing` -> one tensor per step, R U D, or R 0 D if no window ends."""
        sizes = [step.num_rows if step.closes else 0 for step in self.steps]
        for step, piece in zip(self.steps, summaries.split(sizes), strict=True):
            yield piece if step.closes else summaries.new_empty(step.num_rows, 0, piece.shape[2])

    def join_summaries(self, pieces):
        """Undo `split_summaries`."""
        ends = [piece for step, piece in zip(self.steps, pieces, strict=True) if step.closes]
        return torch.cat(ends) if ends else pieces[0][:0]


class PackedPlan(Plan):
    """A call whose rows stand at different offsets or hold padding.

    Its tokens, row by row of each step, are one row of N.

    Args:
        starts: for each step, which of its row's tokens in this call is the first of it (R,).
        mask: B T, true at tokens.
    """

    def __init__(self, steps, starts, progress, mask):
        super().__init__(steps, progress, mask.shape[1])
        self.batch_size = mask.shape[0]
        # The columns of each row, those of tokens first: B T.
        columns = (~mask).long().argsort(dim=1, stable=True)
        self.gather, self.scatter = gather_scatter_indices(steps, starts, columns)

    def pack(self, x):
        return x.flatten(0, 1).index_select(0, self.gather)[None]

    def unpack(self, packed):
        packed = pad(packed[0], (0, 0, 0, 1))  # a row of zeros for the padding
        return packed.index_select(0, self.scatter).unflatten(0, (self.batch_size, -1))

    def split(self, packed):
        shapes = [(step.num_rows, step.tokens) for step in self.steps]
        pieces = packed[0].split([rows * tokens for rows, tokens in shapes])
        return [piece.unflatten(0, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def join(self, pieces):
        return torch.cat([piece.flatten(0, 1) for piece in pieces])[None]


class TokenPlan(Plan):
    """A call of one token per row that begins and completes no window.

    mask: B 1, false at rows that are finished, which may stand anywhere; None if there are none.
    """

    def __init__(self, progress, mask, window_length, in_place):
        before = progress.tokens_read
        count = torch.ones_like(before) if mask is None else mask[:, 0].long()
        flags = {"opens": False, "closes": False, "in_place": in_place}
        step = OffsetStep(window_length, 1, before % window_length, count, before, **flags)
        super().__init__([step], Progress(before + count, None, progress.forgotten), 1)


def plan_windows(progress, num_columns, mask, window_length, in_place=False):
    """Plan a call.

    Args:
        progress: before the call.
        num_columns: of the call.
        mask: B T, true at tokens, or None if all are.
        in_place: whether tokens may be written into the tensors of the memory.
    """
    in_place = in_place and not is_transformed()
    if progress.is_mid_window:
        return TokenPlan(progress, mask, window_length, in_place)
    if mask is None and progress.offset is not None:
        return plan_equal_rows(progress, num_columns, window_length, in_place)
    has_padding = mask is not None
    if not has_padding:
        rows = progress.tokens_read.shape[0]
        mask = progress.tokens_read.new_ones(rows, num_columns, dtype=torch.bool)
    if is_traced():
        return plan_for_tracing(progress, mask, window_length)
    offsets = (progress.tokens_read % window_length).tolist()
    if not has_padding and len(set(offsets)) == 1:
        known = Progress(progress.tokens_read, offsets[0], progress.forgotten)
        return plan_equal_rows(known, num_columns, window_length, in_place)
    if in_place and num_columns == 1:
        reading = [p for p, (is_token,) in zip(offsets, mask.tolist(), strict=True) if is_token]
        if all_mid_window(reading, window_length):
            return TokenPlan(progress, mask, window_length, in_place)
    return plan_rows(progress, offsets, mask, window_length)


def all_mid_window(offsets, window_length):
    """Whether a token at each of these offsets neither begins a window nor completes it."""
    return all(0 < offset < window_length - 1 for offset in offsets)


def plan_equal_rows(progress, num_columns, window_length, in_place=False):
    """Plan a call without padding whose rows stand at the same offset."""
    offset, done, steps = progress.offset, 0, []
    while done < num_columns:
        room, left = window_length - offset, num_columns - done
        tokens = left if left < room else room  # a branch, where min() gives an expression
        before = progress.tokens_read + done
        steps.append(Step(window_length, tokens, offset, before, in_place=in_place))
        offset, done = 0, done + tokens
    offset = (progress.offset + num_columns) % window_length
    after = Progress(progress.tokens_read + num_columns, offset, progress.forgotten)
    return Plan(steps, after, num_columns)


def plan_rows(progress, offsets, mask, window_length):
    """Plan a call whose rows have different offsets (B integers) or numbers of tokens."""
    counts, steps, starts = mask.sum(1), [], []
    have = counts.tolist()
    for rows, first, at, tokens in cut_rows(offsets, have, window_length):
        index, start = torch.tensor([rows, first], device=mask.device)
        before = progress.tokens_read[index] + start
        some = index if len(rows) < len(offsets) else None
        steps.append(make_step(window_length, at, tokens, before, some))
        starts.append(start)
    end = {(p + n) % window_length for p, n in zip(offsets, have, strict=True)}
    offset = end.pop() if len(end) == 1 else None
    after = Progress(progress.tokens_read + counts, offset, progress.forgotten)
    return PackedPlan(steps, starts, after, mask)


def cut_rows(offsets, have, window_length):
    """Cut rows into steps: what completes or continues windows, whole windows, and the rest.

    offsets, have: of each row, tokens in its open window and in this call. Yields lists with an
    integer per row: which rows, the first of its tokens, its offset, and its number of tokens.
    """
    pairs = list(zip(offsets, have, strict=True))
    heads = [min(n, window_length - p) if p or n < window_length else 0 for p, n in pairs]
    windows = [(n - head) // window_length for n, head in zip(have, heads, strict=True)]
    done = [head + k * window_length for head, k in zip(heads, windows, strict=True)]
    # Rows that complete a window apart from those that do not: summary tokens cost as much.
    closing = [b for b, head in enumerate(heads) if 0 < head == window_length - offsets[b]]
    others = [b for b, head in enumerate(heads) if 0 < head < window_length - offsets[b]]
    padding = [] if any(have) else list(range(len(have)))
    for rows in filter(None, (closing, others, padding)):
        yield rows, [0] * len(rows), [offsets[b] for b in rows], [heads[b] for b in rows]
    for i in range(max(windows)):
        rows = [b for b, k in enumerate(windows) if k > i]
        first = [heads[b] + i * window_length for b in rows]
        yield rows, first, [0] * len(rows), [window_length] * len(rows)
    rows = [b for b, n in enumerate(have) if n > done[b]]
    if rows:
        yield rows, [done[b] for b in rows], [0] * len(rows), [have[b] - done[b] for b in rows]


def make_step(window_length, offsets, tokens, tokens_read, rows):
    """Make the step of rows whose offsets and numbers of tokens are known (lists)."""
    if len(set(offsets)) == 1 and len(set(tokens)) == 1 and tokens[0] > 0:
        return Step(window_length, tokens[0], offsets[0], tokens_read, rows)
    active = {(p, n) for p, n in zip(offsets, tokens, strict=True) if n > 0}
    at = {p for p, _ in active}
    offset, count = torch.tensor([offsets, tokens], device=tokens_read.device)
    return OffsetStep(
        window_length,
        max(1, *tokens),
        offset,
        count,
        tokens_read,
        rows,
        opens=0 in at,
        closes=any(p + n == window_length for p, n in active),
        common_offset=at.pop() if len(at) == 1 else None,
    )


def plan_for_tracing(progress, mask, window_length):
    """Plan a call inside a graph: as many steps as rows at any offset could need."""
    num_columns = mask.shape[1]
    furthest = window_length - 1 if progress.offset is None else progress.offset
    offset, left = progress.tokens_read % window_length, mask.sum(1)
    taken, steps, starts = torch.zeros_like(left), [], []
    for i in range((furthest + num_columns + window_length - 1) // window_length):
        count = torch.minimum(left, window_length - offset)
        tokens = window_length if window_length < num_columns else num_columns
        closes = furthest + num_columns >= (i + 1) * window_length
        before = progress.tokens_read + taken
        steps.append(OffsetStep(window_length, tokens, offset, count, before, closes=closes))
        starts.append(taken)
        taken, left = taken + count, left - count
        offset = (offset + count) % window_length
    after = Progress(progress.tokens_read + taken, None, progress.forgotten)
    return PackedPlan(steps, starts, after, mask)


def gather_scatter_indices(steps, starts, columns):
    """Where each packed token comes from (N,), and where each column of the call went (B*T,).

    Both are flat. Slots that a row does not fill come from anywhere; padding went to N.
    columns: B T, those of each row, tokens first.
    """
    batch_size, width = columns.shape
    everyone = torch.arange(batch_size, device=columns.device)
    sources, targets = [], []
    for step, start in zip(steps, starts, strict=True):
        rows = (everyone if step.rows is None else step.rows)[:, None]
        token = torch.arange(step.tokens, device=columns.device)
        index = (start[:, None] + token).clamp(max=width - 1)
        source = rows * width + columns[rows, index]
        is_read = token < (step.tokens_after - step.tokens_read)[:, None]
        sources.append(source.flatten())
        targets.append(source.masked_fill(~is_read, batch_size * width).flatten())
    gather, target = torch.cat(sources), torch.cat(targets)
    count = gather.shape[0]
    packed = torch.arange(count, device=columns.device)
    scatter = packed.new_full((batch_size * width + 1,), count)
    return gather, scatter.scatter(0, target, packed)[:-1]


def join_parts(memory):
    """Join the fields that are tuples, the parts of a queue.

    The length of a queue is that of its first part, and the newest slots remain.
    """

    def join(parts):
        return append_fifo(parts[0], torch.cat(parts[1:], dim=2), 2)

    if all(isinstance(part, Tensor) for part in memory):
        return memory
    return type(memory)(*(x if isinstance(x, Tensor) else join(x) for x in memory))


def append_fifo(queue, new, axis):
    """Append to a queue, and drop the oldest beyond its length."""
    length = queue.shape[axis]
    joined = torch.cat((queue.to(new.dtype), new), axis)
    return joined.narrow(axis, joined.shape[axis] - length, length)


def resize(tensor, axis, size):
    """The shape of a tensor with another size along one axis."""
    shape = list(tensor.shape)
    shape[axis] = size
    return shape


def pad_to_shape(tensor, shape):
    """Append zeros along each axis, up to `shape`."""
    missing = [full - size for full, size in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [slots for after in reversed(missing) for slots in (0, after)])


def index_copy_rows(old, new, rows):
    """`old` with `rows` (R,) replaced by those of `new`, which may have fewer or more slots."""
    if new.numel() == 0:
        return old
    slots = [max(sizes) for sizes in zip(old.shape[1:], new.shape[1:], strict=True)]
    old = pad_to_shape(old, (old.shape[0], *slots)).to(new.dtype)
    return old.index_copy(0, rows, pad_to_shape(new, (new.shape[0], *slots)))


def where_rows(rows, new, old):
    """`new` in the rows of a mask (B,), else `old`; the shorter one is padded with zeros."""
    shape = [max(sizes) for sizes in zip(new.shape, old.shape, strict=True)]
    rows = rows.to(old.device).view(-1, *[1] * (old.dim() - 1))
    return torch.where(rows, pad_to_shape(new, shape).to(old.dtype), pad_to_shape(old, shape))


def along(index, axis, like):
    """B J -> B 1 .. J .. 1, with J along an axis of `like`."""
    shape = [1] * like.dim()
    shape[0], shape[axis] = index.shape
    return index.view(shape)


def is_locked_inference_tensor(tensor):
    """Whether a tensor was made in inference mode and may be written to in it alone."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return tensor.is_inference()
