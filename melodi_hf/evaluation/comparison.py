"""The runs of `training/compare.py` as tables: all systems, their differences, the papers' numbers.

A test document is called `<corpus>/<id>`, so that the perplexity of each corpus, and the interval
of a difference on it, come from what one run tells of every document.
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
TOLERANCE = 0.03  # between the fewest parameters and the most


class Row(NamedTuple):
    """One row of the comparison: all seeds of one model."""

    name: str
    system: str  # its model type
    parameters: int
    floats: int  # of memory
    runs: list[Run]


def read_results(folder: Path) -> dict[Path, dict[str, Any]]:
    """The runs of a comparison; none if these are runs of another kind.

    Raises ValueError if they are not comparable.
    """
    found = {path: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    if not all("excerpts" in each for each in found.values()):
        return {}
    refuse_unfair(found)
    return found


def refuse_unfair(results: Mapping[Path, Mapping[str, Any]]) -> None:
    """Runs of one seed were fed the same tokens in the same order, as often; none is larger."""
    for path, each in results.items():
        first = next(at for at, other in results.items() if other["seed"] == each["seed"])
        for what, found in fed(each).items():
            wanted = fed(results[first])[what]
            if found != wanted:
                raise ValueError(
                    f"{path.name} has {what} {found}, {first.name} {wanted}: runs that are "
                    "compared are fed the same; run one of them anew"
                )
    sizes = {path: each["parameters"] for path, each in results.items()}
    low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[high] > sizes[low] * (1 + TOLERANCE):
        raise ValueError(
            f"{high.name} has {sizes[high]:,} parameters, {low.name} {sizes[low]:,}, which is more "
            f"than {TOLERANCE:.0%} apart: change model.intermediate_size and run it anew"
        )


def fed(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a run learnt from."""
    training, data = results["training"], results["data"]
    return {
        "documents": data["train"]["fingerprint"],
        "order": data["order"],
        "updates": training["updates"],
        "tokens": training["tokens"],
    }


def rows_of(results: Mapping[Path, Mapping[str, Any]]) -> list[Row]:
    """The rows in the order of the systems."""
    found: dict[str, Row] = {}
    for path, each in results.items():
        run, system = read_run(path), each["recipe"]["model"]["type"]
        row = Row(run.variant, system, each["parameters"], each["memory_floats"], [])
        found.setdefault(run.variant, row).runs.append(run)
    by_variant(run for row in found.values() for run in row.runs)  # refuses what is there twice
    order = list(read_systems())
    return sorted(found.values(), key=lambda row: (order.index(row.system), row.name))


def corpora(rows: Iterable[Row]) -> list[str]:
    """The kinds of documents that were scored, in their order."""
    scored = next(iter(rows)).runs[0].evaluation["settings"]["carried"]["by_document"]
    return list(dict.fromkeys(map(kind_of, scored)))


def kind_of(document: Mapping[str, Any]) -> str:
    return document["id"].split("/")[0]


def of_corpus(run: Run, corpus: str) -> Run:
    """The run, as if documents of this corpus alone had been scored; "" is all of them."""
    settings = {}
    for name, setting in run.evaluation["settings"].items():
        documents = [d for d in setting["by_document"] if corpus in ("", kind_of(d))]
        sums = {unit: sum(each[unit] for each in documents) for unit in UNITS}
        perplexity = math.exp(sums["nll"] / sums["tokens"])
        settings[name] = {**sums, "perplexity_per_token": perplexity, "by_document": documents}
    return run._replace(evaluation={"settings": settings})


def spread(values: Sequence[float]) -> str:
    """The mean, and how far seeds lie apart."""
    mean = format_cell(statistics.mean(values))
    return f"{mean} ± {format_cell(statistics.stdev(values))}" if len(values) > 1 else mean


def systems_table(rows: Sequence[Row], speeds: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per model: size, perplexity per token of each corpus, speed, and the paper's number."""
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
                *(spread(perplexities(of_corpus(run, kind) for run in row.runs)) for kind in kinds),
                speed.get("training_tokens_per_second"),
                speed.get("decoding_tokens_per_second"),
                published_cell(systems[row.system].published),
            ]
        )
    headers = ["row", "numbers remembered", "parameters", "seeds", *kinds]
    speeds_of = ["training, tokens/s", "decoding, tokens/s"]
    return markdown_table([*headers, *speeds_of, "paper, another scale"], lines)


def published_cell(numbers: Sequence[Published]) -> str | None:
    """The first that a paper tells; all of them stand in `published_table`."""
    if not numbers:
        return None
    first = numbers[0]
    return f"{first.perplexity} per {first.per}, {first.of}"


def differences_table(rows: Sequence[Row]) -> str:
    """How far each model is above the first, on each corpus: over documents, and over seeds."""
    first, *others = rows
    lines = []
    for row in others:
        cells = []
        for kind in corpora(rows):
            base, own = ([of_corpus(run, kind) for run in each.runs] for each in (first, row))
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
    """Every number that papers tell of these systems, with its source."""
    systems = read_systems()
    named = dict.fromkeys(row.system for row in rows)
    lines = [
        [systems[name].name, each.model, each.perplexity, f"{each.per}, {each.of}", each.source]
        for name in named
        for each in systems[name].published
    ]
    return markdown_table(["system", "model", "perplexity", "per", "source"], lines)


def order_table(rows: Sequence[Row]) -> str:
    """The order of the systems here and in the papers, where these told the same kind of number.

    Of several rows of a system the best stands for it.
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
        lines.append([f"papers: {scale[0]}, per {scale[1]}", in_order(systems, theirs)])
        for kind in corpora(rows):
            ours: dict[str, float] = {}
            for row in rows:
                mean = statistics.mean(perplexities(of_corpus(run, kind) for run in row.runs))
                if row.system in theirs:
                    ours[row.system] = min(mean, ours.get(row.system, mean))
            lines.append([f"here: {kind}", in_order(systems, ours)])
    return markdown_table(["", "from the best to the worst"], lines)


def in_order(systems: Mapping[str, Any], numbers: Mapping[str, float]) -> str:
    ordered = sorted(numbers, key=numbers.__getitem__)
    return " < ".join(f"{systems[name].name} {format_cell(numbers[name])}" for name in ordered)


def setup_table(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """What all runs share."""
    first = results[0]
    asked, training = first["excerpts"]["asked"], first["recipe"]["training"]
    documents = [f"{count} {name}" for name, count in first["excerpts"]["documents"].items()]
    scored = of_corpus(rows[0].runs[0], "").evaluation["settings"]["carried"]["tokens"]
    lines = [
        ("documents", ", ".join(documents)),
        ("characters of each, at most", asked["characters"]),
        ("vocabulary", asked["vocab_size"]),
        ("tokens read in training, padding included", first["training"]["tokens"]),
        ("updates", first["training"]["updates"]),
        ("rows x tokens of an update", f"{training['num_rows']} x {tokens_of_row(first)}"),
        ("tokens scored", scored),
        ("optimiser", f"{training['optimizer']}, {training['learning_rate']}"),
        ("seeds", ", ".join(str(seed) for seed in sorted({each["seed"] for each in results}))),
        ("hardware", first["hardware"]),
        ("commits", ", ".join(sorted({short(each["commit"]) for each in results}))),
    ]
    return markdown_table(["", ""], lines)


def short(commit: str | None) -> str:
    """Twelve digits, and the mark of files that were changed since."""
    number, dash, dirty = str(commit).partition("-")
    return f"{number[:12]}{dash}{dirty}"


def tokens_of_row(results: Mapping[str, Any]) -> int:
    return results["recipe"]["data"]["segment_length"]


def read_speeds(path: Path) -> dict[str, dict[str, Any]]:
    """By row; none if they were not measured."""
    if not path.is_file():
        return {}
    return {row["row"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}


def comparison_tables(folder: Path, benchmarks: Path) -> dict[str, str]:
    """The tables of a comparison, by the name that a block asks for; none of another folder."""
    results, name = read_results(folder), f"comparison/{folder.name}"
    if not results:
        return {}
    rows = rows_of(results)
    return {
        name: systems_table(rows, read_speeds(benchmarks / f"{folder.name}.json")),
        f"{name}/setup": setup_table(list(results.values()), rows),
        f"{name}/differences": differences_table(rows),
        f"{name}/published": published_table(rows),
        f"{name}/order": order_table(rows),
    }
