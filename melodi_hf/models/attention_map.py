"""Which columns of the text each token attends to, as transformers' `output_attentions` has it.

A model of windows attends to slots: those of its memory and those of the window. Here the slots
that are tokens are laid out over the columns of the text, padding included. What goes to memory
slots is not shown, so a row of the map sums to one or less.
"""

import torch
from torch import nn

from .cache import UNKNOWN_ID


class AttentionMap(nn.Module):
    """Its output is what transformers records for a layer."""

    def __init__(self, slots_before, tokens_before):
        """slots_before: slots that precede the window's; tokens_before: how many of them are the
        tokens before the window."""
        super().__init__()
        self.slots_before, self.tokens_before = slots_before, tokens_before

    def forward(self, columns, chunks):
        """Lay out the weights that the chunks of a call kept, and forget them.

        Returns B H T C, C the columns read so far.
        """
        weights = [(chunk, chunk.weights.pop()) for chunk in chunks if chunk.weights]
        return columns.lay_out(weights, self.slots_before, self.tokens_before)


class Columns:
    """Where the tokens of a call, and those read not long before, lie among the columns."""

    def __init__(self, progress, num_columns, mask, cache, window_length):
        tokens_read = progress.tokens_read
        self.tokens_read, self.window_length = tokens_read, window_length
        shape = tokens_read.shape[0], num_columns
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=tokens_read.device)
        recent = None if cache is None else cache.layers[0].recent
        before = mask[:, :0] if recent is None else (recent >= 0) | (recent == UNKNOWN_ID)
        real = torch.cat((before, mask), dim=1)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.past, self.num_columns = past, num_columns
        # Columns of real tokens first, in their order.
        self.order = (~real).long().argsort(dim=1, stable=True) + past - before.shape[1]
        self.known_before, self.known = before.sum(1), real.sum(1)

    def of(self, token, rows):
        """Columns of tokens, counted from the document's first (R n); `nowhere` if not known."""
        index = token - (self.tokens_read - self.known_before)[rows, None]
        found = self.order[rows].gather(1, index.clamp(0, self.order.shape[1] - 1))
        is_known = (token >= 0) & (index >= 0) & (index < self.known[rows, None])
        return torch.where(is_known, found, self.nowhere)

    @property
    def nowhere(self):
        return self.past + self.num_columns

    def lay_out(self, weights, slots_before, tokens_before):
        """weights: pairs of a chunk and its R H T J -> B H T C."""
        batch_size, heads = self.tokens_read.shape[0], weights[0][1].shape[1]
        width = self.nowhere + 1
        laid = weights[0][1].new_zeros(batch_size, self.num_columns + 1, heads, width)
        everyone = torch.arange(batch_size, device=laid.device)
        for chunk, kept in weights:
            rows = everyone if chunk.rows is None else chunk.rows
            slots = min(kept.shape[-1], slots_before + self.window_length)
            begin = chunk.windows_read[:, None] * self.window_length - slots_before
            slot = torch.arange(slots, device=laid.device)
            key = self.of((begin + slot).masked_fill(slot < slots_before - tokens_before, -1), rows)
            token = torch.arange(chunk.tokens, device=laid.device)
            query = self.of(chunk.tokens_read[:, None] + token, rows) - self.past
            is_read = token < (chunk.end - chunk.tokens_read)[:, None]
            query = query.masked_fill(~is_read, self.num_columns)
            kept = kept[:, :, : chunk.tokens, :slots].transpose(1, 2)  # R T H J
            spread = kept.new_zeros(*kept.shape[:3], width)
            spread = spread.scatter(3, key[:, None, None].expand_as(kept), kept)
            laid = laid.index_put((rows[:, None], query), spread)
        return laid[:, :-1, :, :-1].transpose(1, 2)
