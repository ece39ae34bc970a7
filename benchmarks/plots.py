"""Cost against length, from the JSON of `benchmarks/peers.py`.

    python benchmarks/plots.py [--results benchmarks/results/peers.json]
        [--output benchmarks/figures]

Three plots as SVG with selectable text on a transparent ground, in colours that can be read on
white and on black; both axes are logarithmic.
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

from melodi_hf.evaluation.plots import Label, mark_edges, new_figure, short, write_labels

INK = "#7d8590"  # three times as bright as black, a third of white
COLORS = {
    "MELODI": "#2f81f7",
    "Llama": "#e5534b",
    "sliding window": "#2da44e",
    "RecurrentGemma": "#a475f9",
    "Mamba2": "#c28b1a",
}
PLOTS = {  # what -> the figure of a row, by how much it is divided, its unit, words
    "prefill": ("prefill, s", 1, "s", "seconds to read it"),
    "state": ("state, bytes", 1e6, "MB", "MB held for the next token"),
    "decoding": ("decoding, ms", 1, "ms", "milliseconds per token after it"),
}


def curves(rows, name, divisor):
    """Model -> its points where the figure `name` was measured."""
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
        where = "" if tokens[-1] == lengths[-1] else f" at {short(tokens[-1])}"  # not the edge
        text = f"{model} {plain(values[-1])} {unit}{where}"
        labels.append(Label(values[-1], text, COLORS[model]))
    mark_edges(axes, lengths)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    restyle(axes)
    write_labels(figure, axes, labels)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "melodi_hf"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def plain(value):
    """Two digits or three, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def restyle(axes):
    """For light and dark pages."""
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)


def plot_peers(result, folder):
    """The files written."""
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
            raise ValueError(f"{args.results} is not of peers.py: name the JSON that it wrote")
        for path in plot_peers(result, args.output):
            print(path)
    except FAILURES as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
