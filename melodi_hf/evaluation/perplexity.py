"""Compute the perplexity of whole documents, read with memory.

Every token is scored once, the first one after the start token. All settings read the same windows:

    carried     the memory is carried from window to window, as in training
    emptied     the memory is reset before every window
    short_off   the short-term memory is reset before every window, the long-term one is carried
    long_off    the long-term memory is reset before every window, the short-term one is carried
    queue_4     the long-term memory keeps only the entries of the newest 4 windows

Removed entries are masked if the model masks empty slots; a shorter queue then equals that of a
model with fewer windows. Otherwise they are zeros that are attended to, as at the start of a
document.

`worth` is the part by which the memory reduces the perplexity, 1 - carried / emptied. Perplexity
per word is defined as for PG-19, exp(total NLL / number of words); like bits per byte it does not
depend on the tokenizer. Intervals: see `intervals`.

One segment per row is in memory at a time, so documents may have any length.
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
    MIN_DOCUMENTS,
    describe_bootstrap,
    interval,
    resample,
)
from melodi_hf.models.memory_file import unwrap_decoder

QUEUE_PATTERN = re.compile(r"queue_([1-9]\d*)")
QUEUE_WINDOWS = (1, 4, 16, 64)  # windows, for the settings "all"
PER = {"perplexity_per_token": "tokens", "perplexity_per_word": "words", "bits_per_byte": "bytes"}

Sums = Mapping[str, Any]


class Batch(NamedTuple):
    """One segment per row, and its position in the documents."""

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
    """Score every token of the documents; return the results as JSON data.

    start_id: the token before each document, usually eos.
    settings: as above; `list_settings(model)` returns all for a model.
    segment_windows: windows per forward, in settings that do not reset between windows.
    num_rows: batch size, in documents.

    Raises ValueError for settings that are unknown or do not apply to the model, and for documents
    with invalid ids.
    """
    readers = check_settings(settings, model)
    check_documents(documents, start_id, model.config.vocab_size)
    window = model.config.window_length
    shape = {"segment_windows": segment_windows, "num_rows": num_rows}
    result: dict[str, Any] = {"window_length": window, **shape, "documents": len(documents)}
    result |= count_units(documents)
    result["bootstrap"] = describe_bootstrap(len(documents))
    tallies, seconds = {}, {}
    with evaluation_mode(model):
        for setting, read in readers.items():
            tally, start = Tally(documents, window), perf_counter()
            with progress_bar(setting, result["tokens"], progress) as report:
                read(model, documents, tally, report, start_id=start_id, **shape)
            tallies[setting], seconds[setting] = tally, perf_counter() - start
    result["settings"] = summaries(tallies, seconds)
    result["worth"] = result["settings"].get("carried", {}).get("worth")
    return result


def memory_windows(model) -> dict[str, float]:
    return unwrap_decoder(model).windows_kept()


def list_settings(model: PreTrainedModel) -> list[str]:
    """List the settings that apply to the memories of a model."""
    available = memory_windows(model)
    names = ["carried", "emptied"]
    if {"short", "long"} <= available.keys():
        names += ["short_off", "long_off"]
    windows = available.get("long", 0)
    return names + [f"queue_{n}" for n in QUEUE_WINDOWS if n < windows < math.inf]


def get_reader(setting: str) -> Callable:
    """Return the function that reads documents in a setting."""
    queue = QUEUE_PATTERN.fullmatch(setting)
    if queue:
        return partial(read_truncated, windows={"long": int(queue[1])})
    if setting not in READERS:
        raise ValueError(f"unknown setting {setting!r}: choose from {sorted(READERS)} and queue_N")
    return READERS[setting]


def read_carried(model, documents, tally, report, *, start_id, segment_windows, num_rows):
    """Read documents in rows, with the memory carried from segment to segment."""
    length, rows = segment_windows * model.config.window_length, min(num_rows, len(documents))
    memory = None
    for batch in batches(model, documents, length, rows, rows, start_id):
        nll, memory = score_batch(model, batch, memory=memory, reset_memory=batch.reset_memory)
        report(*tally.add(batch, nll))


def read_truncated(
    model, documents, tally, report, *, windows, start_id, segment_windows, num_rows
):
    """Read window by window; before each, truncate each memory in `windows` to so many windows."""
    length, rows = model.config.window_length, min(num_rows, len(documents))
    memory = None
    for batch in batches(model, documents, length, rows, rows, start_id):
        if memory is not None:
            memory = unwrap_decoder(model).forget(memory, **windows)
        nll, memory = score_batch(model, batch, memory=memory, reset_memory=batch.reset_memory)
        report(*tally.add(batch, nll))


def read_emptied(model, documents, tally, report, *, start_id, segment_windows, num_rows):
    """Read windows as independent rows, without memory."""
    length, size = model.config.window_length, segment_windows * num_rows
    for batch in batches(model, documents, length, 1, size, start_id):
        nll, _ = score_batch(model, batch, memory=None, reset_memory=None)
        report(*tally.add(batch, nll))


READERS: dict[str, Callable] = {
    "carried": read_carried,
    "emptied": read_emptied,
    "short_off": partial(read_truncated, windows={"short": 0}),
    "long_off": partial(read_truncated, windows={"long": 0}),
}


def batches(model, documents, length, rows, size, start_id) -> Iterator[Batch]:
    """Yield segments of `length` in `rows` rows, `size` at a time, without trailing padding."""
    # The longest first, for the least padding at the end of the rows.
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i].ids))
    segments = Segments(
        [documents[i] for i in order],
        segment_length=length,
        num_rows=rows,
        start_id=start_id,
        pad_id=start_id,  # any id: tokens after the end of a document are not scored
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


def score_batch(model, batch: Batch, memory, reset_memory) -> tuple[Tensor, Any]:
    """Return the NLL of each target (0 without a target) and the new memory."""
    out = model(
        batch.input_ids,
        memory=memory,
        reset_memory=reset_memory,
        return_memory=True,
        use_cache=False,
    )
    # row by row, to limit the float32 copy of the logits
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
        """Add the scores of a batch; return the number of tokens and the sum of their NLL."""
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
        """Check that every token was scored once."""
        scored, tokens = int(self.tokens.sum()), count_units(self.documents)["tokens"]
        assert scored == tokens, f"{scored} tokens scored of {tokens}"


def summaries(tallies: Mapping[str, Tally], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Compute the metrics of each setting."""
    first = next(iter(tallies.values()))
    counts, documents = count_units(first.documents), first.documents
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
            **setting_with_intervals(name, whole, PER),
            "seconds": seconds[name],
            "tokens_per_second": counts["tokens"] / seconds[name],
            "by_position": position_rows(name, tally.edges, by_position),
            "by_document": document_rows(tally),
        }
    return found


def position_rows(name: str, edges: np.ndarray, sums: Sums) -> list[dict[str, Any]]:
    """Compute the metrics of a setting by position; sums: documents x positions."""
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
                **setting_with_intervals(name, here, {"perplexity": "tokens"}),
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


def setting_with_intervals(name: str, sums: Sums, per: Mapping[str, str]) -> dict[str, Any]:
    """Compute the metrics of a setting, with intervals if there are enough documents.

    sums: the NLL of each setting and the unit counts, (documents,) each.
    """
    totals = {key: np.sum(each) for key, each in sums.items()}
    found: dict[str, Any] = {
        key: float(value) if totals[per.get(key, "tokens")] else None
        for key, value in setting_metrics(name, totals, per).items()
    }
    found["intervals"] = {}
    if len(sums["tokens"]) >= MIN_DOCUMENTS:
        drawn = setting_metrics(name, resample(sums), per)
        found["intervals"] = {key: interval(values) for key, values in drawn.items()}
    return found


def setting_metrics(name: str, sums: Sums, per: Mapping[str, str]) -> dict[str, Any]:
    """Compute the perplexities of a setting, its `worth`, and its increase over "carried".

    sums: totals over all documents, or (resamples,) of the bootstrap.
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
    """Return the edges 0, W, 2W, 4W, 8W ... up to the longest document."""
    edges = [0, window_length]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return np.array(edges)


def count_units(documents: Sequence[EncodedDocument]) -> dict[str, int]:
    """Count the tokens, words and bytes of all documents."""
    return {
        "tokens": sum(len(d.ids) for d in documents),
        "words": sum(d.num_words for d in documents),
        "bytes": sum(d.num_bytes for d in documents),
    }


def perplexity(nll: float, count: int) -> float | None:
    """Return exp(NLL / count); None for a count of 0, infinity on overflow."""
    if not count:
        return None
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Disable dropout and gradients; restore the mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@contextmanager
def progress_bar(setting: str, total: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar in tokens, with speed and running perplexity."""
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
    """Return the reader of each setting; raise for settings that do not apply to the model."""
    if not settings:
        raise ValueError(f"settings is empty: choose from {sorted(READERS)} and queue_N")
    readers = {name: get_reader(name) for name in settings}
    for setting, read in readers.items():
        for kind, windows in getattr(read, "keywords", {}).get("windows", {}).items():
            available = memory_windows(model)
            if kind not in available:
                raise ValueError(
                    f"setting {setting!r} needs a {kind}-term memory, which this model does not "
                    "have: leave it out, or use list_settings(model)"
                )
            if windows > 0 and available[kind] == math.inf:
                raise ValueError(
                    f"setting {setting!r} keeps {windows} windows, but the {kind}-term memory of "
                    f"this model is a summary of the whole past: use {kind}_off, or "
                    "list_settings(model)"
                )
    return readers


def check_documents(documents: Sequence[EncodedDocument], start_id: int, vocab_size: int) -> None:
    """Raise ValueError for documents that cannot be scored."""
    if not documents:
        raise ValueError("documents is empty: pass at least one document to score")
    if not 0 <= start_id < vocab_size:
        raise ValueError(
            f"start_id {start_id} is outside the model's vocabulary of {vocab_size}: use its eos id"
        )
    for document in documents:
        if not len(document.ids):
            raise ValueError(
                f"document {document.id!r} is empty: pass documents of at least one token"
            )
        low, high = int(document.ids.min()), int(document.ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"document {document.id!r} has ids from {low} to {high}, but the model's "
                f"vocabulary is 0 to {vocab_size - 1}: use the tokenizer of the model"
            )
