"""Windows on a diagonal are read together: the wavefront.

A layer needs of a window what the layer below made of it, and its own memory of the window before.
So cells (layer, window) with the same sum do not depend on each other, and N layers read K windows
in N + K - 1 steps instead of N K:

                window 0  1  2  3
    layer 2            2  3  4  5       the step in which a cell is read; step 2 is a batch of
    layer 1            1  2  3  4       three windows, each with the weights and the memory of
    layer 0            0  1  2  3       its layer

A step is a call of one window whose rows belong to several layers: rows L B, layer by layer. What
runs it is `forward` of the layers' own class, on a copy of a layer that has the weights of L layers
(`side_by_side`). What only some of the layers do (a long-term memory) these do themselves, with
their rows (`DecoderLayer.own_steps`).

Only `config.schedule = "wavefront"` asks for it. Layers that may differ in more than their weights
are refused (`side_by_side.why_not_stackable`).

Weights are stacked anew in each call, which costs their size in memory. Dropout draws in another
order, and a weight that nothing depends on has a gradient of zeros instead of none.
"""

import copy
from functools import partial
from typing import Any

import torch

from .configuration_decoder import refuse_unknown_schedule
from .side_by_side import Weights, family_of, why_not_stackable, with_parts
from .tracing import is_traced
from .windows import Plan, Progress


def reads_diagonally(model, plan):
    """Whether a call is to be read by diagonals.

    Raises `ValueError` if the schedule is "wavefront" and the layers may differ in more than their
    weights.
    """
    if type(plan) is not Plan or len(plan.chunks) < 2 or is_traced():
        return False
    refuse_unknown_schedule(model.config.schedule)
    first, last = whole_windows(plan)
    recorded = plan.chunks[0].snapshots is not None
    if model.config.schedule != "wavefront" or recorded or last - first < 2:
        return False
    if len(model.layers) < 2:
        return False
    reason = why_not_stackable(model.layers)
    if reason is not None:
        raise ValueError(
            f"schedule is 'wavefront', but {reason}. Set model.config.schedule to 'layers'."
        )
    return True


def whole_windows(plan):
    """The first of the chunks that are whole windows, and the first behind them."""
    return int(plan.chunks[0].fill > 0), len(plan.chunks) - (not plan.chunks[-1].closes)


def read_diagonally(model, x, memories, plan):
    """As `model.read_by_layers`: whole windows by diagonals, what comes before and behind them
    layer by layer."""
    first, last = whole_windows(plan)
    cuts = [
        (plan.chunks[:first], model.read_by_layers),
        (plan.chunks[first:last], partial(read_windows, model)),
        (plan.chunks[last:], model.read_by_layers),
    ]
    parts = [(plan.part(chunks), read) for chunks, read in cuts if chunks]
    columns, flowed = x.split([part.num_columns for part, _ in parts], 1), []
    for piece, (part, read) in zip(columns, parts, strict=True):
        streams, memories = read(piece, memories, part)
        flowed.append(streams)
    return tuple(torch.cat(pieces, 1) for pieces in zip(*flowed, strict=True)), memories


def read_windows(model, x, memories, plan):
    """A call that is nothing but whole windows. x: B K*W D."""
    streams, num_windows = model.streams(x, plan), len(plan.chunks)
    windows = list(zip(*(stream.chunk(num_windows, 1) for stream in streams), strict=True))
    wavefront = Wavefront(list(model.layers), memories, plan)
    flowed = wavefront.run(windows)
    after = [
        layer.shut(memory, given)
        for layer, memory, given in zip(model.layers, wavefront.memories, memories, strict=True)
    ]
    return flowed, tuple(after)


class Wavefront:
    """Layers reading whole windows diagonal by diagonal.

    memories: one per layer, that of a layer on the diagonal as it was when the layer came there,
    but for what is the layer's own.
    """

    def __init__(self, layers, memories, plan):
        self.layers, self.plan, self.batch_size = layers, plan, plan.lanes
        self.family, num_windows = family_of(layers[0]), len(plan.chunks)
        pairs = zip(layers, memories, strict=True)
        self.memories = [layer.open(between_windows(layer, memory)) for layer, memory in pairs]
        fields, own = self.family.memory_type._fields, self.family.own_fields
        self.shared = [name for name in fields if name not in own]
        self.diagonals = [
            range(max(0, step + 1 - num_windows), min(len(layers), step + 1))
            for step in range(len(layers) + num_windows - 1)
        ]
        self.weights = Weights(list(dict.fromkeys(self.diagonals)), self.batch_size)
        self.step, self.range = 0, range(0)
        self.stack: Any = None

    def run(self, windows):
        """windows: for each the streams that enter the first layer, B ... -> what flows out of the
        last, joined along axis 1."""
        flowing, held, flowed = (), (), []
        num_layers, num_windows = len(self.layers), len(windows)
        for self.step in range(num_layers + num_windows - 1):
            if self.step < num_windows:
                flowing = joined(windows[self.step], flowing)
            if self.step < num_layers:
                held = joined(held, self.shared_of(self.memories[self.step]))
            flowing, held = self.read(flowing, held)
            if self.step + 1 >= num_layers:
                flowing, out = self.parted(flowing, -1)
                flowed.append(out)
            if self.step + 1 >= num_windows:
                done, held = self.parted(held, 1)
                self.put_back(self.step + 1 - num_windows, done)
        self.stack = None  # which knows its wavefront: a circle would stay in memory for a while
        return tuple(torch.cat(pieces, 1) for pieces in zip(*flowed, strict=True))

    def read(self, flowing, held):
        """One diagonal: streams and memories, L B ..., through a layer each."""
        diagonal = self.diagonals[self.step]
        if diagonal != self.range:
            self.range, self.stack = diagonal, self.stacked(diagonal)
        shared = dict(zip(self.shared, held, strict=True))
        memory = [shared.get(name) for name in self.family.memory_type._fields]
        outputs = self.stack.forward(*flowing, *memory, plan=self.call())
        after = self.family.memory_type(*outputs[len(flowing) :])
        return outputs[: len(flowing)], self.shared_of(after)

    def call(self):
        """The diagonal as a call of one window."""
        chunks = [self.plan.chunks[self.step - layer] for layer in self.range]
        window_length, forgotten = chunks[0].window_length, chunks[0].forgotten
        tokens_read = torch.cat([chunk.tokens_read for chunk in chunks])
        plan = Plan(Progress(tokens_read, 0), window_length, window_length)
        plan.leave_out({kind: count.repeat(len(chunks)) for kind, count in forgotten.items()})
        return plan

    def stacked(self, diagonal):
        """The layers of a diagonal as one."""
        stack, self.weights.layers = copy.copy(self.layers[0]), diagonal
        stack.__class__ = self.family
        with_parts(stack, self.layers, self.weights)
        bias = self.weights.by_row("position", self.position_biases)
        stack.position_bias = lambda chunk: bias
        for name in {name for i in diagonal for name in self.layers[i].own_steps}:
            setattr(stack, name, partial(self.take_own_step, name))
        return stack

    def position_biases(self):
        """Of a whole window, one per layer."""
        return [layer.position_bias(self.plan.chunks[0]) for layer in self.layers]

    def take_own_step(self, name, *given):
        """A step that some layers of the diagonal take in their own way, each with its rows."""
        *tensors, memory, _ = given
        pieces = [list(tensor.split(self.batch_size)) for tensor in tensors]
        changed = False
        for place, i in enumerate(self.range):
            if name not in self.layers[i].own_steps:
                continue
            rows, chunk = [each[place] for each in pieces], self.plan.chunks[self.step - i]
            found = getattr(self.layers[i], name)(*rows, self.memories[i], chunk)
            if isinstance(found, torch.Tensor):
                pieces[-1][place], changed = found, True
            else:
                self.memories[i] = found
        return torch.cat(pieces[-1]) if changed else memory

    def shared_of(self, memory):
        return tuple(getattr(memory, name) for name in self.shared)

    def put_back(self, layer, held):
        """A layer has read its last window."""
        shared = dict(zip(self.shared, held, strict=True))
        self.memories[layer] = self.memories[layer]._replace(**shared)

    def parted(self, tensors, layers):
        """Rows before and behind a border, given in layers from the beginning or from the end. What
        leaves the diagonal is a copy, which keeps nothing else alive."""
        border = layers * self.batch_size
        pairs = [tensor.tensor_split((border,)) for tensor in tensors]
        before, behind = zip(*pairs, strict=True)
        if layers > 0:
            return tuple(part.clone() for part in before), behind
        return before, tuple(part.clone() for part in behind)


def between_windows(layer, memory):
    """A memory without slots for an open window."""
    shapes = layer.memory_shapes()
    return memory._replace(
        **{
            name: getattr(memory, name).narrow(axis, 0, shapes[name][axis - 1])
            for name, axis in layer.window_axis.items()
        }
    )


def joined(before, behind):
    """Rows behind rows; () has none."""
    if not (before and behind):
        return before or behind
    return tuple(torch.cat(pair) for pair in zip(before, behind, strict=True))
