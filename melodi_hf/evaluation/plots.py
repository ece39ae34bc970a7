"""Two plots: perplexity by position in the document, and the loss of a run.

Both are written as PNG and as SVG with selectable text, at the width of a README.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"carried": "#1f5fa8", "emptied": "#c2571a"}
WORDS = {"carried": "memory carried", "emptied": "memory emptied"}
INK = "#444444"


def plot_by_position(evaluation: dict[str, Any], path: str | Path) -> list[Path]:
    """One line per setting over the logarithm of the position; the two files written."""
    figure, axes = new_figure("tokens into the document", "perplexity per token")
    window = evaluation["window_length"]
    scored = {
        name: [each for each in setting["by_position"] if each["tokens"]]
        for name, setting in evaluation["settings"].items()
    }
    from_below = sorted(scored.items(), key=lambda each: each[1][-1]["perplexity"])
    # labels keep apart where the lines do not: the lower one below its line, the other above
    for (name, bins), side in zip(from_below, ("top", "bottom"), strict=False):
        # the middle of a bin on the logarithmic axis; the first bin begins at 0, which it lacks
        middles = [np.sqrt(max(each["from"], window / 2) * each["to"]) for each in bins]
        values = [each["perplexity"] for each in bins]
        axes.plot(middles, values, color=COLORS[name], marker="o", markersize=4, linewidth=1.8)
        axes.annotate(
            WORDS[name],
            (middles[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLORS[name],
            va=side,
        )
    mark_edges(axes, [each["to"] for each in bins])
    return save(figure, path)


def mark_edges(axes: "Axes", edges: Sequence[int]) -> None:
    """Ticks where one bin ends and the next begins, the first of them the window's length."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [short(edge) for edge in edges])
    axes.minorticks_off()


def short(number: float) -> str:
    """512, 4K, 64K, 1.5M: binary thousands, as windows are counted."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def plot_loss(history: Sequence[dict[str, Any]], path: str | Path) -> list[Path]:
    """The training loss over the tokens read, with its running mean; the two files written."""
    figure, axes = new_figure("million tokens read", "loss, nats per token")
    tokens = np.array([each["tokens"] for each in history]) / 1e6
    losses = np.array([each["loss"] for each in history])
    span = max(1, len(losses) // 20)
    means = np.convolve(losses, np.ones(span) / span, mode="valid")
    axes.plot(tokens, losses, color=COLORS["carried"], linewidth=1, alpha=0.35)
    middle = slice(span // 2, span // 2 + len(means))
    axes.plot(tokens[middle], means, color=COLORS["carried"], linewidth=1.8)
    axes.annotate(
        f"{means[-1]:.2f}",
        (tokens[middle][-1], means[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=COLORS["carried"],
        va="center",
    )
    return save(figure, path)


def new_figure(x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # here, for readers who plot nothing

    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def save(figure: "Figure", path: str | Path) -> list[Path]:
    """Write PNG and SVG; the same figure gives the same bytes."""
    from matplotlib import rc_context

    files = [Path(path).with_suffix(suffix) for suffix in (".png", ".svg")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "melodi_hf"}):
        figure.savefig(files[0], dpi=160)
        figure.savefig(files[1], metadata={"Date": None})
    return files
