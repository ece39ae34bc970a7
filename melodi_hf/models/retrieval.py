"""Attention to many remembered tokens, all of them or the nearest few, in bounded memory.

What can be seen is told by places, the indices of tokens in their documents: a query that sees
[low, high) sees the tokens of these places, wherever their keys are kept:

    memory  [ k k k k k k k k ]   window before the call  [ k k . . ]   this call  [ k k k k k ]
    places    4 5 6 7 8 9 ...                               12 13                    14 15 ...

Scores are computed for a block of keys at a time and computed again in backward (Milakov &
Gimelshein, 2018; Rabe & Staats, 2021), so nothing is kept whose size is queries times keys. Each
sum over keys comes with the logarithm of its weights, and two of them make the softmax over both.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import HIDDEN
from .tracing import composed_gradient, is_traced, needs_composed_gradient

# Numbers that a block of scores, or of keys that were fetched, may have.
BLOCK = 2**24
# One more key, of value zero, with a score that no real one comes near, and far above what is
# hidden: a query that sees nothing else gives zero.
FLOOR = HIDDEN / 2
NOWHERE = 2**62  # the place of a slot without a token


class Source(NamedTuple):
    """Keys and values, and where in its document each token stands."""

    keys: Tensor  # B H J K
    values: Tensor  # B H J K
    places: Tensor  # B J, int64


class Found(NamedTuple):
    """What queries found, and the logarithm of the sum of the exponentials of their scores."""

    values: Tensor  # B H T K
    log_sum: Tensor  # B H T, float32


def attend_to_places(q, sources, low, high, rows=None) -> Found:
    """Attend to all tokens at the places that each query sees.

    q: R H T K, temperature applied; sources: of B rows; low, high: R T or R 1, the places from low
    up to but not including high are seen; rows: which of the batch the queries belong to (R,), or
    None for all. Gradients flow to q, and to the keys and values that ask for them.
    """
    if is_traced():  # then a compiler decides what is recomputed
        return Found(*_look_at_places(q, sources, low, high, rows))
    return Found(*PlacedAttention.apply(q, low, high, rows, *_flat(sources)))


def attend_to_nearest(q, sources, index, rows=None) -> Found:
    """Attend to some tokens of each query's own choice.

    index: R H T k, into the sources laid end to end; -1 is hidden. Gradients flow to q alone.
    Otherwise as `attend_to_places`.
    """
    if is_traced():
        return Found(*_look_at_nearest(q, sources, index, rows))
    return Found(*NearestAttention.apply(q, index, rows, *_flat(sources)))


@torch.no_grad()
def find_nearest(q, sources, low, high, count, rows=None):
    """The `count` keys of the greatest scores for each query, exactly.

    Returns R H T k, as `attend_to_nearest` takes them. Otherwise as `attend_to_places`.
    """
    best = torch.empty(*q.shape[:3], 0, device=q.device).float()
    index, begin = best.long(), 0
    for source in sources:
        for block in _blocks(source, q):
            scores = _scores(q, source, block, low, high, rows)
            scores, at = scores.topk(min(count, scores.shape[-1]))
            both = torch.cat((best, scores), -1)
            best, order = both.topk(min(count, both.shape[-1]))
            index = torch.cat((index, at + begin + block.start), -1).gather(-1, order)
        begin += source.keys.shape[2]
    return index.masked_fill(best == -torch.inf, -1)


def _look_at_places(q, sources, low, high, rows):
    # Block after block, scaled down whenever a greater score turns up.
    out = torch.zeros_like(q).float()
    greatest = torch.full_like(out[..., :1], FLOOR)
    total = torch.ones_like(greatest)
    for source in sources:
        for block in _blocks(source, q):
            scores = _scores(q, source, block, low, high, rows)
            ahead = torch.maximum(greatest, scores.detach().amax(-1, keepdim=True))
            weights, before = (scores - ahead).exp_(), (greatest - ahead).exp_()
            total = total * before + weights.sum(-1, keepdim=True)
            values = _take(source.values, block, rows, q.dtype)
            out = out * before + (weights.to(q.dtype) @ values).float()
            greatest = ahead
    return (out / total).to(q.dtype), (greatest + total.log()).squeeze(-1)


def _look_at_nearest(q, sources, index, rows):
    found, log_sums = [], []
    for block in _query_blocks(q, index):
        weights, log_sum = _nearest_weights(q, sources, index, rows, block)
        values = _fetch([s.values for s in sources], index[:, :, block], rows)
        found.append((weights[..., None, :] @ values.to(weights.dtype)).squeeze(-2).to(q.dtype))
        log_sums.append(log_sum)
    return torch.cat(found, dim=2), torch.cat(log_sums, dim=2)


class PlacedAttention(torch.autograd.Function):
    """`attend_to_places`, whose backward computes the weights anew, a block of keys at a time."""

    @staticmethod
    def forward(ctx, q, low, high, rows, *flat):
        out, log_sum = _look_at_places(q, _unflat(flat), low, high, rows)
        ctx.save_for_backward(q, low, high, rows, out, log_sum, *flat)
        return out, log_sum

    @staticmethod
    def backward(ctx, grad, grad_log_sum):
        q, low, high, rows, out, log_sum, *flat = ctx.saved_tensors
        if needs_composed_gradient(grad, grad_log_sum):
            inputs = q, low, high, rows, *flat
            return composed_gradient(_compose_places, inputs, (grad, grad_log_sum))
        grad = grad.to(q.dtype)
        along = torch.linalg.vecdot(grad.float(), out.float()) - grad_log_sum
        grad_q, grads = torch.zeros_like(q).float(), []
        for i, source in enumerate(_unflat(flat)):
            trains = any(ctx.needs_input_grad[4 + 3 * i : 6 + 3 * i])
            grad_k = torch.zeros_like(source.keys) if trains else None
            grad_v = torch.zeros_like(source.values) if trains else None
            for block in _blocks(source, q):
                scores = _scores(q, source, block, low, high, rows)
                weights = scores.sub_(log_sum[..., None]).exp_()
                values = _take(source.values, block, rows, q.dtype)
                pulls = (grad @ values.transpose(-1, -2)).float()
                pulls = pulls.sub_(along[..., None]).mul_(weights).to(q.dtype)
                grad_q += (pulls @ _take(source.keys, block, rows, q.dtype)).float()
                if trains:
                    _add(grad_k, block, rows, pulls.transpose(-1, -2) @ q)
                    _add(grad_v, block, rows, weights.to(q.dtype).transpose(-1, -2) @ grad)
            grads += [grad_k, grad_v, None]
        return grad_q.to(q.dtype), None, None, None, *grads


class NearestAttention(torch.autograd.Function):
    """`attend_to_nearest`, whose backward fetches the keys anew, a block of queries at a time."""

    @staticmethod
    def forward(ctx, q, index, rows, *flat):
        out, log_sum = _look_at_nearest(q, _unflat(flat), index, rows)
        ctx.save_for_backward(q, index, rows, out, *flat)
        return out, log_sum

    @staticmethod
    def backward(ctx, grad, grad_log_sum):
        q, index, rows, out, *flat = ctx.saved_tensors
        if needs_composed_gradient(grad, grad_log_sum):
            compose = partial(_compose_nearest, index=index, rows=rows, flat=flat)
            (grad_q,) = composed_gradient(compose, (q,), (grad, grad_log_sum))
            return grad_q, None, None, *[None] * len(flat)
        sources, grad_q = _unflat(flat), torch.empty_like(q)
        along = torch.linalg.vecdot(grad.float(), out.float()) - grad_log_sum
        for block in _query_blocks(q, index):
            weights, _ = _nearest_weights(q, sources, index, rows, block)
            values = _fetch([s.values for s in sources], index[:, :, block], rows).float()
            pulls = (values @ grad[:, :, block].float()[..., None]).squeeze(-1)
            pulls = weights * (pulls - along[:, :, block, None])
            keys = _fetch([s.keys for s in sources], index[:, :, block], rows).float()
            grad_q[:, :, block] = (pulls[..., None, :] @ keys).squeeze(-2).to(q.dtype)
        return grad_q, None, None, *[None] * len(flat)


def _compose_places(q, low, high, rows, *flat):
    return _look_at_places(q, _unflat(flat), low, high, rows)


def _compose_nearest(q, index, rows, flat):
    return _look_at_nearest(q, _unflat(flat), index, rows)


def _flat(sources):
    return [tensor for source in sources for tensor in source]


def _unflat(flat):
    return [Source(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _blocks(source, q):
    # Slices of keys, as many at a time as BLOCK allows for these queries.
    return _slices(source.keys.shape[2], _step(q[..., 0].numel()))


def _query_blocks(q, index):
    # Slices of queries, as many at a time as BLOCK allows to have their keys fetched.
    return _slices(q.shape[2], _step(q[:, :, 0].numel() * index.shape[3]))


def _slices(length, step):
    # Without range(), which would fix a length that is open in a graph.
    begin, slices = 0, []
    while begin < length:
        end = begin + step
        slices.append(slice(begin, end if end < length else length))
        begin = end
    return slices


def _step(numbers):
    if torch.compiler.is_compiling():  # the number of rows may be open
        return 2**12
    return max(1, BLOCK // max(1, numbers))


def _take(tensor, block, rows, dtype):
    part = tensor[:, :, block]
    return (part if rows is None else part.index_select(0, rows)).to(dtype)


def _add(total, block, rows, part):
    view, part = total[:, :, block], part.to(total.dtype)
    if rows is None:
        view += part
    else:
        view.index_add_(0, rows, part)


def _scores(q, source, block, low, high, rows):
    # R H T J in float32; minus infinity at what is not seen.
    places = source.places[:, block]
    places = (places if rows is None else places.index_select(0, rows))[:, None, None]
    is_seen = (low[:, None, :, None] <= places) & (places < high[:, None, :, None])
    scores = q @ _take(source.keys, block, rows, q.dtype).transpose(-1, -2)
    return scores.float().masked_fill_(~is_seen, -torch.inf)


def _nearest_weights(q, sources, index, rows, block):
    # Softmax over the keys that were found: R H T k, and the logarithm of its sum.
    chosen = index[:, :, block]
    keys = _fetch([s.keys for s in sources], chosen, rows).to(q.dtype)
    scores = (keys @ q[:, :, block, :, None]).squeeze(-1).float()
    scores = scores.masked_fill(chosen < 0, -torch.inf)
    floor = torch.full_like(scores[..., :1], FLOOR)
    log_sum = torch.cat((scores, floor), -1).logsumexp(-1)
    return (scores - log_sum[..., None]).exp(), log_sum


def _fetch(tensors, index, rows):
    """R H T k K, from tensors B H J K laid end to end along J."""
    rows = torch.arange(index.shape[0], device=index.device) if rows is None else rows
    heads = torch.arange(index.shape[1], device=index.device)[:, None, None]
    rows, begin, fetched = rows[:, None, None, None], 0, None
    for tensor in tensors:
        length = tensor.shape[2]
        if length == 0:
            continue
        part = tensor[rows, heads, (index - begin).clamp(0, length - 1)]
        is_here = (index >= begin) & (index < begin + length)
        fetched = part if fetched is None else torch.where(is_here[..., None], part, fetched)
        begin += length
    return fetched
