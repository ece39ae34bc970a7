"""Perplexity of whole documents, read through a memory from their first token to their last.

Every token is scored once, the first one from the start token. All settings read the same windows:

    carried     the memory goes from each window to the next, as in training
    emptied     the memory is emptied before every window: each is read as if a document began there
    short_off   the short-term memory is emptied before every window, the long-term one is carried
    long_off    the long-term memory is emptied before every window, the short-term one is carried
    queue_4     before every window, the long-term memory keeps what the newest 4 windows left

What is taken out is hidden if the model hides empty slots: then a shorter queue is that of a model
built with fewer windows. Else it is zeros which are attended to, as where a document begins.

What a memory is worth is the part of the perplexity that it takes away, 1 - carried / emptied.
Perplexity per word is that of PG-19, exp(total NLL / words between blanks), which compares models
of different tokenizers, as bits per byte do. Intervals: see `intervals`.

Only one segment per row is in memory at a time, so a document may be of any length.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
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
from melodi_hf.evaluation.intervals import (
    FEWEST,
    describe_bootstrap,
    interval,
    resample,
)
from melodi_hf.models.adapters import unwrap_decoder

QUEUE = re.compile(r"queue_([1-9]\d*)")
QUEUES = (1, 4, 16, 64)  # windows, for those who ask for all settings
PER = {"perplexity_per_token": "tokens", "perplexity_per_word": "words", "bits_per_byte": "bytes"}

Sums = Mapping[str, Any]


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
    """Score every token of the documents; the result is ready for JSON.

    start_id: the token before each document, usually eos.
    settings: as above; `settings_of(model)` names all that differ for a model.
    segment_windows: windows read in one forward where nothing is taken out between them.
    num_rows: documents read side by side.

    Raises ValueError for settings that are unknown, or take out what the model does not have, and
    for documents that it cannot read.
    """
    readers = check_settings(settings, model)
    refuse_unreadable(documents, start_id, model.config.vocab_size)
    window = model.config.window_length
    shape = {"segment_windows": segment_windows, "num_rows": num_rows}
    result: dict[str, Any] = {"window_length": window, **shape, "documents": len(documents)}
    result |= totals(documents)
    result["bootstrap"] = describe_bootstrap(len(documents))
    tallies, seconds = {}, {}
    with evaluating(model):
        for setting, read in readers.items():
            tally, start = Tally(documents, window), perf_counter()
            with progress_bar(setting, result["tokens"], progress) as report:
                read(model, documents, tally, report, start_id=start_id, **shape)
            tallies[setting], seconds[setting] = tally, perf_counter() - start
    result["settings"] = summaries(tallies, seconds)
    result["worth"] = result["settings"].get("carried", {}).get("worth")
    return result


def windows_kept(model) -> dict[str, float]:
    return unwrap_decoder(model).windows_kept()


def settings_of(model: PreTrainedModel) -> list[str]:
    """All settings that differ for this model, by the memories that it has."""
    kept = windows_kept(model)
    names = ["carried", "emptied"]
    if {"short", "long"} <= kept.keys():
        names += ["short_off", "long_off"]
    windows = kept.get("long", 0)
    return names + [f"queue_{n}" for n in QUEUES if n < windows < math.inf]


def reader(setting: str) -> Callable:
    """How documents are read in a setting, by its name."""
    queue = QUEUE.fullmatch(setting)
    if queue:
        return partial(read_forgetting, windows={"long": int(queue[1])})
    if setting not in READERS:
        raise ValueError(f"setting {setting!r} should be one of {sorted(READERS)}, or queue_N")
    return READERS[setting]


def read_carried(model, documents, tally, report, *, start_id, segment_windows, num_rows):
    """Rows read documents side by side, each row's memory going from segment to segment."""
    length, rows = segment_windows * model.config.window_length, min(num_rows, len(documents))
    memory = None
    for batch in batches(model, documents, length, rows, rows, start_id):
        nll, memory = score(model, batch, memory=memory, reset_memory=batch.reset_memory)
        report(*tally.add(batch, nll))


def read_forgetting(
    model, documents, tally, report, *, windows, start_id, segment_windows, num_rows
):
    """As carried, window by window; before each, of every kind of memory in `windows` no more is
    kept than what so many windows left."""
    length, rows = model.config.window_length, min(num_rows, len(documents))
    memory = None
    for batch in batches(model, documents, length, rows, rows, start_id):
        if memory is not None:
            memory = unwrap_decoder(model).forget(memory, **windows)
        nll, memory = score(model, batch, memory=memory, reset_memory=batch.reset_memory)
        report(*tally.add(batch, nll))


def read_emptied(model, documents, tally, report, *, start_id, segment_windows, num_rows):
    """Windows are rows of their own: none has a past, so any number can be read at once."""
    length, size = model.config.window_length, segment_windows * num_rows
    for batch in batches(model, documents, length, 1, size, start_id):
        nll, _ = score(model, batch, memory=None, reset_memory=None)
        report(*tally.add(batch, nll))


READERS: dict[str, Callable] = {
    "carried": read_carried,
    "emptied": read_emptied,
    "short_off": partial(read_forgetting, windows={"short": 0}),
    "long_off": partial(read_forgetting, windows={"long": 0}),
}


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
        self.nll = np.zeros((len(documents), len(self.edges) - 1))
        self.tokens = np.zeros(self.nll.shape, dtype=np.int64)

    def add(self, batch: Batch, nll: Tensor) -> tuple[int, float]:
        """Take in a batch's scores; how many tokens they were, and their sum."""
        values = nll.double().cpu().numpy()
        scored = (batch.shift_labels != IGNORED).sum(1).tolist()
        for place, row, count in zip(batch.places, values, scored, strict=True):
            if place is not None:
                self.add_row(*place, row[:count])
        return sum(scored), float(values.sum())

    def add_row(self, document: int, offset: int, nll: np.ndarray) -> None:
        positions = np.arange(offset, offset + len(nll))
        bins = np.searchsorted(self.edges, positions, side="right") - 1
        count = len(self.edges) - 1
        self.nll[document] += np.bincount(bins, weights=nll, minlength=count)
        self.tokens[document] += np.bincount(bins, minlength=count)

    def check(self) -> None:
        """The tokens must be all of them, each once."""
        scored, tokens = int(self.tokens.sum()), totals(self.documents)["tokens"]
        assert scored == tokens, f"{scored} tokens scored of {tokens}"


def summaries(tallies: Mapping[str, Tally], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of each setting."""
    first = next(iter(tallies.values()))
    counts, documents = totals(first.documents), first.documents
    by_position: dict[str, Any] = {name: tally.nll for name, tally in tallies.items()}
    by_position["tokens"] = first.tokens
    whole = {name: table.sum(1) for name, table in by_position.items()}
    whole |= {"words": [d.num_words for d in documents], "bytes": [d.num_bytes for d in documents]}
    found = {}
    for name, tally in tallies.items():
        tally.check()
        nll = float(tally.nll.sum())
        found[name] = {
            "nll": nll,
            **counts,
            **measured(name, whole, PER),
            "seconds": seconds[name],
            "tokens_per_second": counts["tokens"] / seconds[name],
            "by_position": position_rows(name, tally.edges, by_position),
            "by_document": document_rows(tally),
        }
    return found


def position_rows(name: str, edges: np.ndarray, sums: Sums) -> list[dict[str, Any]]:
    """A setting's numbers at each position; sums: documents x positions."""
    rows = []
    for i, (low, high) in enumerate(pairwise(edges)):
        reaching = sums["tokens"][:, i] > 0
        here = {key: table[reaching, i] for key, table in sums.items()}
        rows.append(
            {
                "from": int(low),
                "to": int(high),
                "tokens": int(here["tokens"].sum()),
                "nll": float(here[name].sum()),
                **measured(name, here, {"perplexity": "tokens"}),
            }
        )
    return rows


def document_rows(tally: Tally) -> list[dict[str, Any]]:
    return [
        {
            "id": d.id,
            "tokens": len(d.ids),
            "words": d.num_words,
            "bytes": d.num_bytes,
            "nll": float(nll),
        }
        for d, nll in zip(tally.documents, tally.nll.sum(1), strict=True)
    ]


def measured(name: str, sums: Sums, per: Mapping[str, str]) -> dict[str, Any]:
    """What is told of a setting, and the interval of each number if there are enough documents.

    sums: the NLL of each setting and the units that it is divided by, (documents,) each.
    """
    totals = {key: np.sum(each) for key, each in sums.items()}
    found: dict[str, Any] = {
        key: float(value) if totals[per.get(key, "tokens")] else None
        for key, value in measures(name, totals, per).items()
    }
    found["intervals"] = {}
    if len(sums["tokens"]) >= FEWEST:
        drawn = measures(name, resample(sums), per)
        found["intervals"] = {key: interval(values) for key, values in drawn.items()}
    return found


def measures(name: str, sums: Sums, per: Mapping[str, str]) -> dict[str, Any]:
    """Perplexities of a setting; its `worth`, the part of the perplexity that is taken away by what
    it leaves of the memory; and the part by which it is above that of the whole memory.

    sums: of all documents, or (resamples,) of those that were drawn.
    """
    nll = sums[name]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = {
            key: nll / math.log(2) / sums[unit]
            if key == "bits_per_byte"
            else np.exp(nll / sums[unit])
            for key, unit in per.items()
        }
    if "emptied" in sums and name != "emptied":
        found["worth"] = -np.expm1((nll - sums["emptied"]) / sums["tokens"])
    if "carried" in sums and name != "carried":
        found["above_carried"] = np.expm1((nll - sums["carried"]) / sums["tokens"])
    return found


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


def check_settings(settings: Sequence[str], model: PreTrainedModel) -> dict[str, Callable]:
    """How each setting is read; refused are those that take out what the model does not have."""
    if not settings:
        raise ValueError(f"settings are missing: give some of {sorted(READERS)}, or queue_N")
    readers = {name: reader(name) for name in settings}
    for setting, read in readers.items():
        for kind, windows in getattr(read, "keywords", {}).get("windows", {}).items():
            kept = windows_kept(model)
            if kind not in kept:
                raise ValueError(
                    f"setting {setting!r} takes out {kind}-term memory, of which this model has "
                    "none: leave the setting out, or ask for all that the model has"
                )
            if windows > 0 and kept[kind] == math.inf:
                raise ValueError(
                    f"setting {setting!r} keeps {windows} windows, but the {kind}-term memory of "
                    f"this model sums up the whole past: ask for {kind}_off, or for all that the "
                    "model has"
                )
    return readers


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
