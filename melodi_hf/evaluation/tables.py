"""Results become tables, plots and model cards; nobody types a number.

    model_cards/results/<recipe>.json                         what a run measured
    model_cards/results/<comparison>/<variant>-<seed>.json    runs that are compared
    benchmarks/results/<name>.json                            what a benchmark measured

`python -m melodi_hf.evaluation.tables README.md` renews every block of a file that stands between
`<!-- table: NAME -->` and `<!-- end -->`; model_cards/README.md lists the names.
"""

import argparse
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from melodi_hf.evaluation.command_line import FAILURES, one_line, read_object, read_text
from melodi_hf.evaluation.comparison import comparison_tables
from melodi_hf.evaluation.markdown import (
    Estimate,
    format_cell,
    markdown_table,
    percent,
    seed_range,
)
from melodi_hf.evaluation.variants import Run, by_variant, difference, perplexities, read_run

Results = dict[str, Any]  # the JSON of one run
Evaluation = dict[str, Any]  # what evaluate_perplexity returns

OPENING = "<!-- table: "
BLOCK = re.compile(rf"({OPENING}(\S+) -->\n)(?:(?!{OPENING}).)*?(<!-- end -->)", re.DOTALL)
METRICS = ("perplexity_per_token", "perplexity_per_word", "bits_per_byte")
EVALUATION_HEADERS = [
    "memory",
    "tokens scored",
    "perplexity per token",
    "perplexity per word",
    "bits per byte",
    "worth of the memory",
]


def read_results(paths: Iterable[str | Path]) -> list[Results]:
    """The runs in the order of the paths; one without a name is called like its file."""
    return [{"name": path.stem} | read_object(path, "evaluation") for path in map(Path, paths)]


def results_table(paths: Iterable[str | Path]) -> str:
    """One row per recipe and setting; of the intervals only the first, as it is wide enough."""
    rows = [
        [results["name"], results["parameters"], results["memory_floats"], *row]
        for results in read_results(paths)
        for row in evaluation_rows(results["evaluation"], ["perplexity_per_token"])
    ]
    headers = ["recipe", "parameters", "numbers remembered", *EVALUATION_HEADERS]
    return markdown_table(headers, rows)


def evaluation_table(evaluation: Evaluation) -> str:
    """One row per setting."""
    return markdown_table(EVALUATION_HEADERS, evaluation_rows(evaluation))


def evaluation_rows(
    evaluation: Evaluation, with_intervals: Sequence[str] = (*METRICS, "worth")
) -> list[list[Any]]:
    """In each row stands what the memory is worth of which it tells."""
    rows = []
    for name, setting in evaluation["settings"].items():
        known = setting.get("intervals", {})
        shown = {key: known.get(key) for key in with_intervals}
        metrics = [Estimate(setting[key], shown.get(key)) for key in METRICS]
        rows.append(
            [
                name,
                setting["tokens"],
                *metrics,
                percent(worth_in(evaluation, name), shown.get("worth")),
            ]
        )
    return rows


def worth_in(evaluation: Evaluation, name: str) -> float | None:
    """What the memory of a setting is worth; older results tell it of the whole memory alone."""
    whole = evaluation["worth"] if name == "carried" else None
    return evaluation["settings"][name].get("worth", whole)


def memory_table(evaluation: Evaluation) -> str:
    """What each part of the memory does: by how much perplexity rises without it."""
    rows = [
        [
            name,
            Estimate(setting["perplexity_per_token"]),
            percent(setting.get("above_carried"), interval_in(setting, "above_carried"), "+.1f"),
            percent(worth_in(evaluation, name), interval_in(setting, "worth")),
        ]
        for name, setting in evaluation["settings"].items()
    ]
    headers = ["memory", "perplexity per token", "above carried", "worth of the memory"]
    return markdown_table(headers, rows)


def interval_in(part: Mapping[str, Any], key: str) -> Sequence[float] | None:
    return part.get("intervals", {}).get(key)


def variants_table(runs: Iterable[Run], base: str | None = None) -> str:
    """One row per variant: its perplexity over seeds, and how far it is above that of a base, the
    first unless it is named: with its interval over documents, and from seed to seed."""
    variants = by_variant(runs)
    base = base or next(iter(variants))
    rows = []
    for name, of_variant in variants.items():
        found = perplexities(of_variant)
        spread = f" ± {format_cell(statistics.stdev(found))}" if len(found) > 1 else ""
        row = [name, len(found), f"{format_cell(statistics.mean(found))}{spread}", None, None]
        if name != base:
            apart = difference(variants[base], of_variant)
            row[3] = percent(apart.change, apart.interval, "+.1f")
            row[4] = seed_range(list(apart.by_seed.values()))
        rows.append(row)
    headers = [
        "variant",
        "seeds",
        "perplexity per token",
        f"above {base}, 95% over documents",
        "from seed to seed",
    ]
    return markdown_table(headers, rows)


def position_table(evaluation: Evaluation) -> str:
    """Perplexity by how far into its document a token stands, one column per setting but those of
    shorter queues, which differ too little to be read here."""
    settings = {
        name: each for name, each in evaluation["settings"].items() if not name.startswith("queue_")
    }
    rows = []
    for bins in zip(*(setting["by_position"] for setting in settings.values()), strict=True):
        at = dict(zip(settings, bins, strict=True))
        perplexities = {name: each["perplexity"] for name, each in at.items()}
        rows.append(
            [
                f"{bins[0]['from']:,} to {bins[0]['to'] - 1:,}",
                bins[0]["tokens"],
                *perplexities.values(),
                percent(worth(perplexities), interval_in(at.get("carried", {}), "worth")),
            ]
        )
    return markdown_table(
        ["position in the document", "tokens scored", *settings, "worth of the memory"], rows
    )


def worth(perplexities: Mapping[str, float]) -> float | None:
    """The part of the perplexity that the memory takes away."""
    if not {"carried", "emptied"} <= perplexities.keys():
        return None
    return 1 - perplexities["carried"] / perplexities["emptied"]


def queue_table(measured: Mapping[str, Any]) -> str:
    """One row per layer and head of what `queue_attention` measured: its attention to entries of
    each age against an even spread, its breadth, and the mean share that the gate lets through."""
    rows = []
    ages = max((layer["ages"] for layer in measured["layers"]), key=len)
    for layer in measured["layers"]:
        heads = zip(layer["ratio"], layer["breadth"], layer["share"], strict=True)
        for head, (ratios, breadth, share) in enumerate(heads):
            rows.append([layer["layer"], head, *ratios, breadth, statistics.mean(share)])
    headers = [f"age {low}" if low == high else f"ages {low} to {high}" for low, high in ages]
    return markdown_table(["layer", "head", *headers, "breadth", "share of the gate"], rows)


def benchmark_tables(path: str | Path) -> dict[str, str]:
    """One row per measurement of a benchmark's JSON, a list of them under "rows"; further lists
    stand by their names under "tables"."""
    results, name = read_object(path, "rows"), f"benchmarks/{Path(path).stem}"
    further = results.get("tables", {}).items()
    found = {f"{name}/{key}": measurements_table(rows) for key, rows in further}
    return found | {name: measurements_table(results["rows"])}


def measurements_table(measurements: Sequence[Mapping[str, Any]]) -> str:
    headers = list(dict.fromkeys(name for row in measurements for name in row))
    rows = [[row.get(name) for name in headers] for row in measurements]
    return markdown_table([name.replace("_", " ") for name in headers], rows)


def tables(root: str | Path) -> dict[str, str]:
    """Every table that the results in a repository give, by the name that a block asks for."""
    runs = sorted(Path(root, "model_cards/results").glob("*.json"))
    found = {"results": results_table(runs)}
    for path, results in zip(runs, read_results(runs), strict=True):
        found[f"results/{path.stem}"] = evaluation_table(results["evaluation"])
        found[f"position/{path.stem}"] = position_table(results["evaluation"])
        found[f"memory/{path.stem}"] = memory_table(results["evaluation"])
    for folder in sorted(Path(root, "model_cards/results").glob("*/")):
        found |= variants_tables(folder)
        found |= comparison_tables(folder, Path(root, "benchmarks/results"))
    for path in sorted(Path(root, "benchmarks/results").glob("*.json")):
        found |= benchmark_tables(path)
    return found


def variants_tables(folder: Path) -> dict[str, str]:
    """The variants of a comparison, against the first, and against each that a block names."""
    runs = [read_run(path) for path in sorted(folder.glob("*.json"))]
    found = {
        f"variants/{folder.name}/{name}": variants_table(runs, name) for name in by_variant(runs)
    }
    return found | {f"variants/{folder.name}": variants_table(runs)} if runs else {}


def renew_blocks(text: str, known: Mapping[str, str]) -> str:
    """The text with the table of its name in each block."""

    def renewed(block: re.Match) -> str:
        opening, name, closing = block.groups()
        if name not in known:
            raise ValueError(f"there is no table {name!r}; the results give {sorted(known)}")
        return f"{opening}{known[name]}\n{closing}"

    openings = text.count(OPENING)
    text, blocks = BLOCK.subn(renewed, text)
    if blocks != openings:
        raise ValueError(f"{openings} blocks begin and {blocks} end: each needs its <!-- end -->")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Renew the tables of a Markdown file.")
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="the folder of model_cards/ and benchmarks/"
    )
    options = parser.parse_args(arguments)
    try:
        known = tables(options.root)
        renewed = {file: renew_blocks(read_text(file), known) for file in options.file}
        for file, text in renewed.items():
            file.write_text(text, encoding="utf-8")
    except FAILURES as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
