"""A history of any length as N numbers per channel: HiPPO-LegS (Gu et al., 2020, arXiv 2008.07669).

A signal f on (0, t] is squeezed onto (0, 1], 1 being now, and projected on Legendre polynomials:

    φ_n(x) = √(2n+1) P_n(2x - 1)      c_n(t) = ∫ f(t x) φ_n(x) dx      f(t x) ≈ Σ c_n φ_n(x)

A token is a piece of length 1 on which f is constant. What was read up to t0 and a block of tokens
up to t1 then give the coefficients at t1 exactly, without a step of a differential equation, since
a polynomial on (0, t0] is projected anew by an integral and a token's piece by its primitive:

    c(t1) = P c(t0) + K f                   P = r ∫ φ(r u) φ(u)ᵀ du        r = t0 / t1
                                            K_j = Φ(x_j) - Φ(x_{j-1})      x_j = (t0 + j) / t1

with Φ the primitive of φ, zero at 0. Integrals are sums over Gauss-Legendre nodes, which are exact
for polynomials, and a polynomial at any x is interpolated from its values at the nodes (barycentric
formula; Berrut & Trefethen, 2004, §4), so that no bank needs a loop over n or over tokens. P keeps
lengths or shortens them (its norm is √r): rounding errors die out, whatever the length.

Banks are computed in float64. They depend on nothing but their arguments, so those of one window
are made once for all layers and documents and kept as long as there is room.
"""

import math
from collections import OrderedDict
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from .tracing import is_traced

NEWTON_STEPS = 8
ROOM = 2**28  # bytes of banks that are kept


class Transition(NamedTuple):
    """From the coefficients before a block of tokens to those after it: P c + K f."""

    past: Tensor  # ... N N
    block: Tensor  # ... N W


# Polynomials at the nodes


def _differences(below_one, count):
    """P_0 to P_{count-1} at 1 - `below_one`, by recurrence over their differences, which loses no
    digit near 1. Returns count M."""
    value, difference, rows = torch.ones_like(below_one), torch.zeros_like(below_one), []
    for n in range(count):
        rows.append(value)
        difference = (n * difference - (2 * n + 1) * below_one * value) / (n + 1)
        value = value + difference
    return torch.stack(rows)


def _upper_nodes(count):
    # The Gauss-Legendre nodes in [0, 1), as angles from 1, and their weights.
    k = torch.arange(1, (count + 1) // 2 + 1, dtype=torch.float64)
    angle = math.pi * (k - 0.25) / (count + 0.5)
    for _ in range(NEWTON_STEPS):
        below_one = 2 * (angle / 2).sin().square()
        before, value = _differences(below_one, count + 1)[-2:]
        slope = -count * (before - value + below_one * value) / angle.sin()  # dP/dangle
        angle = angle - value / slope
    return angle, 2 / slope.square()


class Nodes(NamedTuple):
    """Gauss-Legendre nodes on (0, 1), ascending, and what is known there, in float64."""

    place: Tensor  # M
    weight: Tensor  # M, of the integral
    barycentric: Tensor  # M, of the interpolation, up to a factor
    basis: Tensor  # M N, φ
    primitive: Tensor  # M N, Φ


@lru_cache(maxsize=8)
def nodes(order, device=torch.device("cpu")) -> Nodes:  # noqa: B008
    """N+1 nodes, as the primitive of φ_{N-1} needs them for its interpolation."""
    if device.type != "cpu":
        with torch.inference_mode(False):
            return Nodes(*(tensor.to(device) for tensor in nodes(order)))
    count = order + 1
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        angle, weight = _upper_nodes(count)
        upper = _differences(2 * (angle / 2).sin().square(), count)
        mirrored = slice(0, count // 2)  # the node in the middle of an odd number is there once
        sign = (-1.0) ** torch.arange(count, dtype=torch.float64)
        legendre = torch.cat((upper[:, mirrored] * sign[:, None], upper.flip(1)), dim=1)  # N+1 M
        angle, weight = (torch.cat((t[mirrored], t.flip(0))) for t in (angle, weight))
        sine, below = angle.sin(), (angle / 2).sin().square()
        place = torch.where(torch.arange(count) < count // 2, below, (angle / 2).cos().square())
        size = torch.arange(1, 2 * order, 2, dtype=torch.float64).sqrt()[:, None]  # √(2n+1)
        primitive = torch.cat((2 * place[None], legendre[2:] - legendre[:-2]))[:order]
        return Nodes(
            place,
            weight / 2,
            sign * weight.sqrt() * sine,
            (legendre[:order] * size).T.contiguous(),
            (primitive / (2 * size)).T.contiguous(),
        )


def where_exact(device):
    """Where banks are made that are needed on a device: there, if it knows float64."""
    return torch.device("cpu") if device.type == "mps" else device


# Banks. known: `nodes`, on the device of the other arguments.


def interpolation(x, known):
    """x: ... in [0, 1], float64 -> ... M, what the values of a polynomial at the nodes count for
    its value at x."""
    distance = x[..., None] - known.place
    here = distance == 0
    share = known.barycentric / distance.masked_fill(here, 1)
    share = torch.where(here.any(-1, keepdim=True), here.to(share.dtype), share)
    return share / share.sum(-1, keepdim=True)


def basis(x, known) -> Tensor:
    """φ at x: ... -> ... N. The reconstruction at x is its product with the coefficients."""
    return interpolation(x, known) @ known.basis


def transition(tokens_read, length, known) -> Transition:
    """How the coefficients change with a block of `length` tokens behind `tokens_read` (..., an
    integer each), in float64."""
    start = tokens_read.double()
    end = start + length
    ratio = start / end
    squeezed = basis(ratio[..., None] * known.place, known)  # ... M N
    weighted = known.basis * known.weight[:, None]
    past = ratio[..., None, None] * (squeezed.transpose(-1, -2) @ weighted)
    borders = torch.arange(length + 1, device=start.device)
    x = (start[..., None] + borders) / end[..., None]
    primitive = interpolation(x, known) @ known.primitive
    return Transition(past, primitive.diff(dim=-2).transpose(-1, -2))


# Points of the past: tokens_read, R integers of 1 or more -> R num_samples


def uniform(num_samples, tokens_read):
    """Points spread evenly over the past (ours)."""
    number = torch.arange(num_samples, dtype=torch.float64, device=tokens_read.device)
    return ((number + 0.5) / num_samples).expand(*tokens_read.shape, -1)


def exponential(num_samples, tokens_read):
    """Points whose ages grow by a constant factor, from the newest token to the oldest (ours)."""
    number = torch.arange(num_samples, dtype=torch.float64, device=tokens_read.device)
    tokens_read = tokens_read.double()[..., None]
    age = tokens_read ** ((num_samples - 1 - number) / max(1, num_samples - 1))
    return 1 - (age - 0.5) / tokens_read


SAMPLINGS = {"uniform": uniform, "exponential": exponential}


# What is kept


class Kept:
    """Results of functions, the newest of them, as far as they find room."""

    def __init__(self, room):
        self.room, self.bytes, self.results = room, 0, OrderedDict()
        self.lock = Lock()  # several may read at once, as in a server

    def get(self, key, make):
        """The tensors made by `make()` for a key."""
        with self.lock:
            if key not in self.results:
                with torch.inference_mode(False), torch.no_grad():  # for all calls to come
                    self.results[key] = make()
                self.bytes += size_of(self.results[key])
            self.results.move_to_end(key)
            while len(self.results) > 1 and self.bytes > self.room:
                _, oldest = self.results.popitem(last=False)
                self.bytes -= size_of(oldest)
            return self.results[key]


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


KEPT = Kept(ROOM)


def kept_transition(tokens_read, length, known, like) -> Transition:
    """`transition` in the type and on the device of `like`; tokens_read: an integer, or a tensor
    (R,) of a graph that is being captured."""

    def make():
        start = torch.as_tensor(tokens_read, device=known.place.device)
        return Transition(*(tensor.to(like) for tensor in transition(start, length, known)))

    if isinstance(tokens_read, Tensor):
        return make()
    order = known.basis.shape[1]
    return KEPT.get((tokens_read, length, order, like.device, like.dtype), make)


def kept_basis(points, num_samples, tokens_read, known, like) -> Tensor:
    """`basis` at the points of the past that a function chooses, ... num_samples N, in the type and
    on the device of `like`; tokens_read as above."""
    if isinstance(tokens_read, Tensor):
        return basis(points(num_samples, tokens_read), known).to(like)
    x = points(num_samples, torch.tensor(tokens_read)).double().cpu()
    refuse_other_points(x, num_samples, tokens_read)
    key = (x.numpy().tobytes(), known.basis.shape[1], like.device, like.dtype)
    return KEPT.get(key, lambda: (basis(x.to(known.place.device), known).to(like),))[0]


def refuse_other_points(x, num_samples, tokens_read):
    """Points of a function that a user gave lie in the past."""
    if x.shape != (num_samples,) or not ((x > 0) & (x <= 1)).all():
        raise ValueError(
            f"the sampling gave points of shape {tuple(x.shape)} between {float(x.min()):g} and "
            f"{float(x.max()):g} after {tokens_read} tokens: it must give num_memory_samples="
            f"{num_samples} numbers greater than 0, the first token, and at most 1, now"
        )


def together(run, tokens_read, *tensors):
    """`run(tokens read, *rows)` for the rows of `tensors` that have read equally much; rows come
    back in their order. tokens_read: R; one of those, a tensor (R,) while a graph is captured."""
    if is_traced() or tokens_read.is_meta:
        return run(tokens_read, *tensors)
    read = tokens_read.tolist()
    if len(set(read)) == 1:
        return run(read[0], *tensors)
    groups = [[row for row, r in enumerate(read) if r == one] for one in sorted(set(read))]
    index = [torch.tensor(rows, device=tokens_read.device) for rows in groups]
    parts = [
        run(one, *(t.index_select(0, rows) for t in tensors))
        for one, rows in zip(sorted(set(read)), index, strict=True)
    ]
    order = torch.cat(index).argsort()
    return tuple(torch.cat(made).index_select(0, order) for made in zip(*parts, strict=True))
