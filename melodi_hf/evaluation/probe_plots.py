"""Plots of probes by distance, and of attention to the queue by age."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melodi_hf.evaluation.plots import TEXT_COLOR, format_tokens, new_figure, save

LINE_COLORS = ("#1f5fa8", "#c2571a", "#2f7d4f", "#8a5aa8", "#8c6d1f", "#555555")
PLOTTED_VALUES = {  # value: label, and the bounds of its interval
    "accuracy": ("right answers", "low", "high"),
    "gain": ("gain by the fact, nats per token", "gain_low", "gain_high"),
}


def plot_by_distance(
    lines: Mapping[str, Sequence[dict[str, Any]]],
    path: str | Path,
    *,
    value: str = "accuracy",
    marks: Mapping[str, int] | None = None,
) -> list[Path]:
    """Plot the rows of probes or models by distance, with intervals; return the files.

    value: one of `PLOTTED_VALUES`; marks: distances to mark with a vertical line, by name. The
    chance level is dotted, if it is known.
    """
    label, low, high = PLOTTED_VALUES[value]
    figure, axes = new_figure("tokens between the fact and the question", label)
    for color, (name, rows) in zip(LINE_COLORS, lines.items(), strict=False):
        found = np.array([[row[value], row[low], row[high]] for row in rows]).T
        reach = np.abs(found[1:] - found[0])
        style: dict[str, Any] = {
            "color": color,
            "label": name,
            "fmt": "o-",
            "markersize": 4,
            "elinewidth": 0.8,
        }
        axes.errorbar([row["distance"] for row in rows], found[0], reach, capsize=2, **style)
        if value == "accuracy" and rows[0]["chance"] is not None:
            axes.axhline(rows[0]["chance"], color=TEXT_COLOR, linestyle=":", linewidth=1)
    known = sorted({row["distance"] for rows in lines.values() for row in rows if row["distance"]})
    powers = [
        2**i for i in range(20) if min(known, default=1) // 2 < 2**i <= 2 * max(known, default=1)
    ]
    # linear up to the first power of two, to include 0
    axes.set_xscale("symlog", base=2, linthresh=powers[0])
    axes.set_xticks([0, *powers], [format_tokens(distance) for distance in (0, *powers)])
    axes.minorticks_off()
    if value == "accuracy":
        axes.set_ylim(0, 1.02)
    for name, distance in (marks or {}).items():
        axes.axvline(distance, color=TEXT_COLOR, linestyle="--", linewidth=0.8)
        axes.annotate(
            name, (distance, 1), (3, -2), ("data", "axes fraction"), "offset points",
            color=TEXT_COLOR, fontsize=8, va="top",
        )  # fmt: skip
    axes.legend(frameon=False, labelcolor=TEXT_COLOR, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def plot_queue(measured: dict[str, Any], path: str | Path) -> list[Path]:
    """Plot two maps with a row per head: attention by age, and the gate by channel."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure  # imported here, since only plots need it

    layers = measured["layers"]
    ratio = np.log2(np.maximum(np.concatenate([layer["ratio"] for layer in layers]), 2.0**-6))
    share = np.concatenate([layer["share"] for layer in layers])
    heads = [
        f"layer {layer['layer']}, head {head} ({breadth:.0%})"
        for layer in layers
        for head, breadth in enumerate(layer["breadth"])
    ]
    figure = Figure(figsize=(7.6, 1.7 + 0.3 * len(heads)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    most = max(1.0, float(np.abs(ratio).max()))
    panels = (
        (left, ratio, {"cmap": "RdBu_r", "norm": TwoSlopeNorm(0, -most, most)}),
        (right, share, {"cmap": "viridis", "vmin": 0, "vmax": 1}),
    )
    for axes, values, options in panels:
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
        bar = figure.colorbar(image, ax=axes, location="top", shrink=0.8)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=TEXT_COLOR, labelsize=8)
        axes.tick_params(colors=TEXT_COLOR, labelsize=8, length=0)
        axes.spines[:].set_visible(False)
    left.figure.axes[2].set_title("attention, log2 relative to uniform", size=8, color=TEXT_COLOR)
    left.figure.axes[3].set_title("share of the queue behind the gate", size=8, color=TEXT_COLOR)
    ages = layers[0]["ages"]
    left.set_xticks(range(len(ages)), [str(a) if a == b else f"{a}-{b}" for a, b in ages])
    left.set_yticks(range(len(heads)), heads)
    words = "age of the entry, windows\n(in brackets: breadth of the attention of a token)"
    left.set_xlabel(words, color=TEXT_COLOR, size=9)
    right.set_yticks([])
    right.set_xlabel("channels of the head, sorted", color=TEXT_COLOR, size=9)
    return save(figure, path)
