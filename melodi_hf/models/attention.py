"""Attention over "memory, then window", as the released code computes it.

    scores = (q · k + b[distance]) * |temperature|       q and k of length one, no 1/sqrt(K)
    out    = softmax(scores) v                           a query that sees nothing gives zero

Keys and queries are normalised per head, a learned temperature per head takes the place of
1/sqrt(K), and it scales the position bias too. A token sees what lies strictly before it, never
itself.
"""

import math

import torch
from torch import nn

from .norm import unit
from .position import RelativePosition
from .tracing import composed_gradient, is_traced, is_transformed, needs_composed_gradient

# A score that hides a slot: its weight underflows to zero beside any real one, and unlike the
# least float32 it stays finite in every format.
HIDDEN = -3e4

# Queries whose weights are held at once, and how many of those: 1 MB of float32 stays in a core's
# cache while it is gone over again and again.
QUERY_BLOCK = 96
WEIGHTS_AT_ONCE = 1 << 18


def split_heads(x, num_heads):  # B T H*K -> B H T K
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x):  # B H T K -> B T H*K
    return x.transpose(1, 2).flatten(2)


def attend(q, k, v, bias=None, *, in_order=False, dropout=0.0, eager=False):
    """Softmax attention.

    q: B H T K, temperature applied; k, v: B H J K; bias: added to the scores, of a shape that
    broadcasts to B H T J, or None; in_order: the queries are the last T of the keys and the bias
    hides what is not strictly before; dropout: the probability to drop a weight. Returns B H T K.
    """
    trains_bias = needs_bias_gradient(q, bias)
    if eager or is_transformed() or (trains_bias and (dropout or torch.compiler.is_compiling())):
        return _attend_plainly(q, k, v, bias, dropout)
    if trains_bias or (not dropout and skips_hidden(q, bias, in_order)):
        return RecomputedAttention.apply(q, k, v, bias, in_order)
    if bias is not None:
        bias = bias.to(q.dtype)
        if q.device.type == "cpu":  # where torch takes its slowest kernel for three axes
            bias = bias[(None,) * (4 - bias.dim())]
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0
    )


def needs_bias_gradient(q, bias):
    """Whether this is the case that torch has no kernel for on the CPU."""
    is_trained = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return is_trained and _is_exact_on_cpu(q)


def skips_hidden(q, bias, in_order):
    """Whether there are queries enough, block by block, to leave out keys that the bias hides."""
    is_long = in_order and bias is not None and q.shape[2] > QUERY_BLOCK
    return is_long and _is_exact_on_cpu(q) and not torch.compiler.is_compiling()


def _is_exact_on_cpu(q):
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


def _attend_plainly(q, k, v, bias, dropout=0.0):
    scores = q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    wide = torch.promote_types(q.dtype, torch.float32)  # a sum of many small numbers
    weights = scores.to(wide).softmax(-1).to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v


class RecomputedAttention(torch.autograd.Function):
    """Softmax attention on the CPU with a gradient for the bias, if it wants one, which keeps no
    weights.

    Backward computes them anew, as FlashAttention does (Dao et al., 2022, appendix B.4), a block of
    queries at a time. If the queries are the last of the keys (`in_order`), the keys behind
    a block, which the bias hides, are left out.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, in_order):
        out = torch.empty_like(q)
        for head, query, key in blocks(q, k, bias, in_order):
            weights = _weights(q, k, bias, head, query, key)
            out[:, head, query] = weights @ v[:, head, key]
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.in_order = in_order
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out = ctx.saved_tensors
        if needs_composed_gradient(grad):
            return *composed_gradient(_attend_plainly, (q, k, v, bias), grad), None
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        for head, query, key in blocks(q, k, bias, ctx.in_order):
            weights, g = _weights(q, k, bias, head, query, key), grad[:, head, query]
            grad_v[:, head, key] += weights.transpose(-1, -2) @ g
            scores = g @ v[:, head, key].transpose(-1, -2)
            along = torch.linalg.vecdot(g, out[:, head, query]).unsqueeze_(-1)
            scores.sub_(along).mul_(weights)
            grad_q[:, head, query] = scores @ k[:, head, key]
            grad_k[:, head, key] += scores.transpose(-1, -2) @ q[:, head, query]
            if grad_bias is not None:
                part = grad_bias[..., head, query, key]
                part.copy_(_summed_to(scores, part.shape))
                grad_bias[..., head, query, key.stop :] = 0
        return grad_q, grad_k, grad_v, grad_bias, None


def blocks(q, k, bias, in_order):
    """Slices of heads and of queries, each with the slice of the keys that these may see."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    step = QUERY_BLOCK if in_order else queries
    at_once = max(1, WEIGHTS_AT_ONCE // (min(step, queries) * keys * len(q)))
    if bias.shape[-3] < heads:  # one for all
        at_once = heads
    for first_head in range(0, heads, at_once):
        head = slice(first_head, first_head + at_once)
        for first in range(0, queries, step):
            last = min(first + step, queries)
            seen = keys - queries + last - 1 if in_order else keys
            yield head, slice(first, last), slice(0, max(seen, 1))


def _weights(q, k, bias, head, query, key):
    scores = q[:, head, query] @ k[:, head, key].transpose(-1, -2)
    return scores.add_(bias[..., head, query, key]).softmax(-1)


def _summed_to(scores, shape):
    return scores.view(shape) if scores.numel() == shape.numel() else scores.sum_to_size(shape)


def keep_empty(bias, num_slots, filled):
    """Empty slots are zeros and are attended to, as in the released code."""
    return bias


def hide_empty(bias, num_slots, filled):
    """Hide the slots of the memory that a row has not filled yet.

    bias: ... J, J the keys, the first `num_slots` of which are the memory, oldest slot first, or
    None if the memory is all there is; filled: how many slots are not empty (B,), the newest of
    them, or which (B num_slots). Returns B H T J.
    """
    bias = torch.zeros(1, 1, num_slots, device=filled.device) if bias is None else bias
    if filled.dim() == 1:
        filled = torch.arange(num_slots, device=bias.device) >= num_slots - filled[:, None]
    empty = nn.functional.pad(~filled, (0, bias.shape[-1] - num_slots))
    return bias.masked_fill(empty[:, None, None], HIDDEN)


def fold_empty(k, v, filled):
    """Empty slots are attended to, and being zeros all score 0: n of them are one whose score is
    log n. k, v: B H J K, oldest slot first -> the keys, the values and their bias, or None."""
    empty = _empty_in_all_rows(k, filled)
    if empty < 2:
        return k, v, None
    bias = k.new_zeros(1, 1, 1, k.shape[2] - empty + 1)
    bias[..., 0] = math.log(empty)
    return k[:, :, empty - 1 :], v[:, :, empty - 1 :], bias


def leave_out_empty(k, v, filled):
    """Empty slots are hidden: what is empty in all rows, but for one slot, need not be there."""
    first = max(0, _empty_in_all_rows(k, filled) - 1)
    return k[:, :, first:], v[:, :, first:], None


def _empty_in_all_rows(k, filled):
    # Elsewhere than on a CPU asking would have the device wait, and cost more than it saves.
    if k.device.type != "cpu" or is_traced():
        return 0
    return k.shape[2] - int(filled.max())


def zero_if_blind(attended, bias):
    """A query that sees no slot attends to nothing: zero."""
    if bias is None:
        return attended
    return attended * (bias > HIDDEN / 2).any(-1, keepdim=True)


def as_attended(attended, bias):
    """Every query sees something."""
    return attended


class Temperature(nn.Module):
    """A factor per head, greater than zero. A module of its own, so that what keeps weights
    elsewhere (offloading to disk, ZeRO) brings them when they are read."""

    def __init__(self, num_heads):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def forward(self, dim):
        """H 1 1 ..., `dim` axes."""
        return self.weight.abs().view(-1, *[1] * (dim - 1))


class Attention(nn.Module):
    """The projections of one layer, its temperature and its position bias."""

    def __init__(self, config, always_sees):
        super().__init__()
        self.num_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.temperature = Temperature(config.num_attention_heads)
        self.position: nn.Module = RelativePosition(config)
        # A module although its rate alone is used: TRL and others turn dropout off in modules.
        self.dropout = nn.Dropout(config.attention_dropout)
        self.config = config  # whose implementation of attention may be changed later
        self.with_empty = hide_empty if config.mask_empty_memory else keep_empty
        self.without_empty = leave_out_empty if config.mask_empty_memory else fold_empty
        blind = config.mask_empty_memory or not always_sees
        self.where_seeing = zero_if_blind if blind else as_attended

    def queries(self, x):
        """B T D, normalised -> B H T K, temperature applied."""
        return unit(split_heads(self.q_proj(x), self.num_heads), self.eps, self.temperature(3))

    def keys_values(self, x):
        """B J D, normalised -> two of B H J K; zeros give zeros."""
        k = unit(split_heads(self.k_proj(x), self.num_heads), self.eps)
        return k, split_heads(self.v_proj(x), self.num_heads)

    def bias_by_distance(self, distance, furthest=None):
        """Distances in tokens (any shape) -> H, that shape; what is not strictly before is hidden,
        and so is what lies more than `furthest` tokens before."""
        temperature = self.temperature(distance.dim() + 1)
        hidden = distance <= 0 if furthest is None else (distance <= 0) | (distance > furthest)
        return (self.position(distance) * temperature).masked_fill(hidden, HIDDEN)

    def forward(self, q, k, v, bias, num_slots, filled, in_order=False, kept=None):
        """Attend to `num_slots` of memory, of which each row has `filled` (`hide_empty`), and to
        the keys that follow them. bias: None if the memory is all there is, and has no positions.
        kept: a list that is given the weights, too, or None. Otherwise as `attend`."""
        if bias is None and q.shape[2] > 1:  # a single token costs the same in all of a document
            k, v, bias = self.without_empty(k, v, filled)
            num_slots = k.shape[2]
        bias = self.with_empty(bias, num_slots, filled)
        dropout = self.dropout.p if self.training else 0.0
        eager = self.config._attn_implementation == "eager"
        attended = attend(q, k, v, bias, in_order=in_order, dropout=dropout, eager=eager)
        if kept is not None:
            kept.append(self.where_seeing((q @ k.transpose(-1, -2) + bias).softmax(-1), bias))
        return self.where_seeing(attended, bias)
