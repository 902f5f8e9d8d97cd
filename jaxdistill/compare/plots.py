"""The figures of a comparison: which points and which matrices they show, and what is said above them."""

from __future__ import annotations

from jaxdistill.compare.board import Board
from jaxdistill.compare.entries import Entry
from jaxdistill.compare.figures import MOST_LABELS, Point, pareto
from jaxdistill.compare.heat import heat_map
from jaxdistill.compare.published import XNLI_AVERAGE, Key
from jaxdistill.compare.speed import choose_setting, milliseconds, setting_title

Shown = tuple[str, str, str]  # title, note, SVG


def cost_plots(board: Board) -> list[Shown]:
    """The score that stands for a model, and the XNLI average where there is one, against latency and parameters."""
    keys = [key for key in dict.fromkeys([board.score_key(), XNLI_AVERAGE]) if key in board.columns]
    found = []
    for key in keys:
        title = board.columns[key].partition(" (")[0]
        for points, x_title, note in (_by_latency(board, key), _by_parameters(board, key)):
            if len({point.x for point in points}) > 1:
                what = x_title.partition(" (")[0].lower()
                found.append((f"{title} against {what}", _note(points, note), pareto(points, x_title, board.columns[key])))
    return found


def _note(points: list[Point], note: str) -> str:
    bars = ", the bars are one deviation over seeds" if any(point.error for point in points) else ""
    said = [f"Up and to the left is better; the line is the Pareto front{bars}."]
    if any(point.published for point in points) and not all(point.published for point in points):
        said.append("Hollow: published; dashed: their front.")
    if any(point.reference for point in points):
        said.append("Orange: the reference.")
    if len(points) > MOST_LABELS:
        said.append("Not every point has a label: hover for its name.")
    return " ".join([*said, note] if note else said)


def _point(board: Board, entry: Entry, key: Key, x: float) -> Point:
    cell = board.cell(entry, key)
    return Point(entry.name, x, cell.mean, cell.deviation, not entry.measured, entry is board.reference)


def _by_parameters(board: Board, key: Key) -> tuple[list[Point], str, str]:
    entries = [entry for entry in board.entries if board.cell(entry, key) and entry.parameters]
    return [_point(board, entry, key, entry.parameters / 1e6) for entry in entries], "Parameters (millions)", ""


def _by_latency(board: Board, key: Key) -> tuple[list[Point], str, str]:
    """The papers' latencies are of their own machines: they stand in only where nothing was measured here."""
    scored = [entry for entry in board.entries if board.cell(entry, key)]
    if setting := choose_setting(board.measured):
        timed = [(entry, time) for entry in scored if (time := milliseconds(entry, setting))]
        note = "Published latencies are of other machines and not shown." if any(not entry.measured for entry in scored) else ""
        return [_point(board, entry, key, time[0]) for entry, time in timed], f"Latency (ms; {setting_title(setting)})", note
    timed = [(entry, entry.row.latency_ms) for entry in scored if not entry.measured and entry.row and entry.row.latency_ms]
    points = [_point(board, entry, key, time) for entry, time in timed]
    return points, "Latency (ms, CPU of the paper)", ""


def kept_map(board: Board) -> Shown | None:
    """What every model keeps of the reference's score, task by task."""
    reference = board.reference
    others = [entry for entry in board.measured if entry is not reference]
    if reference is None:
        return None
    keys = [key for key in board.columns if (cell := board.cell(reference, key)) and cell.mean > 0]
    others = [entry for entry in others if any(board.cell(entry, key) for key in keys)]
    if len(keys) < 2 or not others:
        return None
    values = [
        [100 * cell.mean / board.cell(reference, key).mean if (cell := board.cell(entry, key)) else None for key in keys]
        for entry in others
    ]
    low = min(value for row in values for value in row if value is not None)
    content = {
        "title": f"What is kept of {reference.name}",
        "rows": [entry.name for entry in others],
        "columns": [board.columns[key].partition(" (")[0] for key in keys],
        "values": values,
        "low": max(50, min(low, 100) // 5 * 5),
        "high": 100,
    }
    note = "Each score in percent of the reference's; the darker, the more is kept. An open cell is a score that is missing."
    return content["title"], note, heat_map(content, digits=0)


def lost_maps(entry: Entry) -> list[Shown]:
    """The heat maps of section `lost`; one that is not as `lost` writes it is named instead of drawn."""
    found = []
    for content in entry.lost.get("heatmaps") or []:
        title, note = str(content.get("title", "")), str(content.get("note") or "")
        try:
            found.append((title, note, heat_map(content)))
        except (KeyError, TypeError, ValueError, IndexError):
            found.append((title, "not a matrix with a label for every row and column; run `jaxdistill lost` again", ""))
    return found
