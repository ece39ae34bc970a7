"""The loss of a language model, and which targets and columns it counts."""

import torch
from torch import nn

from .kernels import cross_entropy, is_traced, linear_cross_entropy


def causal_lm_loss(
    logits,
    labels,
    vocab_size,
    num_items_in_batch=None,
    ignore_index=-100,
    shift_labels=None,
    **_,
):
    """Compute the mean cross-entropy of the next token.

    logits: B T V; labels: B T, shifted here; shift_labels: B T, already shifted, takes precedence;
    num_items_in_batch: what the sum is divided by instead of the number of targets.
    """
    target = shift_targets(labels, shift_labels, ignore_index).reshape(-1).to(logits.device)
    total = cross_entropy(logits.reshape(-1, vocab_size), target, ignore_index)
    return per_target(total, target, num_items_in_batch, ignore_index)


def loss_without_logits(hidden, weight, targets, num_items_in_batch=None, ignore_index=-100, **_):
    """Compute `causal_lm_loss` of `hidden @ weight.T` without holding all these logits.

    hidden: B T D; weight: V D; targets: B T, already shifted.
    """
    target = targets.reshape(-1).to(hidden.device)
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
    total = linear_cross_entropy(hidden, weight, target, ignore_index)
    return per_target(total, target, num_items_in_batch, ignore_index)


def per_target(total, targets, num_items_in_batch=None, ignore_index=-100, **_):
    """Divide a sum over tokens by `num_items_in_batch`, or the number of targets.

    A batch that is divided into several calls thus gives the same sum. Without a sum or without
    targets, return `total` as it is.
    """
    if total is None or targets is None:
        return total
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def is_plain_head(head):
    """Tell whether a head is a matrix that may be used without calling its module."""
    if type(head) is not nn.Linear:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    is_changed = "forward" in vars(head) or any(getattr(head, name) for name in hooks)
    is_matrix = type(head.weight) is nn.Parameter and not head.weight.is_meta
    return is_matrix and head.bias is None and not is_changed


def shift_targets(labels, shift_labels, ignore_index=-100):
    """Find the target of each position: the label after it, unless `shift_labels` are given."""
    if shift_labels is None and labels is not None:
        return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return shift_labels


def mask_targets_before_first_token(targets, attention_mask, ignore_index=-100):
    """Ignore the targets (B T) of padding before a row's first token.

    Nothing precedes the first token, so it is not predicted, wherever its row begins.
    """
    if attention_mask is None:
        return targets
    mask = attention_mask[:, -targets.shape[1] :].to(targets.device)
    return targets.masked_fill(mask.cumsum(1) == 0, ignore_index)


def count_visible(num_items_in_batch, targets, visible, ignore_index=-100):
    """Reduce `num_items_in_batch`, a count of `targets`, by the part that `visible` ignores."""
    if num_items_in_batch is None or visible is targets:
        return num_items_in_batch
    before, after = ((each != ignore_index).sum().clamp(min=1) for each in (targets, visible))
    return num_items_in_batch * (after / before)


def visible_targets(targets, attention_mask, num_items_in_batch=None, **_):
    """Leave out what `mask_targets_before_first_token` masks: -> targets, num_items_in_batch."""
    visible = mask_targets_before_first_token(targets, attention_mask)
    return visible, count_visible(num_items_in_batch, targets, visible)


def scored_columns(attention_mask, hidden, targets, ignore_index=-100):
    """Mask the columns whose logits are computed: tokens, targets and the last column (B T).

    None stands for all columns.
    """
    if attention_mask is None or is_traced():
        return None
    columns = attention_mask[:, -hidden.shape[1] :].to(hidden.device, torch.bool, copy=True)
    columns[:, -1] = True  # generation continues from it
    if targets is not None:
        columns |= (targets != ignore_index).to(hidden.device)
    return None if columns.all() else columns


def keep_columns(x, logits_to_keep):
    """Select columns of x (B T ...) by `logits_to_keep`; None stays None.

    An integer keeps so many at the end, an index (K) those columns, an index (B K) those of each
    row, and a boolean mask (B T) the columns that are true, N ... in place of B T.
    """
    if x is None:
        return None
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:]
    if getattr(logits_to_keep, "ndim", 1) != 2:
        return x[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return x[logits_to_keep]
    return x.take_along_dim(logits_to_keep.view(*logits_to_keep.shape, *[1] * (x.dim() - 2)), 1)


def take(x, columns):
    """Select what a mask of columns names, B T ... -> 1 N ...; None selects all of x."""
    return x if x is None or columns is None else x[columns.to(x.device)][None]


def put_back(x, columns):
    """Invert `take`, with zeros elsewhere."""
    if x is None or columns is None:
        return x
    full = x.new_zeros(*columns.shape, *x.shape[2:])
    full[columns] = x[0]
    return full
