"""Make the tables of Markdown files from the JSON of results.

    model_cards/results/<recipe>.json                         results of a run
    model_cards/results/<comparison>/<variant>-<seed>.json    runs of a comparison
    benchmarks/results/<name>.json                            results of a benchmark

`python -m melodi_hf.evaluation.tables README.md` updates every block of a file between
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
    "reduction by memory",
]


def read_results(paths: Iterable[str | Path]) -> list[Results]:
    """Read runs in the order of the paths; a run without a name gets that of its file."""
    return [{"name": path.stem} | read_object(path, "evaluation") for path in map(Path, paths)]


def results_table(paths: Iterable[str | Path]) -> str:
    """Make a table with one row per recipe and setting; only the first number has an interval."""
    rows = [
        [results["name"], results["parameters"], results["memory_floats"], *row]
        for results in read_results(paths)
        for row in evaluation_rows(results["evaluation"], ["perplexity_per_token"])
    ]
    headers = ["recipe", "parameters", "memory, floats", *EVALUATION_HEADERS]
    return markdown_table(headers, rows)


def evaluation_table(evaluation: Evaluation) -> str:
    """Make a table with one row per setting."""
    return markdown_table(EVALUATION_HEADERS, evaluation_rows(evaluation))


def evaluation_rows(
    evaluation: Evaluation, with_intervals: Sequence[str] = (*METRICS, "worth")
) -> list[list[Any]]:
    """Make one row per setting; the reduction by memory is in the row of that setting."""
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
                percent(get_worth(evaluation, name), shown.get("worth")),
            ]
        )
    return rows


def get_worth(evaluation: Evaluation, name: str) -> float | None:
    """Return the reduction by the memory of a setting; older results have only one for all."""
    whole = evaluation["worth"] if name == "carried" else None
    return evaluation["settings"][name].get("worth", whole)


def memory_table(evaluation: Evaluation) -> str:
    """Make a table of how much perplexity rises without each part of the memory."""
    rows = [
        [
            name,
            Estimate(setting["perplexity_per_token"]),
            percent(setting.get("above_carried"), get_interval(setting, "above_carried"), "+.1f"),
            percent(get_worth(evaluation, name), get_interval(setting, "worth")),
        ]
        for name, setting in evaluation["settings"].items()
    ]
    headers = ["memory", "perplexity per token", "above carried", "reduction by memory"]
    return markdown_table(headers, rows)


def get_interval(part: Mapping[str, Any], key: str) -> Sequence[float] | None:
    return part.get("intervals", {}).get(key)


def variants_table(runs: Iterable[Run], base: str | None = None) -> str:
    """Make a table with one row per variant: perplexity and its increase over `base`.

    The increase has an interval over documents and a range over seeds. The default of `base` is the
    first variant.
    """
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
    """Make a table of perplexity by position in the document, one column per setting.

    Settings with a shorter queue are left out: they differ too little to be read here.
    """
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
                percent(worth(perplexities), get_interval(at.get("carried", {}), "worth")),
            ]
        )
    return markdown_table(
        ["position in the document", "tokens scored", *settings, "reduction by memory"], rows
    )


def worth(perplexities: Mapping[str, float]) -> float | None:
    """Return by which part the memory reduces the perplexity, 1 - carried / emptied."""
    if not {"carried", "emptied"} <= perplexities.keys():
        return None
    return 1 - perplexities["carried"] / perplexities["emptied"]


def queue_table(measured: Mapping[str, Any]) -> str:
    """Make a table with one row per layer and head of what `queue_attention` measured.

    Columns: attention to entries of each age relative to uniform attention, its breadth, and the
    mean share of the queue behind the gate.
    """
    rows = []
    ages = max((layer["ages"] for layer in measured["layers"]), key=len)
    for layer in measured["layers"]:
        heads = zip(layer["ratio"], layer["breadth"], layer["share"], strict=True)
        for head, (ratios, breadth, share) in enumerate(heads):
            rows.append([layer["layer"], head, *ratios, breadth, statistics.mean(share)])
    headers = [f"age {low}" if low == high else f"ages {low} to {high}" for low, high in ages]
    return markdown_table(["layer", "head", *headers, "breadth", "share of the gate"], rows)


def benchmark_tables(path: str | Path) -> dict[str, str]:
    """Make the tables of a benchmark's JSON: its "rows", and the lists under "tables"."""
    results, name = read_object(path, "rows"), f"benchmarks/{Path(path).stem}"
    further = results.get("tables", {}).items()
    found = {f"{name}/{key}": measurements_table(rows) for key, rows in further}
    return found | {name: measurements_table(results["rows"])}


def measurements_table(measurements: Sequence[Mapping[str, Any]]) -> str:
    headers = list(dict.fromkeys(name for row in measurements for name in row))
    rows = [[row.get(name) for name in headers] for row in measurements]
    return markdown_table([name.replace("_", " ") for name in headers], rows)


def all_tables(root: str | Path) -> dict[str, str]:
    """Make every table of a repository's results, by the name that a block asks for."""
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
    """Make the tables of a comparison's variants, against the first and against each of them."""
    runs = [read_run(path) for path in sorted(folder.glob("*.json"))]
    found = {
        f"variants/{folder.name}/{name}": variants_table(runs, name) for name in by_variant(runs)
    }
    return found | {f"variants/{folder.name}": variants_table(runs)} if runs else {}


def update_blocks(text: str, known: Mapping[str, str]) -> str:
    """Replace the content of each block by the table of its name."""

    def renewed(block: re.Match) -> str:
        opening, name, closing = block.groups()
        if name not in known:
            raise ValueError(f"there is no table {name!r}; available are {sorted(known)}")
        return f"{opening}{known[name]}\n{closing}"

    openings = text.count(OPENING)
    text, blocks = BLOCK.subn(renewed, text)
    if blocks != openings:
        raise ValueError(f"{openings} blocks begin and {blocks} end: close each by <!-- end -->")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Update the tables of a Markdown file.")
    parser.add_argument("file", type=Path, nargs="+")
    parser.add_argument(
        "--root", type=Path, default=Path(), help="the folder of model_cards/ and benchmarks/"
    )
    options = parser.parse_args(arguments)
    try:
        known = all_tables(options.root)
        renewed = {file: update_blocks(read_text(file), known) for file in options.file}
        for file, text in renewed.items():
            file.write_text(text, encoding="utf-8")
    except FAILURES as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
