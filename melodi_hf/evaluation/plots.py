"""Plot the JSON of runs: perplexity by position and memory size, losses, variants.

    python -m melodi_hf.evaluation.plots runs/quickstart/results.json --output plots
    python -m melodi_hf.evaluation.plots both-0.json both-1.json none-0.json --output plots

The first command plots one run. The second compares several runs; variant and seed are read from
the files or their names (`variants.read_run`). All plots are written as PNG and as SVG with
selectable text, at the width of a README.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from melodi_hf.evaluation.command_line import FAILURES, one_line, output_folder, require_packages
from melodi_hf.evaluation.variants import (
    Run,
    by_variant,
    log_perplexity_by_position,
    position_edges,
    read_run,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "carried": "#1f5fa8",
    "emptied": "#c2571a",
    "short_off": "#7a4fa3",
    "long_off": "#a8870f",
}
SETTING_LABELS = {
    "carried": "memory carried",
    "emptied": "memory emptied",
    "short_off": "without short-term",
    "long_off": "without long-term",
}
COLOR_CYCLE = (
    "#1f5fa8",
    "#c2571a",
    "#2e8b57",
    "#7a4fa3",
    "#a8870f",
    "#b03060",
    "#4a8fb5",
    "#666666",
)
TEXT_COLOR = "#444444"
LABEL_GAP = 11  # points from line to line


class Label(NamedTuple):
    """A label at the end of a line."""

    y: float
    text: str
    color: str


def plot_by_position(evaluation: dict[str, Any], path: str | Path) -> list[Path]:
    """Plot perplexity by position, one line per setting; return the files.

    Shorter queues have a separate plot (`plot_by_memory_size`).
    """
    figure, axes = new_figure("tokens into the document", "perplexity per token")
    window, labels, ends = evaluation["window_length"], [], []
    for name, color in COLORS.items():
        if name not in evaluation["settings"]:
            continue
        by_position = evaluation["settings"][name]["by_position"]
        bins = [each for each in by_position if each["tokens"]]
        middles = bin_centers(
            [each["from"] for each in bins], [each["to"] for each in bins], window
        )
        values = [each["perplexity"] for each in bins]
        axes.plot(middles, values, color=color, marker="o", markersize=4, linewidth=1.8)
        labels.append(Label(values[-1], SETTING_LABELS[name], color))
        ends = [each["to"] for each in bins]
    set_bin_ticks(axes, ends)
    write_labels(figure, axes, labels)
    return save(figure, path)


def queue_windows(setting: str) -> int:
    """Return the number of windows that a setting such as queue_4 keeps."""
    return int(setting.removeprefix("queue_"))


def bin_centers(low: Any, high: Any, window: float) -> np.ndarray:
    """Return the centers of bins on a logarithmic axis; the first bin begins at 0."""
    return np.sqrt(np.maximum(low, window / 2) * np.array(high))


def plot_by_memory_size(evaluation: dict[str, Any], path: str | Path) -> list[Path]:
    """Plot perplexity by the number of windows kept in the long-term memory; return the files.

    Error bars are the intervals of the differences from "carried".
    """
    figure, axes = new_figure("windows kept in the long-term memory", "perplexity per token")
    settings = evaluation["settings"]
    queues = sorted((name for name in settings if name.startswith("queue_")), key=queue_windows)
    names = [*(["long_off"] if "long_off" in settings else []), *queues, "carried"]
    values = [settings[name]["perplexity_per_token"] for name in names]
    places = range(len(names))
    axes.errorbar(
        places,
        values,
        yerr=error_bars(settings, names),
        color=COLORS["carried"],
        marker="o",
        markersize=4,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
    )
    axes.set_xticks(places, [queue_label(name) for name in names])
    axes.margins(x=0.06)
    labels = []
    for name in ("short_off", "emptied"):
        if name in settings:
            value = settings[name]["perplexity_per_token"]
            axes.axhline(value, color=COLORS[name], linewidth=1.2, linestyle=(0, (4, 3)))
            labels.append(Label(value, SETTING_LABELS[name], COLORS[name]))
    labels.append(Label(values[-1], SETTING_LABELS["carried"], COLORS["carried"]))
    write_labels(figure, axes, labels)
    return save(figure, path)


def queue_label(setting: str) -> str:
    if setting.startswith("queue_"):
        return str(queue_windows(setting))
    return {"long_off": "none", "carried": "all"}[setting]


def error_bars(settings: Mapping[str, dict[str, Any]], names: Sequence[str]) -> np.ndarray:
    """Return the lengths of the error bars down and up, in perplexity: (2, names)."""
    whole = settings["carried"]["perplexity_per_token"]
    lengths = []
    for name in names:
        setting = settings[name]
        value, interval = setting["perplexity_per_token"], setting.get("intervals", {})
        low, high = interval.get("above_carried", (value / whole - 1,) * 2)
        lengths.append((value - whole * (1 + low), whole * (1 + high) - value))
    return np.maximum(np.array(lengths).T, 0)


def set_bin_ticks(axes: "Axes", ends: Sequence[int]) -> None:
    """Set ticks at the ends of the bins, of which the first is the window length."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [format_tokens(end) for end in ends])
    axes.minorticks_off()


def format_tokens(number: float) -> str:
    """Format in binary thousands: 512, 4K, 64K, 1.5M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def plot_loss(history: Sequence[dict[str, Any]], path: str | Path) -> list[Path]:
    """Plot the training loss and its running mean by tokens; return the files."""
    figure, axes = new_figure("million tokens read", "loss, nats per token")
    tokens, losses = loss_curve(history)
    axes.plot(tokens, losses, color=COLORS["carried"], linewidth=1, alpha=0.35)
    middles, means = running_mean(tokens, losses)
    axes.plot(middles, means, color=COLORS["carried"], linewidth=1.8)
    write_labels(figure, axes, [Label(means[-1], f"{means[-1]:.2f}", COLORS["carried"])])
    return save(figure, path)


def loss_curve(history: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return million tokens read and losses."""
    tokens = np.array([each["tokens"] for each in history]) / 1e6
    return tokens, np.array([each["loss"] for each in history])


def running_mean(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average over a twentieth of the run; return positions and means."""
    span = max(1, len(losses) // 20)
    means = np.convolve(losses, np.ones(span) / span, mode="valid")
    return tokens[span // 2 :][: len(means)], means


def plot_losses(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Plot the running means of losses: one thin line per run, one colour per variant."""
    figure, axes = new_figure("million tokens read", "loss, nats per token")
    labels, lines = [], []
    for color, (name, of_variant) in zip(
        cycle(COLOR_CYCLE), by_variant(runs).items(), strict=False
    ):
        ends = []
        for run in of_variant:
            middles, means = running_mean(*loss_curve(run.history))
            axes.plot(middles, means, color=color, linewidth=1.2, alpha=0.8)
            ends.append(means[-1])
            lines.append(means)
        labels.append(Label(float(np.mean(ends)), name, color))
    # Leave out the first quarter, whose decrease would hide the differences at the end.
    axes.set_xlim(left=middles[len(middles) // 4])
    highest = max(means[len(means) // 4] for means in lines)
    axes.set_ylim(min(means.min() for means in lines) - 0.05, highest + 0.05)
    write_labels(figure, axes, labels)
    return save(figure, path)


def plot_variants_by_position(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Plot perplexity by position: mean and range over seeds of each variant; return the files."""
    return plot_bands(runs, path, "perplexity per token", lambda losses, base: np.exp(losses))


def plot_differences_by_position(runs: Sequence[Run], path: str | Path) -> list[Path]:
    """Plot the increase over the first variant in percent, by position; return the files.

    Seeds are paired if the variants have the same ones.
    """
    first = next(iter(by_variant(runs)))

    def above(losses, base):
        apart = losses - (base if base.shape == losses.shape else base.mean(0))
        return 100 * np.expm1(apart)

    return plot_bands(runs, path, f"% above {first}, perplexity per token", above)


def plot_bands(
    runs: Sequence[Run], path: str | Path, y_label: str, shown: Callable[..., np.ndarray]
) -> list[Path]:
    """Plot a band per variant.

    shown: maps NLL per token (seeds x positions) and that of the first variant to plotted values.
    """
    figure, axes = new_figure("tokens into the document", y_label)
    variants = by_variant(sorted_by_seed(runs))
    ends = position_edges(variants)
    middles = bin_centers(ends[:-1], ends[1:], ends[1])
    losses = {name: log_perplexity_by_position(each) for name, each in variants.items()}
    base, labels = next(iter(losses.values())), []
    for color, (name, each) in zip(cycle(COLOR_CYCLE), losses.items(), strict=False):
        values = shown(each, base)
        mean = values.mean(0)
        axes.fill_between(middles, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
        axes.plot(middles, mean, color=color, marker="o", markersize=3.5, linewidth=1.6)
        labels.append(Label(mean[-1], name, color))
    set_bin_ticks(axes, ends[1:].tolist())
    write_labels(figure, axes, labels)
    return save(figure, path)


def sorted_by_seed(runs: Sequence[Run]) -> list[Run]:
    """Sort the runs of each variant by seed, keeping the order of variants."""
    order = list(by_variant(runs))
    return sorted(runs, key=lambda run: (order.index(run.variant), run.seed or 0))


def write_labels(figure: "Figure", axes: "Axes", labels: Sequence[Label]) -> None:
    """Write labels to the right of the lines, moved apart if they would overlap."""
    notes = [
        axes.annotate(
            label.text,
            (1, label.y),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            color=label.color,
            va="center",
        )
        for label in labels
    ]
    figure.draw_without_rendering()  # determines the positions of the line ends
    points = 72 / figure.dpi
    heights = [axes.transData.transform((0, each.y))[1] * points for each in labels]
    lowest = axes.bbox.y0 * points + LABEL_GAP / 2
    free = spread_labels(heights, LABEL_GAP, lowest)
    for note, before, height in zip(notes, heights, free, strict=True):
        note.xyann = (4, height - before)


def spread_labels(heights: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Move heights as little as possible so that they are `gap` apart and above `lowest`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, int]] = []  # centre and number of adjacent labels
    for i in order:
        groups.append((heights[i], 1))
        while len(groups) > 1:
            (low, below), (high, above) = groups[-2:]
            if high - low >= gap * (below + above) / 2:
                break
            groups[-2:] = [((low * below + high * above) / (below + above), below + above)]
    free: dict[int, float] = {}
    for centre, number in groups:
        for place in range(number):
            height = max(centre + gap * (place - (number - 1) / 2), lowest)
            free[order[len(free)]] = height
            lowest = height + gap
    return [free[i] for i in range(len(heights))]


def new_figure(x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # imported here, since only plots need it

    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=TEXT_COLOR)
    axes.set_ylabel(y_label, color=TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT_COLOR)
    axes.tick_params(colors=TEXT_COLOR)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: "Figure", path: str | Path) -> list[Path]:
    """Write PNG and SVG reproducibly, byte by byte."""
    from matplotlib import rc_context

    files = [Path(path).with_suffix(suffix) for suffix in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "melodi_hf"}):
        figure.savefig(files[0], dpi=160)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def plot_run(run: Run, folder: Path) -> list[Path]:
    """Write all plots of one run."""
    files = plot_by_position(run.evaluation, folder / "perplexity_by_position")
    settings = run.evaluation["settings"]
    if "carried" in settings and any(name.startswith("queue_") for name in settings):
        files += plot_by_memory_size(run.evaluation, folder / "perplexity_by_memory_size")
    if run.history:
        files += plot_loss(run.history, folder / "loss")
    return files


def plot_runs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the plots that compare several runs."""
    files = plot_variants_by_position(runs, folder / "variants_by_position")
    if len(by_variant(runs)) > 1:
        files += plot_differences_by_position(runs, folder / "differences_by_position")
    if all(run.history for run in runs):
        files += plot_losses(runs, folder / "losses")
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plot the JSON of runs.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of training or evaluation")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        require_packages("train", "matplotlib")
        runs = [read_run(path) for path in options.results]
        options.output.mkdir(parents=True, exist_ok=True)
        alone = len(runs) == 1
        files = plot_run(runs[0], options.output) if alone else plot_runs(runs, options.output)
    except FAILURES as error:
        parser.error(one_line(error))
    sys.stdout.write("".join(f"{file}\n" for file in files))


if __name__ == "__main__":
    main()
