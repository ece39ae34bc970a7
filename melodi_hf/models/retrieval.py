"""Attention to many remembered tokens, all of them or the nearest few, in bounded memory.

Each key has a position, the index of its token in the document, and a query attends to the keys at
the positions [low, high), in whichever tensor they are stored:

    memory     [ k k k k k k k k ]   window before the call  [ k k . . ]   this call  [ k k k k k ]
    positions    4 5 6 7 8 9 ...                               12 13                    14 15 ...

Scores are computed for a block of keys at a time and recomputed in backward (Milakov & Gimelshein,
2018; Rabe & Staats, 2021), so no tensor has the size queries times keys. Each result comes with
the log-sum-exp of its scores, from which two results are combined into one softmax over both.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import composed_gradient, is_traced, needs_composed_gradient
from .modules import MASK_VALUE

# Maximum number of elements of a block of scores, or of gathered keys.
BLOCK = 2**24
# Score of an additional key whose value is zero: far below any real score and far above masked
# ones, so a query that sees no other key gives zero.
NULL_KEY_SCORE = MASK_VALUE / 2


class Source(NamedTuple):
    """Keys and values of consecutive tokens, and the position of the first one."""

    keys: Tensor  # B H J K
    values: Tensor  # B H J K
    start: Tensor  # B, int64

    def positions(self, block=slice(None)):
        """Compute the positions of the tokens of a slice: B J."""
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)
        return self.start[:, None] + slots[block]


class AttentionOutput(NamedTuple):
    """Results of attention, and the log-sum-exp of the scores of each query."""

    values: Tensor  # B H T K
    log_sum: Tensor  # B H T, float32


def attend_to_range(q, sources, low, high) -> AttentionOutput:
    """Attend to all tokens at the positions low <= position < high.

    Gradients flow to q, and to the keys and values that require them.

    Args:
        q: B H T K, temperature applied.
        sources: a list of `Source`.
        low, high: B T or B 1.
    """
    if is_traced():  # a compiler chooses what to recompute
        return AttentionOutput(*_attend_to_range(q, sources, low, high))
    return AttentionOutput(*RangeAttention.apply(q, low, high, *_flatten(sources)))


def attend_to_nearest(q, sources, index) -> AttentionOutput:
    """Attend to the tokens that were selected for each query. Gradients flow to q alone.

    Args:
        q, sources: as in `attend_to_range`.
        index: B H T k, into the concatenated sources; -1 is masked.
    """
    if is_traced():
        return AttentionOutput(*_attend_to_nearest(q, sources, index))
    return AttentionOutput(*NearestAttention.apply(q, index, *_flatten(sources)))


@torch.no_grad()
def find_nearest(q, sources, low, high, count):
    """Find the `count` keys with the greatest scores for each query, exactly.

    Arguments as in `attend_to_range`. Returns the index that `attend_to_nearest` takes.
    """
    best = torch.empty(*q.shape[:3], 0, device=q.device).float()
    index, start = best.long(), 0
    for source in sources:
        for block in _key_blocks(source, q):
            scores = _masked_scores(q, source, block, low, high)
            scores, at = scores.topk(min(count, scores.shape[-1]))
            both = torch.cat((best, scores), -1)
            best, order = both.topk(min(count, both.shape[-1]))
            index = torch.cat((index, at + start + block.start), -1).gather(-1, order)
        start += source.keys.shape[2]
    return index.masked_fill(best == -torch.inf, -1)


def _attend_to_range(q, sources, low, high):
    # Online softmax: earlier sums are scaled down when a block has a greater score.
    out = torch.zeros_like(q).float()
    greatest = torch.full_like(out[..., :1], NULL_KEY_SCORE)
    total = torch.ones_like(greatest)
    for source in sources:
        for block in _key_blocks(source, q):
            scores = _masked_scores(q, source, block, low, high)
            new_greatest = torch.maximum(greatest, scores.detach().amax(-1, keepdim=True))
            weights, scale = (scores - new_greatest).exp_(), (greatest - new_greatest).exp_()
            total = total * scale + weights.sum(-1, keepdim=True)
            values = source.values[:, :, block].to(q.dtype)
            out = out * scale + (weights.to(q.dtype) @ values).float()
            greatest = new_greatest
    return (out / total).to(q.dtype), (greatest + total.log()).squeeze(-1)


def _attend_to_nearest(q, sources, index):
    outputs, log_sums = [], []
    for block in _query_blocks(q, index):
        weights, log_sum = _nearest_weights(q, sources, index, block)
        values = _gather([s.values for s in sources], index[:, :, block]).to(weights.dtype)
        outputs.append((weights[..., None, :] @ values).squeeze(-2).to(q.dtype))
        log_sums.append(log_sum)
    return torch.cat(outputs, dim=2), torch.cat(log_sums, dim=2)


class RangeAttention(torch.autograd.Function):
    """`attend_to_range`, whose backward recomputes the weights, a block of keys at a time."""

    @staticmethod
    def forward(ctx, q, low, high, *flat):
        out, log_sum = _attend_to_range(q, _unflatten(flat), low, high)
        ctx.save_for_backward(q, low, high, out, log_sum, *flat)
        return out, log_sum

    @staticmethod
    def backward(ctx, grad, grad_log_sum):
        q, low, high, out, log_sum, *flat = ctx.saved_tensors
        if needs_composed_gradient(grad, grad_log_sum):
            inputs = q, low, high, *flat
            return composed_gradient(_compose_range, inputs, (grad, grad_log_sum))
        grad = grad.to(q.dtype)
        delta = torch.linalg.vecdot(grad.float(), out.float()) - grad_log_sum
        grad_q, grads = torch.zeros_like(q).float(), []
        for i, source in enumerate(_unflatten(flat)):
            trains = any(ctx.needs_input_grad[3 + 3 * i : 5 + 3 * i])
            grad_k: Any = torch.zeros_like(source.keys) if trains else None
            grad_v: Any = torch.zeros_like(source.values) if trains else None
            for block in _key_blocks(source, q):
                scores = _masked_scores(q, source, block, low, high)
                weights = scores.sub_(log_sum[..., None]).exp_()
                values = source.values[:, :, block].to(q.dtype)
                grad_scores = (grad @ values.transpose(-1, -2)).float()
                grad_scores = grad_scores.sub_(delta[..., None]).mul_(weights).to(q.dtype)
                grad_q += (grad_scores @ source.keys[:, :, block].to(q.dtype)).float()
                if trains:
                    grad_k[:, :, block] += (grad_scores.transpose(-1, -2) @ q).to(grad_k.dtype)
                    weights = weights.to(q.dtype).transpose(-1, -2)
                    grad_v[:, :, block] += (weights @ grad).to(grad_v.dtype)
            grads += [grad_k, grad_v, None]
        return grad_q.to(q.dtype), None, None, *grads


class NearestAttention(torch.autograd.Function):
    """`attend_to_nearest`, whose backward gathers the keys again, a block of queries at a time."""

    @staticmethod
    def forward(ctx, q, index, *flat):
        out, log_sum = _attend_to_nearest(q, _unflatten(flat), index)
        ctx.save_for_backward(q, index, out, *flat)
        return out, log_sum

    @staticmethod
    def backward(ctx, grad, grad_log_sum):
        q, index, out, *flat = ctx.saved_tensors
        sources, no_grads = _unflatten(flat), [None] * (1 + len(flat))
        if needs_composed_gradient(grad, grad_log_sum):
            compose = partial(_attend_to_nearest, sources=sources, index=index)
            (grad_q,) = composed_gradient(compose, (q,), (grad, grad_log_sum))
            return grad_q, *no_grads
        grad_q = torch.empty_like(q)
        delta = torch.linalg.vecdot(grad.float(), out.float()) - grad_log_sum
        for block in _query_blocks(q, index):
            weights, _ = _nearest_weights(q, sources, index, block)
            values = _gather([s.values for s in sources], index[:, :, block]).float()
            grad_scores = (values @ grad[:, :, block].float()[..., None]).squeeze(-1)
            grad_scores = weights * (grad_scores - delta[:, :, block, None])
            keys = _gather([s.keys for s in sources], index[:, :, block]).float()
            grad_q[:, :, block] = (grad_scores[..., None, :] @ keys).squeeze(-2).to(q.dtype)
        return grad_q, *no_grads


def _compose_range(q, low, high, *flat):
    return _attend_to_range(q, _unflatten(flat), low, high)


def _flatten(sources):
    return [tensor for source in sources for tensor in source]


def _unflatten(flat):
    return [Source(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _key_blocks(source, q):
    # Slices of keys whose scores with all queries have at most BLOCK elements.
    return _slices(source.keys.shape[2], _step(q[..., 0].numel()))


def _query_blocks(q, index):
    # Slices of queries whose gathered keys have at most BLOCK elements.
    return _slices(q.shape[2], _step(q[:, :, 0].numel() * index.shape[3]))


def _slices(length, step):
    # Without range(), which would specialise a graph on a dynamic length.
    start, slices = 0, []
    while start < length:
        end = start + step
        slices.append(slice(start, end if end < length else length))
        start = end
    return slices


def _step(elements_each):
    if torch.compiler.is_compiling():  # the batch size may be dynamic
        return 2**12
    return max(1, BLOCK // max(1, elements_each))


def _masked_scores(q, source, block, low, high):
    # B H T J in float32; minus infinity outside the range of the query.
    positions = source.positions(block)[:, None, None]
    is_seen = (low[:, None, :, None] <= positions) & (positions < high[:, None, :, None])
    scores = q @ source.keys[:, :, block].to(q.dtype).transpose(-1, -2)
    return scores.float().masked_fill_(~is_seen, -torch.inf)


def _nearest_weights(q, sources, index, block):
    # Softmax over the selected keys and the null key: B H T k, and the log-sum-exp.
    selected = index[:, :, block]
    keys = _gather([s.keys for s in sources], selected).to(q.dtype)
    scores = (keys @ q[:, :, block, :, None]).squeeze(-1).float()
    scores = scores.masked_fill(selected < 0, -torch.inf)
    null = torch.full_like(scores[..., :1], NULL_KEY_SCORE)
    log_sum = torch.cat((scores, null), -1).logsumexp(-1)
    return (scores - log_sum[..., None]).exp(), log_sum


def _gather(tensors, index):
    """Gather B H T k K from tensors B H J K, concatenated along J."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None, None, None]
    heads = torch.arange(index.shape[1], device=index.device)[:, None, None]
    start, gathered = 0, None
    for tensor in tensors:
        length = tensor.shape[2]
        if length == 0:
            continue
        part = tensor[rows, heads, (index - start).clamp(0, length - 1)]
        is_here = (index >= start) & (index < start + length)
        gathered = part if gathered is None else torch.where(is_here[..., None], part, gathered)
        start += length
    return gathered
