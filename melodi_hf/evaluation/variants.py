"""Compare runs of several variants and seeds on the same documents.

A difference between variants has two uncertainties, which are reported separately: over documents
(the interval of `intervals.compare`, for the mean over seeds) and over seeds (the range of the
differences).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from melodi_hf.evaluation.command_line import read_object
from melodi_hf.evaluation.intervals import check_same_documents, compare, relative_increase


class Run(NamedTuple):
    """The data of one run."""

    variant: str
    seed: int | None
    evaluation: dict[str, Any]
    history: list[dict[str, Any]]  # training log; may be empty


class Difference(NamedTuple):
    """By which part the perplexity of a variant exceeds that of another."""

    change: float
    interval: list[float] | None  # over documents, of the mean over seeds
    by_seed: dict[int | None, float]  # for seeds that both have


def read_run(path: str | Path) -> Run:
    """Read a run from JSON.

    Variant and seed are taken from the JSON, or from the name of the file or of its folder:
    `both-0.json`, `both-0/results.json`.
    """
    path = Path(path)
    results = read_object(path, "evaluation")
    if "settings" not in results["evaluation"]:
        raise ValueError(
            f"{path} is not a run, its evaluation has no settings: pass a file of results of "
            "training/train.py or training/evaluate.py"
        )
    name = path.resolve().parent.name if path.name == "results.json" else path.stem
    parts = re.fullmatch(r"(?P<variant>.+)-(?P<seed>\d+)", name)
    variant, seed = (parts["variant"], int(parts["seed"])) if parts else (name, None)
    return Run(
        str(results.get("variant", variant)),
        results.get("seed", seed),
        results["evaluation"],
        results.get("training", {}).get("history", []),
    )


def by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by variant, in the given order.

    Raises ValueError for duplicate seeds of a variant, and for runs on other documents.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        before = found.setdefault(run.variant, [])
        if any(other.seed == run.seed for other in before):
            raise ValueError(
                f"variant {run.variant!r} has seed {run.seed} twice: pass each run once"
            )
        if before:
            check_same_documents(documents(before[0]), documents(run), "tokens")
        before.append(run)
    return found


def documents(run: Run, setting: str = "carried") -> list[dict[str, Any]]:
    return run.evaluation["settings"][setting]["by_document"]


def perplexities(
    runs: Iterable[Run], setting: str = "carried", metric: str = "perplexity_per_token"
) -> list[float]:
    """Return the perplexity of each run."""
    return [run.evaluation["settings"][setting][metric] for run in runs]


def mean_by_document(runs: Sequence[Run], setting: str = "carried") -> list[dict[str, Any]]:
    """Return `by_document` with the mean NLL over seeds."""
    rows = zip(*(documents(run, setting) for run in runs), strict=True)
    return [{**row[0], "nll": float(np.mean([each["nll"] for each in row]))} for row in rows]


def difference(
    base: Sequence[Run], runs: Sequence[Run], setting: str = "carried", unit: str = "tokens"
) -> Difference:
    """Compute the difference between the runs of two variants, on the same documents."""
    over_documents = compare(mean_by_document(base, setting), mean_by_document(runs, setting), unit)
    seeds = {run.seed: run.evaluation["settings"][setting] for run in base}
    own = {run.seed: run.evaluation["settings"][setting] for run in runs}
    by_seed = {
        seed: relative_increase(seeds[seed]["nll"], own[seed]["nll"], own[seed][unit])
        for seed in own
        if seed in seeds
    }
    return Difference(**over_documents, by_seed=by_seed)


def log_perplexity_by_position(runs: Sequence[Run], setting: str = "carried") -> np.ndarray:
    """Return the NLL per token (seeds x positions)."""
    rows = [run.evaluation["settings"][setting]["by_position"] for run in runs]
    return np.array([[each["nll"] / each["tokens"] for each in row] for row in rows])


def position_edges(runs: Mapping[str, Sequence[Run]], setting: str = "carried") -> np.ndarray:
    """Return the edges of the bins of positions, which must be equal in all runs."""
    found = {
        tuple(
            (each["from"], each["to"], each["tokens"])
            for each in run.evaluation["settings"][setting]["by_position"]
        )
        for of_variant in runs.values()
        for run in of_variant
    }
    if len(found) > 1:
        raise ValueError(
            "the runs have different bins of positions: compare models with the same window "
            "length on the same documents"
        )
    bins = next(iter(found))
    return np.array([bins[0][0], *(each[1] for each in bins)])
