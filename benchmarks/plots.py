"""Plot cost by document length from the JSON of `benchmarks/peers.py`.

    python benchmarks/plots.py [--results benchmarks/results/peers.json]
        [--output benchmarks/figures]

Three SVG plots with selectable text and a transparent background, in colours for light and dark
pages; both axes are logarithmic.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from melodi_hf.evaluation.command_line import (
    FAILURES,
    one_line,
    output_folder,
    read_object,
    require_packages,
)

if __name__ == "__main__":
    try:
        require_packages("train", "matplotlib")
    except ImportError as error:
        sys.exit(f"plots.py: {error}")

from matplotlib import rc_context
from matplotlib.ticker import LogLocator

from melodi_hf.evaluation.plots import Label, format_tokens, new_figure, set_bin_ticks, write_labels

TEXT_COLOR = "#7d8590"  # readable on white and on black
COLORS = {
    "MELODI": "#2f81f7",
    "Llama": "#e5534b",
    "sliding window": "#2da44e",
    "RecurrentGemma": "#a475f9",
    "Mamba2": "#c28b1a",
}
PLOTS = {  # name -> key of a row, divisor, unit, label
    "prefill": ("prefill, s", 1, "s", "seconds to read it"),
    "state": ("state, bytes", 1e6, "MB", "MB held for the next token"),
    "decoding": ("decoding, ms", 1, "ms", "milliseconds per token after it"),
}


def curves(rows, name, divisor):
    """Return the points of each model where `name` was measured."""
    found = {}
    for row in rows:
        if row.get(name):
            found.setdefault(row["model"], []).append((row["tokens"], row[name] / divisor))
    return found


def plot(rows, what, path):
    name, divisor, unit, words = PLOTS[what]
    figure, axes = new_figure("tokens of the document", words)
    axes.set_yscale("log")
    labels, lengths = [], sorted({row["tokens"] for row in rows})
    for model, points in curves(rows, name, divisor).items():
        ours = model == "MELODI"
        tokens, values = zip(*points, strict=True)
        axes.plot(
            tokens,
            values,
            color=COLORS[model],
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.6 if ours else 1.4,
            zorder=3 if ours else 2,
        )
        where = (
            "" if tokens[-1] == lengths[-1] else f" at {format_tokens(tokens[-1])}"
        )  # not the last length
        text = f"{model} {format_number(values[-1])} {unit}{where}"
        labels.append(Label(values[-1], text, COLORS[model]))
    set_bin_ticks(axes, lengths)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    style_axes(axes)
    write_labels(figure, axes, labels)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "melodi_hf"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def format_number(value):
    """Format with two or three digits, and all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def style_axes(axes):
    """Style axes for light and dark pages."""
    axes.spines[["left", "bottom"]].set_color(TEXT_COLOR)
    axes.tick_params(colors=TEXT_COLOR)
    axes.xaxis.label.set_color(TEXT_COLOR)
    axes.yaxis.label.set_color(TEXT_COLOR)
    axes.grid(axis="y", color=TEXT_COLOR, alpha=0.25, linewidth=0.8)


def plot_peers(result, folder):
    """Write the plots; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [plot(result["rows"], what, folder / f"peers_{what}.svg") for what in PLOTS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--output", type=output_folder, default="benchmarks/figures")
    args = parser.parse_args()
    try:
        result = read_object(args.results, "rows")
        if not all({"model", "tokens"} <= row.keys() for row in result["rows"]):
            raise ValueError(f"{args.results} is not a result of peers.py: pass its JSON")
        for path in plot_peers(result, args.output):
            print(path)
    except FAILURES as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
