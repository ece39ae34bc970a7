"""The modules of several layers as one: row group i of its input meets the weights of layer i.

    x: L*B T D  ->  L*B T D,   rows layer by layer, B of each

Each weight is stacked, L ..., from the parameters of the layers, which thereby get their gradients.
Linear maps become one product of L matrices, norms have a gain per layer, and so on; what has no
weights stays what it is, and a module made of modules becomes a copy of the first with the stacks
as its parts, so that its own `forward` is what runs.

So whatever of a layer is not one of these weights is taken from the first layer. That all layers
have the same is not assumed: `why_not_stackable` compares them before each call, and refuses every
class of modules, attribute, hook and parameter that it does not know.
"""

import copy
from inspect import unwrap

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2CLS
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention, Temperature
from .attention_map import AttentionMap
from .norm import RMSNorm, composed_by_torch, normalise
from .position import RelativePosition
from .tracing import needs_composed_gradient


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
        is_composed = needs_composed_gradient(*grads)  # which cannot be written into `whole`
        for layers, grad in zip(ctx.ranges, grads, strict=True):
            if grad is not None and is_composed:
                beside = layers.start, shape[0] - layers.stop
                whole = whole + nn.functional.pad(grad, [0, 0] * (len(shape) - 1) + [*beside])
            elif grad is not None:
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
        key = *modules, name  # not the first alone, which may have two places in its layer
        return self.made(key, lambda: [getattr(m, name) for m in modules], dtype)

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
    for name, part in modules[0]._modules.items():
        if part is not None and name not in _own_parts(modules[0]):
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
            tuple(modules), lambda: [module.weight.abs() for module in modules]
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

# The parameters that each of these stacks.
STACKED_NAMES = {
    nn.Linear: {"weight", "bias"},
    RMSNorm: {"weight"},
    Temperature: {"weight"},
    RelativePosition: {"weight"},
}
# Modules that treat each row for itself, whose code is known to need nothing but the attributes
# that are compared. A layer names those of its own file (`DecoderLayer.stacks`).
ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
KNOWN = {Attention, AttentionMap, nn.Dropout, *STACKED_NAMES, *ACTIVATIONS}
# What every module has that is no part of what it computes, or is looked at by itself.
NOT_COMPARED = vars(nn.Module()).keys() - {"training"} | {"_is_hf_initialized", "extra_repr"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


# These methods a layer calls itself before the first and after the last window, and never a stack.
CALLED_ALONE = {"__init__", "open", "shut", "to_generation", "to_training", "figures"}


def family_of(layer):
    """The class whose code reads a layer: its own, or the one that it extends by `own_steps`."""
    return type(layer).__base__ if "own_steps" in vars(type(layer)) else type(layer)


def why_not_stackable(layers):
    """Name what layers may differ in besides their weights, or return None if there is nothing."""
    return next(_reasons(layers), None)


def _reasons(layers):
    # Generators, of which the first reason is used and nothing behind it runs.
    if _has_any_global_hook():
        yield "hooks are registered for all modules"
    family = family_of(layers[0])
    for i, layer in enumerate(layers):
        kind = type(layer).__name__
        if "stacks" not in vars(family_of(layer)):
            yield f"layers.{i} is a {kind}, which does not say that its layers can be stacked"
        if family_of(layer) is not family:
            yield f"layers.{i} is a {kind}, layers.0 a {type(layers[0]).__name__}"
        for name in _methods_replaced(type(layer), family) - {*layer.own_steps} - CALLED_ALONE:
            yield f"layers.{i} is a {kind}, whose {name} would not be called"
    yield from _differences(list(layers), "", {*KNOWN, *family.stacks, *map(type, layers)})


def _methods_replaced(kind, family):
    # Unwrapped, since transformers wraps `forward` again in each subclass.
    pairs = {n: (v, getattr(family, n, None)) for n, v in vars(kind).items() if callable(v)}
    return {n for n, pair in pairs.items() if pair[1] and len({*map(unwrap, pair)}) > 1}


def _differences(modules, path, known):
    # modules: those with the same path, one of each layer
    for i, module in enumerate(modules):
        yield from (f"layers.{i}{path}{reason}" for reason in _unknown(module, known))
    if path and len({*map(type, modules)}) > 1:
        return  # each is called with its own rows (`Apart`)
    first = _contents(modules[0])
    for i, module in enumerate(modules[1:], 1):
        found = _contents(module)
        for name in first | found:
            here, there = found.get(name), first.get(name)
            if here is not there and not _is_same_value(here, there):
                yield f"layers.{i}{path}.{name} is {here!r:.80}, that of layers.0 is {there!r:.80}"
    for name, child in modules[0]._modules.items():
        if child is not None and name not in _own_parts(modules[0]):
            children = [module._modules[name] for module in modules]
            yield from _differences(children, f"{path}.{name}", known)


def _unknown(module, known):
    kind = type(module)
    if kind not in known:
        yield f" is a {kind.__name__}, whose code is not known to work on a stack of layers"
    if _has_hooks(module):
        yield " has hooks"
    for name, value in vars(module).items():
        if name not in NOT_COMPARED and getattr(kind, name, value) is not value:
            yield f" has a {name} of its own"
    yield from _unknown_weights(module)


def _unknown_weights(module):
    weights = {n: w for n, w in module._parameters.items() if n not in _own_parts(module)}
    stackable = STACKED_NAMES.get(type(module), set())
    if weights.keys() != stackable:
        names = ", ".join(weights), ", ".join(sorted(stackable)) or "none"
        yield f" has the parameters {names[0]}; {names[1]} can be stacked"
    if module._buffers:
        yield f" has the buffers {', '.join(module._buffers)}; none can be stacked"
    for name, weight in weights.items():
        if weight is not None and (type(weight) is not nn.Parameter or weight.is_meta):
            found = f"{type(weight).__name__} on {weight.device}"
            yield f".{name} is a {found}, not an nn.Parameter with its numbers"


def _has_hooks(module):
    # Those of transformers do nothing unless a call asks for attentions or hidden states.
    hooks = (hook for name in HOOKS for hook in getattr(module, name).values())
    return any(getattr(h, "__module__", "") != capture_outputs.__module__ for h in hooks)


def _contents(module):
    """Everything that may make two modules of one class differ, but for the numbers of weights."""
    contents = {n: value for n, value in vars(module).items() if n not in NOT_COMPARED}
    for name, weight in module._parameters.items():
        kind = None if weight is None else (*weight.shape, str(weight.dtype), str(weight.device))
        contents[name] = kind
    contents |= {name: child is not None for name, child in module._modules.items()}
    for name in _own_parts(module):
        contents.pop(name, None)
    return contents


def _own_parts(module):
    return getattr(type(module), "own_parts", ())


def _is_same_value(a, b):
    # Whether two objects are the same value for sure: numbers, strings and tuples of them.
    simple = bool, int, float, str
    parts = [*a, *b] if type(a) is type(b) is tuple else [a, b]
    return all(type(part) in simple for part in parts) and repr(a) == repr(b)
