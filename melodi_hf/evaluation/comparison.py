"""Make the tables of `training/compare.py`: systems, differences, the papers' numbers.

The id of a test document is `<corpus>/<id>`, so the perplexity of each corpus, and the interval of
a difference on it, are computed from the documents of one run.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from melodi_hf.evaluation.markdown import format_cell, markdown_table, percent, seed_range
from melodi_hf.evaluation.systems import Published, read_systems
from melodi_hf.evaluation.variants import Run, by_variant, difference, perplexities, read_run

UNITS = ("tokens", "words", "bytes", "nll")
TOLERANCE = 0.03  # relative difference between the smallest and the largest model


class Row(NamedTuple):
    """One row of the comparison: the runs of one model with all seeds."""

    name: str
    system: str  # its model type
    parameters: int
    floats: int  # of memory
    runs: list[Run]


def read_results(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read the runs of a comparison; an empty result if these are other runs.

    Raises ValueError if they are not comparable.
    """
    found = {path: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    if not all("excerpts" in each for each in found.values()):
        return {}
    check_comparable(found)
    return found


def check_comparable(results: Mapping[Path, Mapping[str, Any]]) -> None:
    """Check that runs of one seed read the same tokens in the same order, at equal size."""
    for path, each in results.items():
        first = next(at for at, other in results.items() if other["seed"] == each["seed"])
        for what, found in training_conditions(each).items():
            wanted = training_conditions(results[first])[what]
            if found != wanted:
                raise ValueError(
                    f"{path.name} has {what} {found}, {first.name} has {wanted}: compared runs "
                    "must be trained on the same tokens; run one of them again"
                )
    sizes = {path: each["parameters"] for path, each in results.items()}
    low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[high] > sizes[low] * (1 + TOLERANCE):
        raise ValueError(
            f"{high.name} has {sizes[high]:,} parameters, {low.name} {sizes[low]:,}, which is more "
            f"than {TOLERANCE:.0%} apart: change model.intermediate_size and run it again"
        )


def training_conditions(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions that must be equal in compared runs."""
    training, data = results["training"], results["data"]
    return {
        "documents": data["train"]["fingerprint"],
        "order": data["order"],
        "updates": training["updates"],
        "tokens": training["tokens"],
    }


def make_rows(results: Mapping[Path, Mapping[str, Any]]) -> list[Row]:
    """Group runs into rows, in the order of the systems."""
    found: dict[str, Row] = {}
    for path, each in results.items():
        run, system = read_run(path), each["recipe"]["model"]["type"]
        row = Row(run.variant, system, each["parameters"], each["memory_floats"], [])
        found.setdefault(run.variant, row).runs.append(run)
    by_variant(run for row in found.values() for run in row.runs)  # raises for duplicates
    order = list(read_systems())
    return sorted(found.values(), key=lambda row: (order.index(row.system), row.name))


def corpora(rows: Iterable[Row]) -> list[str]:
    """List the corpora of the scored documents, in order."""
    scored = next(iter(rows)).runs[0].evaluation["settings"]["carried"]["by_document"]
    return list(dict.fromkeys(map(document_corpus, scored)))


def document_corpus(document: Mapping[str, Any]) -> str:
    return document["id"].split("/")[0]


def select_corpus(run: Run, corpus: str) -> Run:
    """Restrict a run's evaluation to the documents of a corpus; "" keeps all."""
    settings = {}
    for name, setting in run.evaluation["settings"].items():
        documents = [d for d in setting["by_document"] if corpus in ("", document_corpus(d))]
        sums = {unit: sum(each[unit] for each in documents) for unit in UNITS}
        perplexity = math.exp(sums["nll"] / sums["tokens"])
        settings[name] = {**sums, "perplexity_per_token": perplexity, "by_document": documents}
    return run._replace(evaluation={"settings": settings})


def mean_and_deviation(values: Sequence[float]) -> str:
    """Format the mean and the standard deviation over seeds."""
    mean = format_cell(statistics.mean(values))
    return f"{mean} ± {format_cell(statistics.stdev(values))}" if len(values) > 1 else mean


def systems_table(rows: Sequence[Row], speeds: Mapping[str, Mapping[str, Any]]) -> str:
    """Make the main table: size, perplexity of each corpus, speed, the paper's number."""
    kinds, systems = corpora(rows), read_systems()
    lines = []
    for row in rows:
        speed = speeds.get(row.name, {})
        lines.append(
            [
                f"`{row.name}`",
                row.floats,
                row.parameters,
                len(row.runs),
                *(
                    mean_and_deviation(perplexities(select_corpus(run, kind) for run in row.runs))
                    for kind in kinds
                ),
                speed.get("training_tokens_per_second"),
                speed.get("decoding_tokens_per_second"),
                published_cell(systems[row.system].published),
            ]
        )
    headers = ["row", "memory, floats", "parameters", "seeds", *kinds]
    speeds_of = ["training, tokens/s", "decoding, tokens/s"]
    return markdown_table([*headers, *speeds_of, "paper, another scale"], lines)


def published_cell(numbers: Sequence[Published]) -> str | None:
    """Format the first published number; `published_table` has all."""
    if not numbers:
        return None
    first = numbers[0]
    return f"{first.perplexity} per {first.per}, {first.of}"


def differences_table(rows: Sequence[Row]) -> str:
    """Make the table of increases over the first row, with intervals and ranges over seeds."""
    first, *others = rows
    lines = []
    for row in others:
        cells = []
        for kind in corpora(rows):
            base, own = ([select_corpus(run, kind) for run in each.runs] for each in (first, row))
            apart = difference(base, own)
            cells += [
                percent(apart.change, apart.interval, "+.1f"),
                seed_range(list(apart.by_seed.values())),
            ]
        lines.append([f"`{row.name}`", *cells])
    headers = [
        header
        for kind in corpora(rows)
        for header in (f"{kind}, 95% over documents", f"{kind}, over seeds")
    ]
    return markdown_table([f"above `{first.name}`", *headers], lines)


def published_table(rows: Sequence[Row]) -> str:
    """Make the table of all published perplexities of these systems, with their sources."""
    systems = read_systems()
    named = dict.fromkeys(row.system for row in rows)
    lines = [
        [systems[name].name, each.model, each.perplexity, f"{each.per}, {each.of}", each.source]
        for name in named
        for each in systems[name].published
    ]
    return markdown_table(["system", "model", "perplexity", "per", "source"], lines)


def order_table(rows: Sequence[Row]) -> str:
    """Make the table that ranks the systems here and in the papers, by the same measure.

    A system with several rows is represented by its best.
    """
    systems = read_systems()
    scales = [
        (each.of, each.per, name, each.perplexity)
        for name in dict.fromkeys(row.system for row in rows)
        for each in systems[name].published[:1]
    ]
    lines = []
    for scale in dict.fromkeys(each[:2] for each in scales):
        theirs = {name: number for *of, name, number in scales if tuple(of) == scale}
        if len(theirs) < 2:
            continue
        lines.append([f"papers: {scale[0]}, per {scale[1]}", format_order(systems, theirs)])
        for kind in corpora(rows):
            ours: dict[str, float] = {}
            for row in rows:
                mean = statistics.mean(perplexities(select_corpus(run, kind) for run in row.runs))
                if row.system in theirs:
                    ours[row.system] = min(mean, ours.get(row.system, mean))
            lines.append([f"here: {kind}", format_order(systems, ours)])
    return markdown_table(["", "from the best to the worst"], lines)


def format_order(systems: Mapping[str, Any], numbers: Mapping[str, float]) -> str:
    ordered = sorted(numbers, key=numbers.__getitem__)
    return " < ".join(f"{systems[name].name} {format_cell(numbers[name])}" for name in ordered)


def setup_table(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Make the table of settings that all runs share."""
    first = results[0]
    asked, training = first["excerpts"]["asked"], first["recipe"]["training"]
    documents = [f"{count} {name}" for name, count in first["excerpts"]["documents"].items()]
    scored = select_corpus(rows[0].runs[0], "").evaluation["settings"]["carried"]["tokens"]
    lines = [
        ("documents", ", ".join(documents)),
        ("characters of each, at most", asked["characters"]),
        ("vocabulary", asked["vocab_size"]),
        ("tokens read in training, padding included", first["training"]["tokens"]),
        ("updates", first["training"]["updates"]),
        ("rows x tokens of an update", f"{training['num_rows']} x {row_tokens(first)}"),
        ("tokens scored", scored),
        ("optimiser", f"{training['optimizer']}, {training['learning_rate']}"),
        ("seeds", ", ".join(str(seed) for seed in sorted({each["seed"] for each in results}))),
        ("hardware", first["hardware"]),
        ("commits", ", ".join(sorted({short_commit(each["commit"]) for each in results}))),
    ]
    return markdown_table(["", ""], lines)


def short_commit(commit: str | None) -> str:
    """Shorten a commit to twelve digits, keeping the mark of uncommitted changes."""
    number, dash, dirty = str(commit).partition("-")
    return f"{number[:12]}{dash}{dirty}"


def row_tokens(results: Mapping[str, Any]) -> int:
    return results["recipe"]["data"]["segment_length"]


def read_speeds(path: Path) -> dict[str, dict[str, Any]]:
    """Read speeds by row; empty if they were not measured."""
    if not path.is_file():
        return {}
    return {row["row"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}


def comparison_tables(folder: Path, benchmarks: Path) -> dict[str, str]:
    """Make the tables of a comparison, by the name that a block asks for."""
    results, name = read_results(folder), f"comparison/{folder.name}"
    if not results:
        return {}
    rows = make_rows(results)
    return {
        name: systems_table(rows, read_speeds(benchmarks / f"{folder.name}.json")),
        f"{name}/setup": setup_table(list(results.values()), rows),
        f"{name}/differences": differences_table(rows),
        f"{name}/published": published_table(rows),
        f"{name}/order": order_table(rows),
    }
