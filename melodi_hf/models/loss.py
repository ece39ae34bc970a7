"""Cross-entropy that keeps nothing but the logits."""

import torch
from torch import nn

CHUNK = 1 << 20  # logits that a CPU works on at once: 4 MB of float32 stay in its cache
CHUNK_ELSEWHERE = 1 << 26  # few kernels, and still little beside the logits


class CrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over the targets that are not `ignore_index`.

    The logarithmic sums are kept and the softmax computed anew in backward, a few rows at a time:
    in place of torch's four tensors of the size of the logits there are two.
    logits: N V; target: N. In float32, whatever the logits are.
    """

    @staticmethod
    def forward(ctx, logits, target, ignore_index):
        counted = target != ignore_index
        target = target.clamp(min=0)
        rows = _rows_at_once(logits)
        normaliser = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows)])
        chosen = logits.gather(-1, target[:, None])[:, 0].float()
        ctx.save_for_backward(logits, target, counted, normaliser)
        return ((normaliser - chosen) * counted).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, target, counted, normaliser = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        rows = _rows_at_once(logits)
        weight = (grad * counted)[:, None]
        by_row = (logits, normaliser[:, None], target[:, None], weight, grad_logits)
        parts = zip(*(tensor.split(rows) for tensor in by_row), strict=True)
        for part, total, chosen, scale, out in parts:
            softmax = torch.sub(part.float(), total).exp_().mul_(scale)
            out.copy_(softmax.scatter_add_(-1, chosen, -scale))
        return grad_logits, None, None


def _rows_at_once(logits):
    chunk = CHUNK if logits.device.type == "cpu" else CHUNK_ELSEWHERE
    return max(1, chunk // logits.shape[-1])


def causal_lm_loss(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_
):
    """Mean cross-entropy of the next token, or the sum over `num_items_in_batch` if it is given.

    logits: B T V; labels: B T, shifted here; shift_labels: B T, already shifted, takes precedence.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    target = shift_labels.reshape(-1).to(logits.device)
    total = CrossEntropy.apply(logits.reshape(-1, vocab_size), target, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (target != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
