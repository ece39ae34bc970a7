"""Cross-entropy that keeps nothing but the logits, and one that never has all of them."""

from functools import partial

import torch
from torch import nn

from .tracing import composed_gradient, is_traced, needs_composed_gradient

CHUNK = 1 << 20  # logits that a CPU works on at once: 4 MB of float32 stay in its cache
CHUNK_ELSEWHERE = 1 << 26  # few kernels, and still little beside the logits
CHUNK_OF_PRODUCTS = (
    1 << 23
)  # logits that are made at once: a matrix product wants some hundred rows


class CrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over the targets that are not `ignore_index`.

    The logarithmic sums are kept and the softmax computed anew in backward, a few rows at a time:
    in place of torch's four tensors of the size of the logits there are two.
    logits: N V; target: N. In float32, whatever the logits are.
    """

    @staticmethod
    def forward(ctx, logits, target, ignore_index):
        rows, counted = _rows_at_once(logits), target != ignore_index
        normaliser = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        chosen = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0].float()
        ctx.save_for_backward(logits, target, normaliser)
        ctx.ignore_index = ignore_index
        return ((normaliser - chosen) * counted).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, target, normaliser = ctx.saved_tensors
        if needs_composed_gradient(grad):
            compose = partial(_cross_entropy, target=target, ignore_index=ctx.ignore_index)
            return *composed_gradient(compose, (logits,), grad), None, None
        counted, target = target != ctx.ignore_index, target.clamp(min=0)
        grad_logits = torch.empty_like(logits)
        rows = _rows_at_once(logits)
        weight = (grad * counted)[:, None]
        by_row = (logits, normaliser[:, None], target[:, None], weight, grad_logits)
        parts = zip(*(tensor.split(rows) for tensor in by_row), strict=True)
        for part, total, chosen, scale, out in parts:
            softmax = torch.sub(part.float(), total).exp_().mul_(scale)
            out.copy_(softmax.scatter_add_(-1, chosen, -scale))
        return grad_logits, None, None


def _cross_entropy(logits, target, ignore_index):
    return nn.functional.cross_entropy(
        logits.float(), target, ignore_index=ignore_index, reduction="sum"
    )


def _linear_cross_entropy(hidden, weight, target, ignore_index):
    return _cross_entropy(hidden @ weight.T, target, ignore_index)


class LinearCrossEntropy(torch.autograd.Function):
    """`CrossEntropy` of the logits `hidden @ weight.T`, of which a few rows are there at a time.

    Their gradients are made where they are, in forward, so that nothing is computed twice (Hsu et
    al., 2024, Liger Kernel): 4096 tokens and a vocabulary of 32 000 take 33 MB in place of 1 GB.
    hidden: N D; weight: V D; target: N; with_gradients: whether anybody will ask for them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, ignore_index, with_gradients):
        given, ctx.ignore_index = (hidden, weight, target), ignore_index
        rows = max(1, _chunk(hidden, CHUNK_OF_PRODUCTS) // len(weight))
        counted, target = target != ignore_index, target.clamp(min=0)
        needs_hidden, needs_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        matrix = weight.to(_product_type(weight))
        sums, product = [], _Product(matrix, min(rows, len(hidden)))
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            x = hidden[part].to(matrix.dtype)
            chosen, scale = target[part, None], counted[part, None].float()
            logits = product(x)
            wanted, most = logits.gather(-1, chosen), logits.amax(-1, keepdim=True)
            softmax = logits.sub_(most).exp_()  # in place: pages that are new cost more than sums
            total = softmax.sum(-1, keepdim=True)
            sums.append(((most + total.log() - wanted) * scale).sum())
            if not (needs_hidden or needs_weight):
                continue
            softmax = softmax.mul_(scale / total)
            error = softmax.scatter_add_(-1, chosen, -scale).to(matrix.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = error @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, error.T, x)
        ctx.save_for_backward(grad_hidden, grad_weight, *given)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight, hidden, weight, target = ctx.saved_tensors
        if needs_composed_gradient(grad):
            compose = partial(_linear_cross_entropy, target=target, ignore_index=ctx.ignore_index)
            return *composed_gradient(compose, (hidden, weight), grad), None, None, None
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
        )


class _Product:
    """Logits of a few rows after the other, in float32: on a CPU in the same place each time."""

    def __init__(self, matrix, rows):
        in_place = matrix.dtype == torch.float32 and matrix.device.type == "cpu"
        self.matrix = matrix
        self.place = matrix.new_empty(rows, len(matrix)) if in_place else None

    def __call__(self, x):
        if self.place is None:
            return (x @ self.matrix.T).float()
        return torch.mm(x, self.matrix.T, out=self.place[: len(x)])


def _product_type(weight):
    # That autocast would bring both factors of each product to, copying all of `weight` each time.
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _add_product(total, left, right):
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk(tensor, on_a_cpu):
    return on_a_cpu if tensor.device.type == "cpu" else CHUNK_ELSEWHERE


def _rows_at_once(logits):
    return max(1, _chunk(logits, CHUNK) // logits.shape[-1])


def causal_lm_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """Mean cross-entropy of the next token, or the sum over `num_items_in_batch` if it is given.

    logits: B T V; labels: B T, shifted here; shift_labels: B T, already shifted, takes precedence.
    """
    target = shifted(labels, shift_labels, ignore_index).reshape(-1).to(logits.device)
    logits = logits.reshape(-1, vocab_size)
    if is_traced():  # a compiler fuses what is written out
        total = _cross_entropy(logits, target, ignore_index)
    else:
        total = CrossEntropy.apply(logits, target, ignore_index)
    return _mean(total, target, num_items_in_batch, ignore_index)


def loss_without_logits(hidden, weight, targets, num_items_in_batch=None, ignore_index=-100, **_):
    """`causal_lm_loss` of `hidden @ weight.T`, whose logits are never there as a whole.

    hidden: B T D; weight: V D; targets: B T, already shifted.
    """
    target = targets.reshape(-1).to(hidden.device)
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
    if is_traced():
        total = _linear_cross_entropy(hidden, weight, target, ignore_index)
        return _mean(total, target, num_items_in_batch, ignore_index)
    with_gradients = torch.is_grad_enabled()
    total = LinearCrossEntropy.apply(hidden, weight, target, ignore_index, with_gradients)
    return _mean(total, target, num_items_in_batch, ignore_index)


def _mean(total, target, num_items_in_batch, ignore_index):
    if num_items_in_batch is None:
        num_items_in_batch = (target != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def is_plain_head(head):
    """Whether a head is a matrix that may be used without calling its module."""
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    is_watched = any(getattr(head, name) for name in hooks)
    return type(head.weight) is nn.Parameter and not head.weight.is_meta and not is_watched


def per_target(total, targets, num_items_in_batch=None, ignore_index=-100, **_):
    """A sum over tokens divided as `causal_lm_loss` divides its own: however a batch is cut into
    calls, the parts add up to the same. None stays None; without targets (B T) it stays a sum."""
    if total is None or targets is None:
        return total
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    return total / num_items_in_batch


def shifted(labels, shift_labels, ignore_index=-100):
    """The target of each position: the label after it, unless targets are given as they are."""
    if shift_labels is None and labels is not None:
        return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return shift_labels


def hide_blind(targets, attention_mask, ignore_index=-100):
    """Leave out the targets (B T) of padding before a row's first token, where nothing is known of
    the row: the first token is predicted by nothing, wherever its row begins."""
    if attention_mask is None:
        return targets
    mask = attention_mask[:, -targets.shape[1] :].to(targets.device)
    return targets.masked_fill(mask.cumsum(1) == 0, ignore_index)


def count_visible(num_items_in_batch, targets, visible, ignore_index=-100):
    """Reduce `num_items_in_batch`, a count of targets, by the part that `visible` leaves out."""
    if num_items_in_batch is None or visible is targets:
        return num_items_in_batch
    before, after = ((each != ignore_index).sum().clamp(min=1) for each in (targets, visible))
    return num_items_in_batch * (after / before)


def scored_columns(attention_mask, hidden, targets, ignore_index=-100):
    """Where logits are worth their cost: at tokens, at targets and in the last column, which says
    what comes next. A mask (B T), or None for all."""
    if attention_mask is None or is_traced():
        return None
    columns = attention_mask[:, -hidden.shape[1] :].to(hidden.device, torch.bool, copy=True)
    columns[:, -1] = True
    if targets is not None:
        columns = columns | (targets != ignore_index).to(hidden.device)
    return None if columns.all() else columns


def keep_columns(x, logits_to_keep):
    """Select the columns of x (B T ...) that `logits_to_keep` names.

    An integer keeps so many at the end, an index (K) those columns, an index (B K) those of each
    row, and a boolean mask (B T) the columns that are true, N ... in place of B T.
    """
    if x is None:
        return None
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:]
    if torch.is_tensor(logits_to_keep) and logits_to_keep.dim() == 2:
        if logits_to_keep.dtype == torch.bool:
            return x[logits_to_keep]
        return x.take_along_dim(logits_to_keep.view(*logits_to_keep.shape, *[1] * (x.dim() - 2)), 1)
    return x[:, logits_to_keep]


def take(x, columns):
    """B T ... -> 1 N ..., what lies in the N columns of a mask; as it is for None."""
    return x if x is None or columns is None else x[columns.to(x.device)][None]


def put_back(x, columns):
    """The way back, zero elsewhere."""
    if columns is None:
        return x
    full = x.new_zeros(*columns.shape, *x.shape[2:])
    full[columns] = x[0]
    return full
