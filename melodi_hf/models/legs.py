"""A history of any length as N numbers per channel: HiPPO-LegS.

Reference: Gu et al., 2020, arXiv 2008.07669.

A signal f on (0, t] is scaled to (0, 1], where 1 is now, and projected on Legendre polynomials:

    φ_n(x) = √(2n+1) P_n(2x - 1)      c_n(t) = ∫ f(t x) φ_n(x) dx      f(t x) ≈ Σ c_n φ_n(x)

A token is an interval of length 1 on which f is constant. The coefficients at t0 and a block of
tokens up to t1 then give the coefficients at t1 exactly, without a step of a differential equation:
a polynomial on (0, t0] is projected again by an integral, and a token by its primitive:

    c(t1) = P c(t0) + K f                   P = r ∫ φ(r u) φ(u)ᵀ du        r = t0 / t1
                                            K_j = Φ(x_j) - Φ(x_{j-1})      x_j = (t0 + j) / t1

with Φ the primitive of φ, zero at 0. Integrals are sums over Gauss-Legendre nodes, which are exact
for polynomials, and a polynomial at any x is interpolated from its values at the nodes (barycentric
formula; Berrut & Trefethen, 2004, §4), so the matrices ("banks") P, K and φ(x) need no loop over n
or over tokens. The norm of P is √r <= 1: rounding errors decay, whatever the length.

Banks are computed in float64. They depend only on their arguments, so all layers and documents
share those of one window, which are cached.
"""

import math
from collections import OrderedDict
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_decoder import require
from .kernels import is_traced

NEWTON_STEPS = 8
CACHE_BYTES = 2**28  # of cached banks


class Transition(NamedTuple):
    """Matrices of the update with a block of tokens: c -> P c + K f."""

    past: Tensor  # P, ... N N
    block: Tensor  # K, ... N W


# Polynomials at the nodes


def _legendre_below_one(below_one, count):
    """Compute P_0 to P_{count-1} at 1 - below_one: count M.

    The recurrence is over their differences, which loses no digit near 1.
    """
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
        previous, value = _legendre_below_one(below_one, count + 1)[-2:]
        slope = -count * (previous - value + below_one * value) / angle.sin()  # dP/dangle
        angle = angle - value / slope
    return angle, 2 / slope.square()


class Nodes(NamedTuple):
    """Gauss-Legendre nodes on (0, 1), ascending, and values at each, in float64."""

    x: Tensor  # M
    weight: Tensor  # M, of the integral
    barycentric: Tensor  # M, weight of the interpolation, up to a factor
    basis: Tensor  # M N, φ
    primitive: Tensor  # M N, Φ


@lru_cache(maxsize=8)
def gauss_legendre_nodes(order, device=torch.device("cpu")) -> Nodes:  # noqa: B008
    """Compute N+1 nodes, as many as the interpolation of the primitive of φ_{N-1} needs."""
    if device.type != "cpu":
        with torch.inference_mode(False):
            return Nodes(*(tensor.to(device) for tensor in gauss_legendre_nodes(order)))
    count = order + 1
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        angle, weight = _upper_nodes(count)
        upper = _legendre_below_one(2 * (angle / 2).sin().square(), count)
        mirrored = slice(0, count // 2)  # the middle node of an odd number is not mirrored
        sign = (-1.0) ** torch.arange(count, dtype=torch.float64)
        legendre = torch.cat((upper[:, mirrored] * sign[:, None], upper.flip(1)), dim=1)  # N+1 M
        angle, weight = (torch.cat((t[mirrored], t.flip(0))) for t in (angle, weight))
        sine, below = angle.sin(), (angle / 2).sin().square()
        x = torch.where(torch.arange(count) < count // 2, below, (angle / 2).cos().square())
        factor = torch.arange(1, 2 * order, 2, dtype=torch.float64).sqrt()[:, None]  # √(2n+1)
        primitive = torch.cat((2 * x[None], legendre[2:] - legendre[:-2]))[:order]
        return Nodes(
            x,
            weight / 2,
            sign * weight.sqrt() * sine,
            (legendre[:order] * factor).T.contiguous(),
            (primitive / (2 * factor)).T.contiguous(),
        )


def float64_device(device):
    """Return the device on which banks for `device` are computed: the CPU if it lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device


# Banks. nodes: `Nodes` on the device of the other arguments.


def interpolation(x, nodes):
    """Compute the weights with which values at the nodes give a polynomial's value at x.

    x: ... in [0, 1], float64. Returns ... M.
    """
    distance = x[..., None] - nodes.x
    is_node = distance == 0
    share = nodes.barycentric / distance.masked_fill(is_node, 1)
    share = torch.where(is_node.any(-1, keepdim=True), is_node.to(share.dtype), share)
    return share / share.sum(-1, keepdim=True)


def basis(x, nodes) -> Tensor:
    """Compute φ at x: ... -> ... N. Its product with the coefficients reconstructs f at x."""
    return interpolation(x, nodes) @ nodes.basis


def transition(tokens_read, length, nodes) -> Transition:
    """Compute the update with a block of `length` tokens that follows `tokens_read` tokens.

    tokens_read: ..., integers. Returns matrices in float64.
    """
    start = tokens_read.double()
    end = start + length
    ratio = start / end
    scaled = basis(ratio[..., None] * nodes.x, nodes)  # ... M N
    weighted = nodes.basis * nodes.weight[:, None]
    past = ratio[..., None, None] * (scaled.transpose(-1, -2) @ weighted)
    borders = torch.arange(length + 1, device=start.device)
    x = (start[..., None] + borders) / end[..., None]
    primitive = interpolation(x, nodes) @ nodes.primitive
    return Transition(past, primitive.diff(dim=-2).transpose(-1, -2))


# Points of the past at which it is reconstructed. tokens_read: R integers, 1 or more.


def uniform(num_samples, tokens_read):
    """Spread the points evenly over the past (ours): R num_samples."""
    number = torch.arange(num_samples, dtype=torch.float64, device=tokens_read.device)
    return ((number + 0.5) / num_samples).expand(*tokens_read.shape, -1)


def exponential(num_samples, tokens_read):
    """Let the age grow by a constant factor from the newest token to the oldest (ours)."""
    number = torch.arange(num_samples, dtype=torch.float64, device=tokens_read.device)
    tokens_read = tokens_read.double()[..., None]
    age = tokens_read ** ((num_samples - 1 - number) / max(1, num_samples - 1))
    return 1 - (age - 0.5) / tokens_read


SAMPLINGS = {"uniform": uniform, "exponential": exponential}


# Cached banks


class LruCache:
    """The most recently used results of functions, up to a number of bytes."""

    def __init__(self, max_bytes):
        self.max_bytes, self.bytes, self.results = max_bytes, 0, OrderedDict()
        self.lock = Lock()  # a server may read from several threads

    def get(self, key, make):
        """Return the tensors for a key, computed by `make()` if they are not cached."""
        with self.lock:
            if key not in self.results:
                # Ordinary tensors, which later calls with gradients can use.
                with torch.inference_mode(False), torch.no_grad():
                    self.results[key] = make()
                self.bytes += num_bytes(self.results[key])
            self.results.move_to_end(key)
            while len(self.results) > 1 and self.bytes > self.max_bytes:
                _, oldest = self.results.popitem(last=False)
                self.bytes -= num_bytes(oldest)
            return self.results[key]


def num_bytes(tensors):
    """Sum the sizes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


BANKS = LruCache(CACHE_BYTES)


def cached_transition(tokens_read, length, nodes, like) -> Transition:
    """Return `transition`, cached, with the dtype and the device of `like`.

    tokens_read: an integer, or a tensor (R,) while a graph is traced; then nothing is cached.
    """

    def make():
        start = torch.as_tensor(tokens_read, device=nodes.x.device)
        return Transition(*(tensor.to(like) for tensor in transition(start, length, nodes)))

    if isinstance(tokens_read, Tensor):
        return make()
    order = nodes.basis.shape[1]
    return BANKS.get((tokens_read, length, order, like.device, like.dtype), make)


def cached_basis(points, num_samples, tokens_read, nodes, like) -> Tensor:
    """Return `basis` at the points that a function chooses, cached: ... num_samples N.

    points: as `uniform`; tokens_read, like: as in `cached_transition`.
    """
    if isinstance(tokens_read, Tensor):
        return basis(points(num_samples, tokens_read), nodes).to(like)
    x = points(num_samples, torch.tensor(tokens_read)).double().cpu()
    check_points(x, num_samples, tokens_read)
    key = (x.numpy().tobytes(), nodes.basis.shape[1], like.device, like.dtype)
    return BANKS.get(key, lambda: (basis(x.to(nodes.x.device), nodes).to(like),))[0]


def check_points(x, num_samples, tokens_read):
    """Check that the points of a user's function lie in the past."""
    require(
        x.shape == (num_samples,) and ((x > 0) & (x <= 1)).all(),
        f"the sampling gave points of shape {tuple(x.shape)} between {float(x.min()):g} and "
        f"{float(x.max()):g} after {tokens_read} tokens: it must give num_memory_samples="
        f"{num_samples} numbers greater than 0, the first token, and at most 1, now",
    )


def group_by_position(run, tokens_read, *tensors):
    """Call `run(tokens_read, *tensors)` once for the rows that have read equally many tokens.

    Args:
        run: a function of an integer and rows of the tensors, which returns tensors of as many
            rows. While a graph is traced it is called once, with the tensor `tokens_read`.
        tokens_read: R.
        tensors: R ...

    Returns:
        The results for all rows, in their order.
    """
    if is_traced() or tokens_read.is_meta:
        return run(tokens_read, *tensors)
    read = tokens_read.tolist()
    values = sorted(set(read))
    if len(values) == 1:
        return run(values[0], *tensors)
    groups = [[row for row, r in enumerate(read) if r == value] for value in values]
    index = [torch.tensor(rows, device=tokens_read.device) for rows in groups]
    parts = [
        run(value, *(t.index_select(0, rows) for t in tensors))
        for value, rows in zip(values, index, strict=True)
    ]
    order = torch.cat(index).argsort()
    return tuple(torch.cat(part).index_select(0, order) for part in zip(*parts, strict=True))
