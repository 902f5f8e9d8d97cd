"""The end of a run for a person: the curves of the losses as a picture, and what came out as a table."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jaxdistill.errors import InputError
from jaxdistill.progress import significant

# Okabe and Ito's palette, which colour-blind readers can tell apart too, without its yellow (too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SUMMARY_COLUMNS = (
    "student",
    "layers x hidden",
    "parameters (M)",
    "smaller than the teacher by",
    "held-out loss, start -> end",
    "tokens seen",
    "export folder",
)
LINES = ("-", "--", ":", "-.")  # when the colours begin again
STYLES: dict[str, dict[str, Any]] = {
    "training": {"linewidth": 1.4, "alpha": 0.55},
    "held-out": {"linewidth": 2.4, "marker": "o", "markersize": 7, "markeredgecolor": "white", "zorder": 3},
}
INK, GREY = "#222222", "#666666"


def _curve(history: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one name; a value that is not finite stays and leaves a gap."""
    points = [(record["step"], float(record[name])) for record in history if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _losses(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """student -> training | held-out -> curve. The total of the run stands in only where no student has a loss of its own."""
    names = list(dict.fromkeys(name for record in history for name in record))
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for suffix, kind in (("/loss", "training"), ("/held_out", "held-out")):
        for name in names:
            if name.endswith(suffix):
                found.setdefault(name.removesuffix(suffix), {})[kind] = _curve(history, name)
    if not any("training" in curves for curves in found.values()) and "loss" in names:
        # With one student the total is its loss; with several it is none of theirs.
        owner = next(iter(found), "loss") if len(found) < 2 else "all students"
        found.setdefault(owner, {})["training"] = _curve(history, "loss")
    return found


def _draw_axes(axes: Axes, values: Sequence[float], title: str) -> None:
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if not finite:
        axes.text(0.5, 0.5, "no loss was finite", transform=axes.transAxes, ha="center", color=GREY, fontsize=16)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value == int(value) else ""))
    axes.set_title(title, loc="left", fontsize=18, fontweight="bold", color=INK, pad=16, parse_math=False)
    axes.set_xlabel("step", fontsize=14, color=GREY, labelpad=8)
    axes.set_ylabel("loss (log scale)" if axes.get_yscale() == "log" else "loss", fontsize=14, color=GREY, labelpad=8)
    axes.tick_params(labelsize=12, labelcolor=GREY, length=0, which="both", pad=6)
    axes.grid(True, color="#e4e4e4", linewidth=1)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def plot_losses(history: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> Path:
    """Writes a PNG (1200 x 800) of every student's training loss (thin) and held-out loss (dots) over the steps.

    The loss axis is logarithmic where the values span more than a factor of 10.

    Args:
      history: records with `step`, `<student>/loss` and `<student>/held_out`, or `loss` alone (`metrics.read_history`).

    Raises:
      InputError: no record holds a loss.
    """
    students = _losses(history)
    if not students:
        raise InputError(f"{path}: nothing to plot, none of {len(history)} records holds a loss")
    size = (12, 8) if len(students) <= len(COLOURS) else (16, max(8, 0.24 * len(students)))  # room for the legend beside the curves
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    crowded = len(students) > len(COLOURS)
    for i, (student, curves) in enumerate(students.items()):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)]
        if crowded and "held-out" in curves:  # one curve a student is what an eye can follow
            curves = {"held-out": curves["held-out"]}
        for kind, (steps, values) in curves.items():
            style = {**STYLES[kind], "marker": "o"} if len(steps) == 1 else STYLES[kind]
            name = kind if student == "loss" else f"{student}, {kind}"
            ends = [significant(value) for value in ([values[0], values[-1]] if len(values) > 1 else values)]
            axes.plot(steps, values, color=colour, linestyle=line, label=f"{name}: {' → '.join(ends)}", **style)
    _draw_axes(axes, [value for curves in students.values() for _, values in curves.values() for value in values], title)
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "fontsize": 10}
    where = beside if crowded else {"loc": "best", "fontsize": 12}
    axes.legend(labelcolor=INK, frameon=True, facecolor="white", edgecolor="none", framealpha=0.85, **where)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


def summary_row(
    student: str,
    *,
    num_layers: int,
    hidden_size: int,
    num_parameters: int,
    num_teacher_parameters: int,
    held_out: tuple[float, float],
    tokens: int,
    export_folder: str | Path,
) -> tuple[str, ...]:
    """One student as the cells of SUMMARY_COLUMNS; `held_out` is the loss at the start and at the end."""
    return (
        student,
        f"{num_layers} x {hidden_size}",
        f"{num_parameters / 1e6:.1f}",
        f"{num_teacher_parameters / num_parameters:.1f}x",
        f"{significant(held_out[0])} -> {significant(held_out[1])}",
        f"{tokens:,}",
        str(export_folder),
    )


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?\d[\d,.]*(e[-+]?\d+)?\s?(%|x|[kMG]?B?|ms|s)|-|nan|inf", cell) is not None


def _justify(rows: Sequence[Sequence[str]], i: int) -> str:
    return "right" if rows and all(_is_number(row[i]) for row in rows) else "left"


def _cells(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> list[list[str]]:
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
    return cells


def summary_table(rows: Iterable[Sequence[Any]], columns: Sequence[str], title: str) -> Table:
    """A table for `print_table`; columns of numbers stand to the right. A row has one cell per column, else ValueError."""
    cells = _cells(rows, columns)
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify=_justify(cells, i), overflow="fold")  # a folder is for copying: never cut it
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: a name with [brackets] is no markup
    return table


def _upright(table: Table) -> Table:
    """The same cells below one another, a block for each row: for a terminal too narrow for the columns."""
    upright = Table(title=table.title, title_justify="left", box=box.SIMPLE, pad_edge=False, show_header=False)
    upright.add_column(style="bold")
    upright.add_column(overflow="fold")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, row, strict=True):
            upright.add_row(column.header, cell)
        upright.add_section()
    return upright


def print_table(table: Table) -> None:
    """Prints to stdout: in full width where that is a file or a pipe, each row upright where the terminal is too narrow."""
    console = Console(file=sys.stdout)
    wide = Console(file=sys.stdout, width=10_000)
    width = Measurement.get(wide, wide.options, table).maximum
    if not console.is_terminal and not console.is_jupyter:
        console = Console(file=sys.stdout, width=max(80, width))
    console.print(table if width <= console.width else _upright(table))


def markdown_table(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> str:
    """The same table for a model card or a README: GitHub's Markdown, with a newline at the end."""
    cells = _cells(rows, columns)
    rule = ["---:" if _justify(cells, i) == "right" else "---" for i in range(len(columns))]
    escaped = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in [list(columns), *cells]]
    lines = [escaped[0], rule, *escaped[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
