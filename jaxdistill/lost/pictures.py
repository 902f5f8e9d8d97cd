"""The heat maps as pictures, in the manner of the loss plots."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxdistill.report import COLOURS, GREY, INK

PALE_TO_DARK = LinearSegmentedColormap.from_list("pale to dark", ["#f7fafc", "#9ccae6", COLOURS[0], "#00243d"])
MOST_LABELS = 40  # along one side: more would run into each other, and groups are named instead
MOST_NUMBERS = 20  # columns up to which a cell holds its number


def _groups(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, first, number after the last) of neighbours with one name before the dot: of heads, their layer."""
    found: list[tuple[str, int, int]] = []
    for i, label in enumerate(labels):
        name = label.split(".")[0]
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], i + 1)
        else:
            found.append((name, i, i + 1))
    return found


def _label(axes: Axes, side: str, labels: Sequence[str], title: str) -> None:
    """Every label where they fit, else one in the middle of each group; white lines between groups of several."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    groups = _groups(labels)
    if len(labels) <= MOST_LABELS:
        axis.set_ticks(range(len(labels)), list(labels))
    else:
        axis.set_ticks([(first + end - 1) / 2 for _, first, end in groups], [name for name, _, _ in groups])
        title = f"{title.split('.')[0]}, {groups[0][2] - groups[0][1]} heads each"
    if any(end - first > 1 for _, first, end in groups):
        for _, first, _ in groups[1:]:
            (axes.axvline if side == "x" else axes.axhline)(first - 0.5, color="white", linewidth=2)
    axes.tick_params(axis=side, labelsize=12 if len(labels) <= 20 or len(labels) > MOST_LABELS else 9)
    axis.set_label_text(title, fontsize=14, color=GREY)
    axis.labelpad = 8


def _write_numbers(axes: Axes, values: np.ndarray, low: float, high: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if (value - low) / (high - low) > 0.55 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=11, color=colour)


def draw_heatmap(heatmap: Mapping[str, Any], path: str | Path, subtitle: str) -> Path:
    """Writes a PNG of one heat map of the section "lost": dark is high; a cell without a value stays white."""
    values = np.array(heatmap["values"], np.float64)  # None becomes NaN
    num_rows, num_columns = values.shape
    with_numbers = num_columns <= MOST_NUMBERS and num_rows <= MOST_LABELS
    cell = (0.62, 0.5 if num_rows <= 20 else 0.26) if with_numbers else (min(0.12, 17 / num_columns), min(0.16, 17 / num_rows))
    size = (max(9.0, 2.6 + cell[0] * num_columns), max(4.2, 2.6 + cell[1] * num_rows))
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = heatmap["low"], heatmap["high"]
    image = axes.imshow(values, cmap=PALE_TO_DARK, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    if with_numbers:
        _write_numbers(axes, values, low, high)
    _label(axes, "x", heatmap["columns"], heatmap["columns_title"])
    _label(axes, "y", heatmap["rows"], heatmap["rows_title"])
    axes.tick_params(labelcolor=GREY, length=0, pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=11, labelcolor=GREY, length=0)
    figure.suptitle(heatmap["title"], x=0.02, ha="left", fontsize=18, fontweight="bold", color=INK, parse_math=False)
    lines = [line for text in (subtitle, heatmap["note"]) for line in textwrap.wrap(text, int(12 * size[0]))]
    axes.set_title("\n".join(lines), loc="left", fontsize=11, color=GREY, pad=10, linespacing=1.5, parse_math=False)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


def draw_all(heatmaps: Sequence[Mapping[str, Any]], folder: Path, subtitle: str) -> list[Path]:
    """One PNG each, named by its title."""
    names = [re.sub(r"[^a-z0-9]+", "-", heatmap["title"].lower()).strip("-") for heatmap in heatmaps]
    return [draw_heatmap(heatmap, folder / f"{name}.png", subtitle) for name, heatmap in zip(names, heatmaps, strict=True)]
