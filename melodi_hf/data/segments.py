"""Split documents into segments; each row of a batch reads documents one after another.

With four documents, two rows and segments of length T (a1 is the first segment of a):

    step    0   1   2   3   4
    row 0   a1  a2  a3  d1  d2
    row 1   b1  c1  c2  c3  --     -- is a segment of padding

Documents are assigned, in shuffled order, to the row with the fewest segments so far. Item `step *
num_rows + row` is one segment, so sequential batches of `num_rows` items are the training steps,
and row r continues row r of the previous step. An item depends only on its index, so a run is
resumed by starting at another index.

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

IGNORED = -100  # label that the loss ignores
NO_DOCUMENT = -1
MAX_CACHED_PLANS = 2  # a prefetching loader may still read the previous epoch


class Plan(NamedTuple):
    """The segment that each row reads at each step of an epoch."""

    documents: np.ndarray  # int32, (num_steps, num_rows): index, or NO_DOCUMENT
    offsets: np.ndarray  # int64, (num_steps, num_rows): first target of the segment


class Place(NamedTuple):
    """The position of an item's targets."""

    document: int  # index in the documents given
    offset: int  # of the item's first target within its document, in tokens
    epoch: int


class Segments(Dataset):
    """All segments of all epochs, in training order.

    Read it in order (no shuffling) in batches of `num_rows`. Items are dictionaries:

        input_ids     (T,) int64, pad_id after the end of a document
        shift_labels  (T,) int64, the next token of each input, -100 after the end of a document
        reset_memory  () bool, whether a new document begins

    Every epoch has a new order.
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
        """Plan the segments, without copying the ids.

        documents: `EncodedDocument`s, or integer arrays or lists of ids.
        segment_length: T, in tokens.
        num_rows: batch size, in documents.
        start_id: the token before each document, usually eos.
        pad_id: the token after the end of a document, never a target; default `start_id`.
        seed: seed of the order of documents; None keeps the given order.
        vocab_size: if given, ids are checked against it.

        Raises ValueError for sizes below 1, no documents, empty documents and invalid ids.
        """
        sizes = {"segment_length": segment_length, "num_rows": num_rows, "num_epochs": num_epochs}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be 1 or more, got {size}")
        if not len(documents):
            raise ValueError("documents is empty: pass at least one document")
        check_id_range("start_id", start_id, vocab_size)
        pad_id = start_id if pad_id is None else pad_id
        check_id_range("pad_id", pad_id, vocab_size)
        self.segment_length = segment_length
        self.num_rows = num_rows
        self.start_id = start_id
        self.pad_id = pad_id
        self.seed = seed
        self.num_epochs = num_epochs
        self.ids = [checked_ids(document, n, vocab_size) for n, document in enumerate(documents)]
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        self.num_segments = -(-lengths // segment_length)  # per document
        self.num_target_tokens = int(lengths.sum()) * num_epochs
        steps = [max(map(sum, self.row_lengths(epoch))) for epoch in range(num_epochs)]
        self.first_steps = np.concatenate(([0], np.cumsum(steps)))  # of each epoch, and the total
        self._plans: dict[int, Plan] = {}

    @property
    def num_steps(self) -> int:
        """The number of batches in all epochs."""
        return int(self.first_steps[-1])

    @property
    def num_padding_tokens(self) -> int:
        """The number of positions without a target."""
        return len(self) * self.segment_length - self.num_target_tokens

    def __len__(self) -> int:
        return self.num_steps * self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.document_index(index)
        # Both (T,): positions after the end of the document keep these values.
        input_ids = torch.full((self.segment_length,), self.pad_id)
        shift_labels = torch.full((self.segment_length,), IGNORED)
        if place is not None:
            ids, start = self.ids[place.document], place.offset
            targets = to_tensor(ids[start : start + self.segment_length])
            shift_labels[: len(targets)] = targets
            input_ids[1 : len(targets)] = targets[:-1]
            input_ids[0] = int(ids[start - 1]) if start else self.start_id
        return {
            "input_ids": input_ids,
            "shift_labels": shift_labels,
            "reset_memory": torch.tensor(place is None or place.offset == 0),
        }

    def digest(self, count: int) -> str:
        """Hash the first `count` items in order, to compare the data of runs."""
        found = hashlib.sha256()
        for index in range(count):
            for values in self[index].values():
                found.update(values.numpy().astype("<i4").tobytes())
        return found.hexdigest()

    def document_index(self, index: int) -> Place | None:
        """Return document and offset of item `index`; None for a segment of padding."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: there are {len(self)} segments")
        step, row = divmod(index % len(self), self.num_rows)
        epoch = int(np.searchsorted(self.first_steps, step, side="right")) - 1
        plan = self.plan(epoch)
        step -= int(self.first_steps[epoch])
        document = int(plan.documents[step, row])
        if document == NO_DOCUMENT:
            return None
        return Place(document, int(plan.offsets[step, row]), epoch)

    def plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch; the last ones are cached."""
        if epoch not in self._plans:
            while len(self._plans) >= MAX_CACHED_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self.make_plan(epoch)
        return self._plans[epoch]

    def make_plan(self, epoch: int) -> Plan:
        """Make the plan of an epoch."""
        rows = self.assign_rows(epoch)
        num_steps = int(self.first_steps[epoch + 1] - self.first_steps[epoch])
        documents = np.full((num_steps, self.num_rows), NO_DOCUMENT, dtype=np.int32)
        offsets = np.zeros((num_steps, self.num_rows), dtype=np.int64)
        for row, assigned in enumerate(rows):
            step = 0
            for document in assigned:
                count = int(self.num_segments[document])
                documents[step : step + count, row] = document
                offsets[step : step + count, row] = np.arange(count) * self.segment_length
                step += count
        return Plan(documents, offsets)

    def row_lengths(self, epoch: int) -> list[list[int]]:
        """Return the number of segments of each document, by row."""
        return [
            [int(self.num_segments[document]) for document in row]
            for row in self.assign_rows(epoch)
        ]

    def assign_rows(self, epoch: int) -> list[list[int]]:
        """Assign each document, in the epoch's order, to the row with the fewest segments."""
        rows: list[list[int]] = [[] for _ in range(self.num_rows)]
        shortest = [(0, row) for row in range(self.num_rows)]  # a heap of (segments, row)
        for document in shuffled_order(len(self.ids), self.seed, epoch):
            segments, row = shortest[0]
            rows[row].append(document)
            heapq.heapreplace(shortest, (segments + int(self.num_segments[document]), row))
        return rows


def shuffled_order(count: int, seed: int | None, epoch: int) -> list[int]:
    """Shuffle range(count) identically in every version of NumPy, so that runs can be resumed."""
    if seed is None:
        return list(range(count))
    # NumPy keeps the raw bits of a generator stable, but not the results of permutation.
    keys = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(keys, kind="stable").tolist()


def checked_ids(document, number: int, vocab_size: int | None) -> np.ndarray:
    """Return the ids of a document as an integer array (n,), after checking them."""
    if isinstance(document, EncodedDocument):
        name, ids = document.id, document.ids
    else:
        name, ids = str(number), np.asarray(document)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"document {name!r} has ids of shape {ids.shape}: pass a flat sequence of at least one "
            "id, or leave the document out"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"document {name!r} has ids of type {ids.dtype}: pass integers")
    for worst in (int(ids.min()), int(ids.max())):
        check_id_range(f"an id of document {name!r}", worst, vocab_size)
    # Four bytes are enough for an id.
    return ids.astype(np.int32) if ids.dtype.itemsize > 4 else ids


def check_id_range(what: str, number: int | None, vocab_size: int | None) -> None:
    """Raise ValueError unless 0 <= number < vocab_size; None is no upper bound."""
    if number is None:
        raise ValueError(
            f"{what} is None: pass a token id, such as eos; tokenizer.add_special_tokens adds one "
            "to a tokenizer without"
        )
    if number < 0 or (vocab_size is not None and number >= vocab_size):
        allowed = "0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        raise ValueError(
            f"{what} must be {allowed}, got {number}; use the tokenizer that belongs to the model"
        )


def to_tensor(ids: np.ndarray) -> Tensor:
    """Copy ids to an int64 tensor."""
    return torch.from_numpy(ids.astype(np.int64))
