"""The modules of several layers as one: row group i of its input meets the weights of layer i.

    x: L*B T D  ->  L*B T D,   rows layer by layer, B of each

Each weight is stacked, L ..., from the parameters of the layers, which thereby get their gradients.
Linear maps become one product of L matrices, norms have a gain per layer, and so on; what has no
weights stays what it is, and a module made of modules becomes a copy of the first with the stacks
as its parts, so that its own `forward` is what runs.
"""

import copy

import torch
from torch import nn

from .attention import Temperature
from .norm import RMSNorm, composed_by_torch, normalise
from .position import RelativePosition


class SideBySide(torch.autograd.Function):
    """A tensor of each layer, stacked once; for each range of layers its part of that, L ...

    One node for all parts: no part is a copy, and none has a gradient that is larger than itself.
    """

    @staticmethod
    def forward(ctx, ranges, dtype, *tensors):
        ctx.set_materialize_grads(False)
        whole = torch.stack(tensors)
        ctx.ranges, ctx.kind = ranges, (whole.shape, whole.dtype, whole.device)
        whole = whole.to(dtype)
        return tuple(whole[layers.start : layers.stop] for layers in ranges)

    @staticmethod
    def backward(ctx, *grads):
        shape, dtype, device = ctx.kind
        # Axes in memory as in the gradients, which for matrices are transposed.
        like = next(grad for grad in grads if grad is not None)
        order = sorted(range(len(shape)), key=like.stride, reverse=True)
        whole = torch.empty_permuted(shape, order, dtype=dtype, device=device).zero_()
        for layers, grad in zip(ctx.ranges, grads, strict=True):
            if grad is not None:
                whole[layers.start : layers.stop] += grad
        return None, None, *whole.unbind()


class Weights:
    """What the layers have in one place, side by side, for one range of layers at a time.

    ranges: all that there will be; batch_size: rows of each layer; layers: the range of now.
    """

    def __init__(self, ranges, batch_size):
        self.ranges, self.batch_size, self.known = ranges, batch_size, {}
        self.layers = ranges[0]

    def of(self, modules, name, dtype=None):
        """The weight `name` of modules that have the same place in their layers."""
        return self.made((modules[0], name), lambda: [getattr(m, name) for m in modules], dtype)

    def by_row(self, key, make):
        """As `made`, for each row of the batch, L*B ..."""

        def repeated():
            return [tensor.expand(self.batch_size, *tensor.shape) for tensor in make()]

        return self.made(key, repeated).flatten(0, 1)

    def made(self, key, make, dtype=None):
        """`make()`: a tensor for each of all layers, asked for once -> those of the range, L ..."""
        if key not in self.known:
            tensors = make()
            parts = SideBySide.apply(self.ranges, dtype or tensors[0].dtype, *tensors)
            self.known[key] = dict(zip(self.ranges, parts, strict=True))
        return self.known[key][self.layers]


def stacked(modules, weights):
    """What treats the rows of each layer as the layer's own module does. modules: of all layers."""
    if len({type(module) for module in modules}) > 1:
        return Apart(modules[weights.layers.start : weights.layers.stop], weights.batch_size)
    if type(modules[0]) in GROUPED:
        return GROUPED[type(modules[0])](modules, weights)
    if not modules[0]._modules:
        return modules[0]  # without weights
    return with_parts(copy.copy(modules[0]), modules, weights)


def with_parts(stack, modules, weights):
    """`stack`, the copy of a module, with what all of the modules are made of."""
    for name in modules[0]._modules:
        if all(name in module._modules for module in modules):
            parts = [module._modules[name] for module in modules]
            vars(stack)[name] = stacked(parts, weights)  # found before what the copy shares
    return stack


class Apart:
    """Modules that differ: each has its rows."""

    def __init__(self, modules, batch_size):
        self.modules, self.batch_size = modules, batch_size

    def __call__(self, x, *given):
        pieces = zip(self.modules, x.split(self.batch_size), strict=True)
        return torch.cat([module(piece, *given) for module, piece in pieces])


class GroupedLinear:
    """nn.Linear: one product of L matrices."""

    def __init__(self, modules, weights):
        # Under autocast converted once and not with every product.
        kind, dtype = modules[0].weight.device.type, None
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        self.weight, self.bias = weights.of(modules, "weight", dtype).mT, None  # L I O
        if modules[0].bias is not None:
            self.bias = weights.of(modules, "bias", dtype)[:, None]  # L 1 O

    def __call__(self, x):
        groups, _, width = self.weight.shape
        rows = x.reshape(groups, -1, x.shape[-1])
        if self.bias is None:
            y = torch.bmm(rows, self.weight)
        else:
            y = torch.baddbmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], width)


class GroupedNorm:
    """RMSNorm: a gain per layer."""

    def __init__(self, modules, weights):
        self.gain = weights.of(modules, "weight")[:, None, None]  # L 1 1 D
        self.eps = modules[0].eps

    def __call__(self, x):
        # x: L*B T D
        groups, size = self.gain.shape[0], x.shape[-1]
        rows = x.to(self.gain.dtype).unflatten(0, (groups, -1))
        if composed_by_torch(rows):
            return normalise(rows, self.gain, size, self.eps).flatten(0, 1)
        return (nn.functional.rms_norm(rows, (size,), None, self.eps) * self.gain).flatten(0, 1)


class GroupedTemperature:
    """Temperature: one per layer and head."""

    def __init__(self, modules, weights):
        self.by_row = weights.by_row(
            modules[0], lambda: [module.weight.abs() for module in modules]
        )  # L*B H

    def __call__(self, dim):
        return self.by_row.view(*self.by_row.shape, *[1] * (dim - 1))


def no_position(modules, weights):
    """The position bias of a whole window is made once, by the layers themselves."""


GROUPED = {
    nn.Linear: GroupedLinear,
    RMSNorm: GroupedNorm,
    Temperature: GroupedTemperature,
    RelativePosition: no_position,
}
