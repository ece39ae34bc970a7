"""Ids become segments in rows: each row reads one document from beginning to end, then the next.

With four documents, two rows and segments of length T (a1 is the first segment of a):

    step    0   1   2   3   4
    row 0   a1  a2  a3  d1  d2
    row 1   b1  c1  c2  c3  --     -- is a segment of padding only

Documents are dealt, in shuffled order, to the row that has the fewest segments so far. Item
`step * num_rows + row` is one segment, so batches of `num_rows` items taken in order are the steps
of training, and the memory of row r after one step belongs to row r of the next. An item depends
on its index alone: to resume, start at another index.

A document ids[0..n) is read as start, ids[0], ..., ids[n-2] and predicts ids[0], ..., ids[n-1].
Inputs and targets have the same length and every token is a target exactly once per epoch.
"""

import hashlib
import heapq
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from melodi_hf.data.tokens import EncodedDocument

IGNORED = -100  # the label that the loss leaves out
NO_DOCUMENT = -1
PLANS_KEPT = 2  # a loader that prefetches may still read the epoch before


class Plan(NamedTuple):
    """Which segment of which document is read at each step and row of one epoch."""

    documents: np.ndarray  # int32, (num_steps, num_rows): index, or NO_DOCUMENT
    offsets: np.ndarray  # int64, (num_steps, num_rows): token at which the segment's targets begin


class Place(NamedTuple):
    """Where an item's targets stand."""

    document: int  # index in the documents given
    offset: int  # of the item's first target within its document, in tokens
    epoch: int


class Segments(Dataset):
    """All segments of all epochs, in the order in which they are trained on.

    Read it in order (no shuffling) in batches of `num_rows`. Item i is a dictionary:

        input_ids     (T,) int64, pad_id behind a document's end
        shift_labels  (T,) int64, the token after each input, -100 behind a document's end
        reset_memory  () bool, whether the row's memory belongs to an earlier document

    A new order is drawn for every epoch.
    """

    def __init__(
        self,
        documents: Sequence,
        *,
        segment_length: int,
        num_rows: int,
        start_id: int,
        pad_id: int | None = None,
        seed: int | None = 0,
        num_epochs: int = 1,
        vocab_size: int | None = None,
    ):
        """Plan the segments; the ids themselves are neither copied nor turned into tensors.

        documents: `EncodedDocument`s, or whole-number arrays or lists of ids.
        segment_length: T, in tokens.
        num_rows: documents read side by side; the batch size.
        start_id: the token before each document, usually eos.
        pad_id: the token behind a document's end, which is never scored; `start_id` if None.
        seed: of the order of documents; None keeps the order given.
        vocab_size: if given, ids outside of it are refused.

        Raises ValueError for sizes below 1, no documents, empty documents and ids that cannot be.
        """
        sizes = {"segment_length": segment_length, "num_rows": num_rows, "num_epochs": num_epochs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be 1 or more, got {size}")
        if not len(documents):
            raise ValueError("Segments needs at least one document, got none")
        refuse_outside("start_id", start_id, vocab_size)
        pad_id = start_id if pad_id is None else pad_id
        refuse_outside("pad_id", pad_id, vocab_size)
        self.segment_length = segment_length
        self.num_rows = num_rows
        self.start_id = start_id
        self.pad_id = pad_id
        self.seed = seed
        self.num_epochs = num_epochs
        self.ids = [ids_of(document, n, vocab_size) for n, document in enumerate(documents)]
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        self.num_segments = -(-lengths // segment_length)  # per document
        self.num_target_tokens = int(lengths.sum()) * num_epochs
        steps = [max(map(sum, self.lengths_of_rows(epoch))) for epoch in range(num_epochs)]
        self.first_steps = np.concatenate(([0], np.cumsum(steps)))  # of each epoch, and the end
        self._plans: dict[int, Plan] = {}

    @property
    def num_steps(self) -> int:
        """Batches of `num_rows` segments in all epochs."""
        return int(self.first_steps[-1])

    @property
    def num_padding_tokens(self) -> int:
        """Positions that are no target: behind the ends of documents and of shorter rows."""
        return len(self) * self.segment_length - self.num_target_tokens

    def __len__(self) -> int:
        return self.num_steps * self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.document_index(index)
        # Both (T,): what the document does not fill stays as it is here.
        input_ids = torch.full((self.segment_length,), self.pad_id)
        shift_labels = torch.full((self.segment_length,), IGNORED)
        if place is not None:
            ids, start = self.ids[place.document], place.offset
            targets = tensor_of(ids[start : start + self.segment_length])
            shift_labels[: len(targets)] = targets
            input_ids[1 : len(targets)] = targets[:-1]
            input_ids[0] = int(ids[start - 1]) if start else self.start_id
        return {
            "input_ids": input_ids,
            "shift_labels": shift_labels,
            "reset_memory": torch.tensor(place is None or place.offset == 0),
        }

    def digest(self, count: int) -> str:
        """Name all that the first `count` items hold, in their order: runs that are fed the same
        have the same name."""
        found = hashlib.sha256()
        for index in range(count):
            for values in self[index].values():
                found.update(values.numpy().astype("<i4").tobytes())
        return found.hexdigest()

    def document_index(self, index: int) -> Place | None:
        """Tell which part of which document item `index` is; None for a segment of padding only."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} segments, got the index {index}")
        step, row = divmod(index % len(self), self.num_rows)
        epoch = int(np.searchsorted(self.first_steps, step, side="right")) - 1
        plan = self.plan(epoch)
        step -= int(self.first_steps[epoch])
        document = int(plan.documents[step, row])
        if document == NO_DOCUMENT:
            return None
        return Place(document, int(plan.offsets[step, row]), epoch)

    def plan(self, epoch: int) -> Plan:
        """Lay out one epoch; the plans last asked for are kept, and can always be made again."""
        if epoch not in self._plans:
            while len(self._plans) >= PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self.make_plan(epoch)
        return self._plans[epoch]

    def make_plan(self, epoch: int) -> Plan:
        """Write the documents of each row below one another."""
        rows = self.deal(epoch)
        num_steps = int(self.first_steps[epoch + 1] - self.first_steps[epoch])
        documents = np.full((num_steps, self.num_rows), NO_DOCUMENT, dtype=np.int32)
        offsets = np.zeros((num_steps, self.num_rows), dtype=np.int64)
        for row, dealt in enumerate(rows):
            step = 0
            for document in dealt:
                count = int(self.num_segments[document])
                documents[step : step + count, row] = document
                offsets[step : step + count, row] = np.arange(count) * self.segment_length
                step += count
        return Plan(documents, offsets)

    def lengths_of_rows(self, epoch: int) -> list[list[int]]:
        """Return for each row the numbers of segments of its documents."""
        return [[int(self.num_segments[document]) for document in row] for row in self.deal(epoch)]

    def deal(self, epoch: int) -> list[list[int]]:
        """Give each document, in the epoch's order, to the row with the fewest segments so far."""
        rows: list[list[int]] = [[] for _ in range(self.num_rows)]
        shortest = [(0, row) for row in range(self.num_rows)]  # a heap of (segments, row)
        for document in order_of(len(self.ids), self.seed, epoch):
            segments, row = shortest[0]
            rows[row].append(document)
            heapq.heapreplace(shortest, (segments + int(self.num_segments[document]), row))
        return rows


def order_of(count: int, seed: int | None, epoch: int) -> list[int]:
    """Shuffle range(count); the same in every version of NumPy, so that a run can be resumed."""
    if seed is None:
        return list(range(count))
    # Only the raw bits of a generator are promised to stay, not what permutation makes of them.
    keys = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(keys, kind="stable").tolist()


def ids_of(document, number: int, vocab_size: int | None) -> np.ndarray:
    """Take the ids of one document, as (n,) whole numbers, and refuse what no model could read."""
    if isinstance(document, EncodedDocument):
        name, ids = document.id, document.ids
    else:
        name, ids = str(number), np.asarray(document)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"document {name!r} has ids of shape {ids.shape}; give a flat row of one id or more, "
            "or leave the document out"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"document {name!r} has ids of type {ids.dtype}; give whole numbers")
    for worst in (int(ids.min()), int(ids.max())):
        refuse_outside(f"an id of document {name!r}", worst, vocab_size)
    # An id needs no more than four bytes; a corpus is held in memory.
    return ids.astype(np.int32) if ids.dtype.itemsize > 4 else ids


def refuse_outside(what: str, number: int | None, vocab_size: int | None) -> None:
    """Raise ValueError unless 0 <= number < vocab_size; None is no upper bound."""
    if number is None:
        raise ValueError(
            f"{what} is None: give the id of a token, such as eos; a tokenizer that has none can "
            "be given one by tokenizer.add_special_tokens"
        )
    if number < 0 or (vocab_size is not None and number >= vocab_size):
        allowed = "0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        raise ValueError(
            f"{what} must be {allowed}, got {number}; "
            "the tokenizer and the model's vocab_size must belong together"
        )


def tensor_of(ids: np.ndarray) -> Tensor:
    """Copy ids into an int64 tensor, the type that embeddings and losses take."""
    return torch.from_numpy(ids.astype(np.int64))
