"""Perplexity of whole documents, read through a memory from their first token to their last.

Every token is scored once, the first one from the start token. Two settings read the same windows:

    carried   the memory goes from each window to the next, as in training
    emptied   the memory is emptied before every window: each is read as if a document began there

What the memory is worth is the part of the perplexity that it takes away, 1 - carried / emptied.
Perplexity per word is that of PG-19, exp(total NLL / words between blanks), which compares models
of different tokenizers, as bits per byte do.

Only one segment per row is in memory at a time, so a document may be of any length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from tqdm import tqdm
from transformers import PreTrainedModel

from melodi_hf.data.segments import IGNORED, Segments
from melodi_hf.data.tokens import EncodedDocument


class Batch(NamedTuple):
    """One segment of each row, and where in the documents it belongs."""

    input_ids: Tensor  # B T
    shift_labels: Tensor  # B T
    reset_memory: Tensor  # B
    places: list[tuple[int, int] | None]  # document and offset of the first target; None: padding


def evaluate_perplexity(
    model: PreTrainedModel,
    documents: Sequence[EncodedDocument],
    *,
    start_id: int,
    settings: Sequence[str] = ("carried", "emptied"),
    segment_windows: int = 8,
    num_rows: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Score every token of the documents; the result is ready for JSON."""
    refuse_unknown_settings(settings)
    refuse_unreadable(documents, start_id, model.config.vocab_size)
    window = model.config.window_length
    shape = {"segment_windows": segment_windows, "num_rows": num_rows}
    result: dict[str, Any] = {"window_length": window, **shape, "documents": len(documents)}
    result |= totals(documents)
    result["settings"] = {}
    with evaluating(model):
        for setting in settings:
            tally, start = Tally(documents, window), perf_counter()
            with progress_bar(setting, result["tokens"], progress) as report:
                READERS[setting](model, documents, tally, report, start_id=start_id, **shape)
            result["settings"][setting] = tally.summary(perf_counter() - start)
    result["worth"] = worth_of_memory(result["settings"])
    return result


def read_carried(model, documents, tally, report, *, start_id, segment_windows, num_rows):
    """Rows read documents side by side, each row's memory going from segment to segment."""
    length, rows = segment_windows * model.config.window_length, min(num_rows, len(documents))
    memory = None
    for batch in batches(model, documents, length, rows, rows, start_id):
        nll, memory = score(model, batch, memory=memory, reset_memory=batch.reset_memory)
        report(*tally.add(batch, nll))


def read_emptied(model, documents, tally, report, *, start_id, segment_windows, num_rows):
    """Windows are rows of their own: none has a past, so any number can be read at once."""
    length, size = model.config.window_length, segment_windows * num_rows
    for batch in batches(model, documents, length, 1, size, start_id):
        nll, _ = score(model, batch, memory=None, reset_memory=None)
        report(*tally.add(batch, nll))


READERS: dict[str, Callable] = {"carried": read_carried, "emptied": read_emptied}


def batches(model, documents, length, rows, size, start_id) -> Iterator[Batch]:
    """Segments of `length` in `rows`, `size` at once, cut behind the last window that is scored."""
    # The longest first, which leaves the least padding at the end of the rows.
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i].ids))
    segments = Segments(
        [documents[i] for i in order],
        segment_length=length,
        num_rows=rows,
        start_id=start_id,
        pad_id=start_id,  # any id will do: no score sees what stands behind a document's end
        seed=None,
    )
    device, window = next(model.parameters()).device, model.config.window_length
    for first in range(0, len(segments), size):
        chosen = range(first, min(first + size, len(segments)))
        items = default_collate([segments[i] for i in chosen])
        scored = int((items["shift_labels"] != IGNORED).sum(1).max())
        columns = slice(-(-scored // window) * window)
        yield Batch(
            items["input_ids"][:, columns].to(device),
            items["shift_labels"][:, columns].to(device),
            items["reset_memory"].to(device),
            [
                None if place is None else (order[place.document], place.offset)
                for place in map(segments.document_index, chosen)
            ],
        )


def score(model, batch: Batch, memory, reset_memory) -> tuple[Tensor, Any]:
    """The negative log-likelihood of each target, 0 where none is, and the memory afterwards."""
    out = model(
        batch.input_ids,
        memory=memory,
        reset_memory=reset_memory,
        return_memory=True,
        use_cache=False,
    )
    # row by row, so that the float32 copy of the logits is one row's
    nll = [
        F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
        for logits, labels in zip(out.logits, batch.shift_labels, strict=True)
    ]
    return torch.stack(nll), out.memory


class Tally:
    """Sums of negative log-likelihoods, by document and by position in the document."""

    def __init__(self, documents: Sequence[EncodedDocument], window_length: int):
        self.documents = documents
        self.edges = position_edges(window_length, max(len(d.ids) for d in documents))
        self.by_document = np.zeros(len(documents))
        self.by_position = np.zeros(len(self.edges) - 1)
        self.tokens_by_position = np.zeros(len(self.edges) - 1, dtype=np.int64)

    def add(self, batch: Batch, nll: Tensor) -> tuple[int, float]:
        """Take in a batch's scores; how many tokens they were, and their sum."""
        values = nll.double().cpu().numpy()
        scored = (batch.shift_labels != IGNORED).sum(1).tolist()
        for place, row, count in zip(batch.places, values, scored, strict=True):
            if place is not None:
                self.add_row(*place, row[:count])
        return sum(scored), float(values.sum())

    def add_row(self, document: int, offset: int, nll: np.ndarray) -> None:
        self.by_document[document] += nll.sum()
        positions = np.arange(offset, offset + len(nll))
        bins = np.searchsorted(self.edges, positions, side="right") - 1
        count = len(self.by_position)
        self.by_position += np.bincount(bins, weights=nll, minlength=count)
        self.tokens_by_position += np.bincount(bins, minlength=count)

    def summary(self, seconds: float) -> dict[str, Any]:
        """The setting's numbers; the tokens must be all of them, each once."""
        counts = totals(self.documents)
        scored = int(self.tokens_by_position.sum())
        assert scored == counts["tokens"], f"{scored} tokens scored of {counts['tokens']}"
        nll = float(self.by_document.sum())
        return {
            "nll": nll,
            **counts,
            "perplexity_per_token": perplexity(nll, counts["tokens"]),
            "perplexity_per_word": perplexity(nll, counts["words"]),
            "bits_per_byte": nll / math.log(2) / counts["bytes"],
            "seconds": seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "by_position": self.position_rows(),
            "by_document": self.document_rows(),
        }

    def position_rows(self) -> list[dict[str, Any]]:
        columns = zip(
            self.edges[:-1], self.edges[1:], self.tokens_by_position, self.by_position, strict=True
        )
        return [
            {
                "from": int(low),
                "to": int(high),
                "tokens": int(tokens),
                "nll": float(nll),
                "perplexity": perplexity(float(nll), int(tokens)),
            }
            for low, high, tokens, nll in columns
        ]

    def document_rows(self) -> list[dict[str, Any]]:
        return [
            {"id": d.id, "tokens": len(d.ids), "words": d.num_words, "nll": float(nll)}
            for d, nll in zip(self.documents, self.by_document, strict=True)
        ]


def position_edges(window_length: int, longest: int) -> np.ndarray:
    """0, W, 2W, 4W, 8W ... until the longest document ends."""
    edges = [0, window_length]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return np.array(edges)


def totals(documents: Sequence[EncodedDocument]) -> dict[str, int]:
    """What all documents hold together."""
    return {
        "tokens": sum(len(d.ids) for d in documents),
        "words": sum(d.num_words for d in documents),
        "bytes": sum(d.num_bytes for d in documents),
    }


def perplexity(nll: float, count: int) -> float | None:
    """exp(NLL / count); nothing for a count of nothing, infinity beyond the range of floats."""
    if not count:
        return None
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


def worth_of_memory(settings: dict[str, dict]) -> float | None:
    """The part of the perplexity per token that the memory takes away."""
    if not {"carried", "emptied"} <= settings.keys():
        return None
    carried, emptied = (
        settings[name]["nll"] / settings[name]["tokens"] for name in ("carried", "emptied")
    )
    return -math.expm1(carried - emptied)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients inside; the mode as it was outside."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@contextmanager
def progress_bar(setting: str, total: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """A bar in tokens, with their speed and the perplexity of what was read so far."""
    total_tokens, total_nll = 0, 0.0
    bar = tqdm(
        desc=setting,
        total=total,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not shown,
    )

    def report(tokens: int, nll: float) -> None:
        nonlocal total_tokens, total_nll
        total_tokens, total_nll = total_tokens + tokens, total_nll + nll
        running = perplexity(total_nll, total_tokens)
        if running is not None:
            bar.set_postfix_str(f"perplexity {running:.2f}", refresh=False)
        bar.update(tokens)

    with bar:
        yield report


def refuse_unknown_settings(settings: Sequence[str]) -> None:
    if not settings or not set(settings) <= READERS.keys():
        raise ValueError(f"settings {list(settings)} should be some of {sorted(READERS)}")


def refuse_unreadable(documents: Sequence[EncodedDocument], start_id: int, vocab_size: int) -> None:
    """Say which document cannot be scored, and why, before any time is spent."""
    if not documents:
        raise ValueError("there are no documents to score")
    if not 0 <= start_id < vocab_size:
        raise ValueError(f"start_id {start_id} is outside the model's vocabulary of {vocab_size}")
    for document in documents:
        if not len(document.ids):
            raise ValueError(f"document {document.id!r} is empty: it has no token to score")
        low, high = int(document.ids.min()), int(document.ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"document {document.id!r} has ids from {low} to {high}, but the model's "
                f"vocabulary is 0 to {vocab_size - 1}: was it encoded with another tokenizer?"
            )
