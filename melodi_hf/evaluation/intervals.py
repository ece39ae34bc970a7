"""How sure a perplexity is: intervals over documents, and differences on the same documents.

The bootstrap draws as many documents as there are, with replacement, again and again, and computes
the number anew from what it drew (Efron and Tibshirani, 1993, chapter 13: the percentile method).
What is compared is drawn together: a difference is as sure as it is document by document, however
much harder one document is than another.

An interval tells how far the number may move with other documents of the same kind. Of other seeds
it tells nothing: these are runs of their own. Few documents make it too narrow; with fewer than
`FEWEST` there is none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVEL, RESAMPLES, SEED, FEWEST = 0.95, 2000, 0, 5
BLOCK = 1 << 22  # draws that are held at once

Interval = list[float]  # low, high


def describe_bootstrap(num_documents: int) -> dict[str, Any]:
    """What a reader must know to believe the intervals, or to repeat them."""
    return {
        "method": "percentile bootstrap over documents",
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": SEED,
        "documents": num_documents,
        "fewest_documents": FEWEST,
    }


def resample(sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Sums over each resample: name -> (resamples,) for (documents,), or with columns as given."""
    tables = {name: np.asarray(each, dtype=np.float64) for name, each in sums.items()}
    number = len(next(iter(tables.values())))
    flat = {name: table.reshape(number, -1) for name, table in tables.items()}
    together = np.concatenate([*flat.values()], axis=1)
    # Of a generator only the raw bits are promised to stay the same from version to version.
    bits, size = np.random.PCG64(SEED), max(1, BLOCK // number)
    parts = []
    for first in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - first)
        parts.append(how_often(bits.random_raw(rows * number) % number, rows, number) @ together)
    ends = np.cumsum([table.shape[1] for table in flat.values()])
    pieces = np.split(np.concatenate(parts), ends[:-1], axis=1)
    return {
        name: piece.reshape(-1, *table.shape[1:])
        for (name, table), piece in zip(tables.items(), pieces, strict=True)
    }


def how_often(drawn: np.ndarray, rows: int, number: int) -> np.ndarray:
    """How often each document was drawn, (rows, number) for (rows * number,)."""
    cells = drawn.astype(np.int64) + np.repeat(np.arange(rows) * number, number)
    return np.bincount(cells, minlength=rows * number).reshape(rows, number)


def interval(values: np.ndarray) -> Interval | None:
    """Where the middle of a number's resamples (resamples,) lies; None if it never was a number."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    tail = (1 - LEVEL) / 2
    return np.quantile(values, [tail, 1 - tail]).tolist()


def change(first: float, second: float, count: float) -> float:
    """The part by which a second perplexity is above the first: NLLs over `count` tokens."""
    return math.expm1((second - first) / count)


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], unit: str = "tokens"
) -> dict[str, Any]:
    """The part by which a second perplexity is above the first, and its interval.

    first, second: what `by_document` holds, of two settings or of two evaluations.
    unit: of the perplexity, "tokens", "words" or "bytes".

    Raises ValueError if these are not the same documents with as many units.
    """
    refuse_other_documents(first, second, unit)
    sums = {
        "first": [row["nll"] for row in first],
        "second": [row["nll"] for row in second],
        "count": [row[unit] for row in first],
    }
    found: dict[str, Any] = {
        "change": change(*(sum(each) for each in sums.values())),
        "interval": None,
    }
    if len(first) >= FEWEST:
        drawn = resample(sums)
        found["interval"] = interval(np.expm1((drawn["second"] - drawn["first"]) / drawn["count"]))
    return found


def refuse_other_documents(first: Sequence, second: Sequence, unit: str) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"one evaluation has {len(first)} documents and the other {len(second)}: evaluate both "
            "on the same ones"
        )
    for one, other in zip(first, second, strict=True):
        if (one["id"], one[unit]) != (other["id"], other[unit]):
            raise ValueError(
                f"one evaluation has document {one['id']!r} of {one[unit]:,} {unit} where the "
                f"other has {other['id']!r} of {other[unit]:,}: evaluate both on the same "
                "documents, and compare models of different tokenizers by words"
            )
