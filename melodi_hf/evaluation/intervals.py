"""Bootstrap intervals of perplexities and of paired differences, over documents.

Each resample draws as many documents as there are, with replacement (Efron and Tibshirani, 1993,
chapter 13, the percentile method). Differences are paired: both sides use the same resamples, so
the variation between documents cancels.

An interval covers the choice of documents, not of seeds. With few documents it is too narrow; with
fewer than `MIN_DOCUMENTS` there is none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVEL, RESAMPLES, SEED, MIN_DOCUMENTS = 0.95, 2000, 0, 5
DRAWS_PER_BLOCK = 1 << 22  # resampled indices in memory at once

Interval = list[float]  # low, high


def describe_bootstrap(num_documents: int) -> dict[str, Any]:
    """Return the settings of the bootstrap, for JSON."""
    return {
        "method": "percentile bootstrap over documents",
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": SEED,
        "documents": num_documents,
        "fewest_documents": MIN_DOCUMENTS,
    }


def resample(sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Sum over resamples: name -> (resamples, ...) for values (documents, ...)."""
    tables = {name: np.asarray(each, dtype=np.float64) for name, each in sums.items()}
    number = len(next(iter(tables.values())))
    flat = {name: table.reshape(number, -1) for name, table in tables.items()}
    columns = np.concatenate([*flat.values()], axis=1)
    # NumPy keeps only the raw bits of a generator stable between versions.
    bits, size = np.random.PCG64(SEED), max(1, DRAWS_PER_BLOCK // number)
    parts = []
    for first in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - first)
        parts.append(count_draws(bits.random_raw(rows * number) % number, rows, number) @ columns)
    ends = np.cumsum([table.shape[1] for table in flat.values()])
    pieces = np.split(np.concatenate(parts), ends[:-1], axis=1)
    return {
        name: piece.reshape(-1, *table.shape[1:])
        for (name, table), piece in zip(tables.items(), pieces, strict=True)
    }


def count_draws(drawn: np.ndarray, rows: int, number: int) -> np.ndarray:
    """Count how often each document was drawn: (rows * number,) -> (rows, number)."""
    cells = drawn.astype(np.int64) + np.repeat(np.arange(rows) * number, number)
    return np.bincount(cells, minlength=rows * number).reshape(rows, number)


def interval(values: np.ndarray) -> Interval | None:
    """Return the central interval of values (resamples,); None if none is finite."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = (1 - LEVEL) / 2
    return np.quantile(values, [tail, 1 - tail]).tolist()


def relative_increase(first: float, second: float, count: float) -> float:
    """Return by which part the second perplexity exceeds the first: NLLs over `count` tokens."""
    return math.expm1((second - first) / count)


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], unit: str = "tokens"
) -> dict[str, Any]:
    """Return by which part the second perplexity exceeds the first, with its interval.

    Args:
        first, second: `by_document` of two settings or evaluations.
        unit: unit of the perplexity, "tokens", "words" or "bytes".

    Raises:
        ValueError: if the documents or their sizes differ.
    """
    check_same_documents(first, second, unit)
    sums = {
        "first": [row["nll"] for row in first],
        "second": [row["nll"] for row in second],
        "count": [row[unit] for row in first],
    }
    found: dict[str, Any] = {
        "change": relative_increase(*(sum(each) for each in sums.values())),
        "interval": None,
    }
    if len(first) >= MIN_DOCUMENTS:
        drawn = resample(sums)
        found["interval"] = interval(np.expm1((drawn["second"] - drawn["first"]) / drawn["count"]))
    return found


def check_same_documents(first: Sequence, second: Sequence, unit: str) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"one evaluation has {len(first)} documents and the other {len(second)}: evaluate both "
            "on the same documents"
        )
    for one, other in zip(first, second, strict=True):
        if (one["id"], one[unit]) != (other["id"], other[unit]):
            raise ValueError(
                f"one evaluation has document {one['id']!r} with {one[unit]:,} {unit}, the other "
                f"has {other['id']!r} with {other[unit]:,}: evaluate both on the same "
                "documents, and compare models with different tokenizers by words"
            )
