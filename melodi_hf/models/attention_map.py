"""Lay out attention weights over the columns of the text, for `output_attentions`.

A layer attends to slots: those of its memory and those of the window. Here the slots that are
tokens are laid out over the columns of the text, padding included. Weights of memory slots are not
shown, so a row of the map sums to one or less.
"""

import torch
from torch import nn

from .cache import UNKNOWN_ID, shared_state


class AttentionMap(nn.Module):
    """Its output is what transformers records for a layer."""

    def forward(self, columns, outputs, slots, tokens):
        """Lay out the weights of one layer.

        Args:
            columns: `Columns` of the call.
            outputs: a `StepOutput` per step.
            slots: slots of the memory before the window's tokens.
            tokens: how many of them are the tokens before the window.

        Returns:
            B H T C, C the columns read so far.
        """
        return columns.lay_out([output.weights for output in outputs], slots, tokens)


class Columns:
    """The columns of the tokens of a call, and of those read not long before."""

    def __init__(self, progress, mask, cache, plan):
        self.tokens_read, self.plan = progress.tokens_read, plan
        shape = self.tokens_read.shape[0], plan.num_columns
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=self.tokens_read.device)
        recent = None if cache is None else shared_state(cache).recent
        before = mask[:, :0] if recent is None else (recent >= 0) | (recent == UNKNOWN_ID)
        real = torch.cat((before, mask), dim=1)
        self.past = 0 if cache is None else int(cache.get_seq_length())
        # The columns of tokens first, in their order.
        self.order = (~real).long().argsort(dim=1, stable=True) + self.past - before.shape[1]
        self.known_before, self.known = before.sum(1), real.sum(1)
        self.unknown = self.past + plan.num_columns

    def of(self, token, rows):
        """Columns of tokens, counted from the document's first (R n); `unknown` if not known."""
        index = token - (self.tokens_read - self.known_before)[rows, None]
        found = self.order[rows].gather(1, index.clamp(0, self.order.shape[1] - 1))
        is_known = (token >= 0) & (index >= 0) & (index < self.known[rows, None])
        return torch.where(is_known, found, self.unknown)

    def lay_out(self, weights, slots, tokens):
        """weights: R H T J of each step -> B H T C."""
        batch_size, width = self.tokens_read.shape[0], self.unknown + 1
        heads, everyone = weights[0].shape[1], torch.arange(batch_size, device=weights[0].device)
        laid = weights[0].new_zeros(batch_size, self.plan.num_columns + 1, heads, width)
        for step, kept in zip(self.plan.steps, weights, strict=True):
            rows = everyone if step.rows is None else step.rows
            size = min(kept.shape[-1], slots + step.window_length)
            begin = step.tokens_read - step.tokens_read % step.window_length - slots
            slot = torch.arange(size, device=laid.device)
            key = (begin[:, None] + slot).masked_fill(slot < slots - tokens, -1)
            token = torch.arange(step.tokens, device=laid.device)
            query = self.of(step.tokens_read[:, None] + token, rows) - self.past
            is_read = token < (step.tokens_after - step.tokens_read)[:, None]
            query = query.masked_fill(~is_read, self.plan.num_columns)
            kept = kept[:, :, : step.tokens, :size].transpose(1, 2)  # R T H J
            spread = kept.new_zeros(*kept.shape[:3], width)
            spread = spread.scatter(3, self.of(key, rows)[:, None, None].expand_as(kept), kept)
            laid = laid.index_put((rows[:, None], query), spread)
        return laid[:, :-1, :, :-1].transpose(1, 2)
