"""Operations written by hand for speed, with the results of compositions of torch's.

    softmax_attention      attention on the CPU that keeps no weights and skips masked keys
    normalise              norms whose backward keeps one number per vector
    cross_entropy          the loss of logits, with two tensors of their size instead of four
    linear_cross_entropy   the loss of hidden states, which never holds all logits

Their backward passes are first derivatives of one batch. The composition takes their place under
`torch.func`, in forward mode, for gradients of gradients, and in compiled graphs.
"""

from functools import partial
from itertools import compress

import torch
from torch.autograd import forward_ad
from torch.nn import functional

CPU_TYPES = {("cpu", torch.float32), ("cpu", torch.float64)}  # for which torch is slow
# Queries whose attention weights are computed at once, and how many weights: 1 MB of float32 stays
# in the cache of a core while several operations read it. For the same reason, logits at once.
QUERY_BLOCK, WEIGHTS_AT_ONCE = 96, 1 << 18
CHUNK = 1 << 20
CHUNK_OF_PRODUCTS = 1 << 23  # logits that are made at once: a product needs some hundred rows
CHUNK_ELSEWHERE = 1 << 26  # on other devices: few kernels, and little memory beside the logits


def is_traced():
    """Tell whether a call is compiled or transformed, so that Python must not read values."""
    return any((torch.compiler.is_compiling(), is_transformed()))


def is_transformed():
    """Tell whether a call runs eagerly under `torch.func` or forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return False
    return any((torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0))


def needs_composed_gradient(*grads):
    """Tell whether a backward given `grads` is itself differentiated, transformed or batched."""
    is_batched = map(torch._C._functorch.is_legacy_batchedtensor, grads)
    return any((torch.is_grad_enabled(), is_traced(), *is_batched))


def composed_gradient(function, inputs, grads):
    """Compute gradients of `function(*inputs)`, differentiable if gradients are enabled.

    inputs: what backward saved: tensors, or None; grads: the gradient of each output. Returns one
    gradient per input, None for those that require none.
    """
    options = {"create_graph": torch.is_grad_enabled(), "allow_unused": True}
    needed = [getattr(x, "requires_grad", False) for x in inputs]
    with torch.enable_grad():
        # Views, so that no input is part of the graph of another one.
        given = [x.view_as(x) if need else x for x, need in zip(inputs, needed, strict=True)]
        outputs = function(*given)
    found = iter(torch.autograd.grad(outputs, list(compress(given, needed)), grads, **options))
    return tuple(next(found) if need else None for need in needed)


def softmax_attention(q, k, v, bias, in_order, dropout):
    """Compute attention as `modules.attend` does, in the fastest way there is."""
    is_on_cpu = (q.device.type, q.dtype) in CPU_TYPES
    is_trained = getattr(bias, "requires_grad", False)
    trains_bias = all((is_on_cpu, is_trained, torch.is_grad_enabled()))  # torch has no kernel
    skips_keys = in_order and q.shape[2] > QUERY_BLOCK
    can_recompute = all((is_on_cpu, not dropout, not is_traced()))
    if can_recompute and any((trains_bias, skips_keys)):
        return RecomputedAttention.apply(q, k, v, bias, in_order)
    if any((trains_bias, is_transformed())):
        return composed_attention(q, k, v, bias, dropout)
    if bias is not None:  # given four axes, as three take the slowest kernel on a CPU
        bias = bias.to(q.dtype)[(None,) * (4 - bias.dim())]
    return functional.scaled_dot_product_attention(q, k, v, bias, dropout, scale=1.0)


def attention_weights(q, k, bias):
    """Compute softmax(q kᵀ + bias), in float32 or wider: it sums many small numbers."""
    scores = q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)


def composed_attention(q, k, v, bias, dropout=0.0):
    """Compute attention by torch's operations, which keep the weights."""
    return functional.dropout(attention_weights(q, k, bias), dropout) @ v


class RecomputedAttention(torch.autograd.Function):
    """Attention that keeps no weights, with a gradient for the bias if it needs one.

    Backward computes the weights again, block by block, as FlashAttention does (Dao et al., 2022,
    appendix B.4). If the queries are the last of the keys (`in_order`), the keys after each block
    of queries, which the bias masks, are skipped.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, in_order):
        out = torch.empty_like(q)
        for weights, queries, keys in blocks(q, k, bias, in_order):
            out[queries] = weights @ v[keys]
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.in_order = in_order
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out = ctx.saved_tensors
        if needs_composed_gradient(grad):
            return *composed_gradient(composed_attention, (q, k, v, bias), grad), None
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        for weights, queries, keys in blocks(q, k, bias, ctx.in_order):
            g = grad[queries]
            grad_v[keys] += weights.transpose(-1, -2) @ g
            scores = g @ v[keys].transpose(-1, -2)
            along = torch.linalg.vecdot(g, out[queries]).unsqueeze_(-1)
            scores.sub_(along).mul_(weights)
            grad_q[queries] = scores @ k[keys]
            grad_k[keys] += scores.transpose(-1, -2) @ q[queries]
            if grad_bias is not None:
                seen, masked = grad_bias[(..., *queries[1:], slice(None))].tensor_split(
                    (keys[2].stop,), -1
                )
                is_sum = scores.numel() > seen.numel()  # over rows, or over heads
                seen.copy_(scores.sum_to_size(seen.shape) if is_sum else scores.view(seen.shape))
                masked.zero_()
        return grad_q, grad_k, grad_v, grad_bias, None


def blocks(q, k, bias, in_order):
    """Yield attention weights with the indices of their queries and of the keys these may see."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    step = QUERY_BLOCK if in_order else queries
    at_once = max(1, WEIGHTS_AT_ONCE // (min(step, queries) * keys * len(q)))
    at_once = heads if bias.shape[-3] < heads else at_once  # one bias for all heads
    for first_head in range(0, heads, at_once):
        head = slice(first_head, first_head + at_once)
        for first in range(0, queries, step):
            last = min(first + step, queries)
            seen = max(1, keys - in_order * (queries - last + 1))
            query, key = (slice(None), head, slice(first, last)), (slice(None), head, slice(seen))
            scores = q[query] @ k[key].transpose(-1, -2)
            yield scores.add_(bias[..., head, first:last, :seen]).softmax(-1), query, key


class Normalise(torch.autograd.Function):
    """gain x / sqrt(sum(x²) / divisor + ε) over the last axis.

    gain: one number per channel (D,), one per vector (any shape that ends with 1), or None.
    """

    @staticmethod
    def forward(ctx, x, gain, divisor, eps):
        out, scale = _normalised(x, gain, divisor, eps)
        ctx.save_for_backward(x, gain, scale)
        ctx.divisor, ctx.eps = divisor, eps
        return out

    @staticmethod
    def backward(ctx, grad):
        # With s the scale, the gradient is  s g - x s³ (g·x) / divisor,  where g = gain * grad.
        x, gain, scale = ctx.saved_tensors
        if needs_composed_gradient(grad):
            compose = partial(composed_norm, divisor=ctx.divisor, eps=ctx.eps)
            return *composed_gradient(compose, (x, gain), grad), None, None
        grad_gain = None
        if gain is None:
            along, out = torch.linalg.vecdot(grad, x).unsqueeze_(-1), grad * scale
        elif gain.shape[-1] == 1:
            along = torch.linalg.vecdot(grad, x).unsqueeze_(-1)
            grad_gain = (along * scale).sum_to_size(gain.shape)
            along, out = along * gain, grad * (scale * gain)
        else:
            products = grad * x
            grad_gain = scale.flatten() @ products.flatten(0, -2)
            along, out = (products @ gain).unsqueeze_(-1), (grad * gain).mul_(scale)
        along.mul_(scale).mul_(scale).mul_(scale).div_(ctx.divisor)
        return out.addcmul_(x, along, value=-1), grad_gain, None, None


def _normalised(x, gain, divisor, eps):
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = scale.div_(divisor).add_(eps).rsqrt_()
    if gain is None or gain.shape[-1] == 1:
        return x * (scale if gain is None else scale * gain), scale
    return (x * scale).mul_(gain), scale


def composed_norm(x, gain, divisor, eps):
    """Compute what `Normalise` does by torch's operations, in any precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a sum of many small numbers
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / divisor + eps)
    return x * (scale if gain is None else scale * gain).to(x.dtype)


def normalise(x, gain, divisor, eps, compose=composed_norm):
    """Compute `Normalise`, or `compose` where that is as fast or has to be transformed."""
    if any((is_traced(), (x.device.type, x.dtype) not in CPU_TYPES)):
        return compose(x, gain, divisor, eps)
    if torch.is_grad_enabled():
        return Normalise.apply(x, gain, divisor, eps)
    return _normalised(x, gain, divisor, eps)[0]


class CrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over the targets that are not `ignore_index`.

    Keeps the logarithms of the sums and computes the softmax again in backward, a few rows at
    a time. logits: N V, used in float32; target: N.
    """

    @staticmethod
    def forward(ctx, logits, target, ignore_index):
        rows, counted = _rows_at_once(logits, logits.shape[-1], CHUNK), target != ignore_index
        log_sum = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        chosen = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0].float()
        ctx.save_for_backward(logits, target, log_sum)
        ctx.ignore_index = ignore_index
        return ((log_sum - chosen) * counted).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, target, log_sum = ctx.saved_tensors
        if needs_composed_gradient(grad):
            compose = partial(composed_loss, target=target, ignore_index=ctx.ignore_index)
            return *composed_gradient(compose, (logits,), grad), None, None
        weight, target = (grad * (target != ctx.ignore_index))[:, None], target.clamp(min=0)
        grad_logits = torch.empty_like(logits)
        by_row = (logits, log_sum[:, None], target[:, None], weight, grad_logits)
        rows = _rows_at_once(logits, logits.shape[-1], CHUNK)
        for part, total, chosen, scale, out in zip(*(t.split(rows) for t in by_row), strict=True):
            softmax = torch.sub(part.float(), total).exp_().mul_(scale)
            out.copy_(softmax.scatter_add_(-1, chosen, -scale))
        return grad_logits, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """`CrossEntropy` of the logits `hidden @ weight.T`, of which a few rows exist at a time.

    Forward computes the gradients too, so that no logits are computed twice (Hsu et al., 2024,
    Liger Kernel): 4096 tokens and a vocabulary of 32 000 take 33 MB instead of 1 GB.
    hidden: N D; weight: V D; target: N.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, ignore_index):
        given, ctx.ignore_index = (hidden, weight, target), ignore_index
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        rows = min(_rows_at_once(hidden, len(weight), CHUNK_OF_PRODUCTS), len(hidden))
        counted, target = (target != ignore_index)[:, None], target.clamp(min=0)[:, None]
        # Converted once, as autocast would do for each product.
        lower = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(weight.device.type) if lower else weight.dtype
        matrix, sums = weight.to(dtype), []
        place = matrix.new_empty(rows, len(matrix))  # new pages cost more than the arithmetic
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            x, chosen, scale = hidden[part].to(matrix.dtype), target[part], counted[part].float()
            logits = torch.mm(x, matrix.T, out=place[: len(x)]).float()
            wanted, most = logits.gather(-1, chosen), logits.amax(-1, keepdim=True)
            softmax = logits.sub_(most).exp_()
            total = softmax.sum(-1, keepdim=True)
            sums.append(((most + total.log() - wanted) * scale).sum())
            if any((needs_hidden, needs_weight)):
                error = softmax.mul_(scale / total).scatter_add_(-1, chosen, -scale)
                error = error.to(matrix.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = error @ matrix
            if needs_weight:
                add_product(grad_weight, error.T, x)
        ctx.save_for_backward(grad_hidden, grad_weight, *given)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx, grad):
        *grads, hidden, weight, target = ctx.saved_tensors
        if needs_composed_gradient(grad):
            given = {"target": target, "ignore_index": ctx.ignore_index}
            compose = lambda hidden, weight: composed_loss(hidden @ weight.T, **given)  # noqa: E731
            return *composed_gradient(compose, (hidden, weight), grad), None, None
        return *(None if g is None else g * grad.to(g.dtype) for g in grads), None, None


def cross_entropy(logits, target, ignore_index):
    """Sum the cross-entropy of logits N V; target: N."""
    way = composed_loss if is_traced() else CrossEntropy.apply  # a compiler fuses the composition
    return way(logits, target, ignore_index)


def linear_cross_entropy(hidden, weight, target, ignore_index):
    """Sum the cross-entropy of the logits `hidden @ weight.T`; hidden: N D; target: N."""
    if is_traced():
        return composed_loss(hidden @ weight.T, target, ignore_index)
    if not torch.is_grad_enabled():  # or forward would compute gradients
        hidden, weight = hidden.detach(), weight.detach()
    return LinearCrossEntropy.apply(hidden, weight, target, ignore_index)


def composed_loss(logits, target, ignore_index):
    """Compute what `CrossEntropy` does by torch's operations."""
    return functional.cross_entropy(logits.float(), target, None, None, ignore_index, None, "sum")


def add_product(total, left, right):
    """Add a matrix product in place, in one operation if the types are equal."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _rows_at_once(tensor, vocab_size, on_cpu):
    return max(1, {"cpu": on_cpu}.get(tensor.device.type, CHUNK_ELSEWHERE) // vocab_size)
