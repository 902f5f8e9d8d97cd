"""The tables of a comparison as text: for the terminal, for Markdown and, one row a cell, for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from jaxdistill.compare.board import Board
from jaxdistill.compare.entries import Entry
from jaxdistill.compare.published import Key
from jaxdistill.compare.significance import ALPHA, Difference
from jaxdistill.compare.speed import Setting, choose_setting, milliseconds, setting_title
from jaxdistill.report import markdown_table
from jaxdistill.tasks import TASKS

CSV_COLUMNS = (
    "model", "kind", "task", "split", "metric", "mean", "deviation", "seeds", "published", "published_source", "reference", "difference",
    "p_value", "note",
)  # fmt: skip
LIMITED, GRID = "†", "‡"


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def marks(board: Board, entry: Entry, key: Key) -> str:
    """* a significant difference, a dagger for fewer training rows, a double one for the best of a grid."""
    cell, difference = board.cell(entry, key), board.differences.get((entry.name, key))
    tasks = board.averaged.get(key, (key[0],)) if key[0] == "glue" else (key[0],)
    found = "*" if difference and difference.significant else ""
    if cell and entry.limited & set(tasks):
        found += LIMITED
    return found + (GRID if cell and cell.grid > 1 else "")


def score_text(board: Board, entry: Entry, key: Key) -> str:
    """`71.3 ± 0.6* · published 84.1`; `-` where there is no score."""
    cell = board.cell(entry, key)
    if cell is None:
        return "-"
    text = f"{cell.mean:.1f}" + (f" ± {cell.deviation:.1f}" if cell.deviation is not None else "") + marks(board, entry, key)
    published = board.published(entry, key)
    return f"{text} · published {published[0]:.1f}" if published else text


def difference_text(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.mean is None:
        return difference.why
    sign = f"{difference.mean:+.1f}"
    if difference.p is None:
        return f"{sign} ({difference.why})"
    return f"{sign}{'*' if difference.significant else ''} (p {p_text(difference.p)}, n {difference.n})"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def model_cell(board: Board, entry: Entry) -> str:
    return f"{entry.name} (reference)" if entry is board.reference else entry.name


def size_text(entry: Entry) -> str:
    return f"{entry.parameters / 1e6:.1f}" if entry.parameters else "-"


def main_table(board: Board, *, bold: bool = False) -> Table:
    """Models by averages and main metrics. `bold`: the best of a column in Markdown's **."""
    setting = choose_setting(board.measured)
    timed = ("latency (ms)",) if setting else ()
    best = {key: board.best(key, board.measured) for key in board.columns}
    rows = []
    for entry in board.entries:
        time = milliseconds(entry, setting)
        texts = []
        for key in board.columns:
            cell, text = board.cell(entry, key), score_text(board, entry, key)
            text = _plain(text) if bold else text
            texts.append(f"**{text}**" if bold and entry.measured and cell and cell.mean == best[key] else text)
        name = model_cell(board, entry)
        rows.append((_plain(name) if bold else name, size_text(entry), *([_time_text(time)] if setting else []), *texts))
    return Table("Scores", ("model", "parameters (M)", *timed, *board.columns.values()), rows)


def _time_text(time: tuple[float, float | None] | None) -> str:
    if time is None:
        return "-"
    return f"{time[0]:.2f}" + (f" ± {time[1]:.2f}" if time[1] is not None else "")


def score_table(board: Board, keys: dict[Key, str], title: str) -> Table:
    """Models that have any of these scores, by them."""
    entries = [entry for entry in board.entries if any(board.cell(entry, key) for key in keys)]
    rows = [(model_cell(board, entry), *(score_text(board, entry, key) for key in keys)) for entry in entries]
    return Table(title, ("model", *keys.values()), rows)


def difference_table(board: Board) -> Table:
    """Ours minus the reference's in every column of the main table that both have."""
    keys = [key for key in board.columns if any((entry.name, key) in board.differences for entry in board.measured)]
    entries = [entry for entry in board.measured if any((entry.name, key) in board.differences for key in keys)]
    rows = [(entry.name, *(difference_text(board.differences.get((entry.name, key))) for key in keys)) for entry in entries]
    name = board.reference.name if board.reference else ""
    return Table(f"Difference to {name}", ("model", *(board.columns[key] for key in keys)), rows)


def tables(board: Board) -> list[Table]:
    """Every table after the main one that has rows."""
    found = [
        difference_table(board),
        score_table(board, board.others, "Other tests and metrics"),
        score_table(board, board.languages, "Per language"),
    ]
    return [table for table in found if table.rows and len(table.columns) > 1]


def legend(board: Board) -> list[str]:
    """What the marks of the tables mean, as far as they occur."""
    texts = [marks(board, entry, key) for entry in board.entries for key in board.keys]
    spread = "; mean ± sample standard deviation over fine-tuning seeds" if board.reference else ""
    said = [f"Scores in percent{spread}."]
    if board.differences:
        tested = [difference for difference in board.differences.values() if difference.p is not None]
        chance = f"about {ALPHA * len(tested):.0f} would be marked by chance"
        said.append(
            f"* differs from {board.reference.name} with p < {ALPHA} (paired t-test over the seeds that both have under the same "
            f"hyperparameters; {len(tested)} tests, not corrected for their number: {chance})."
            if tested
            else f"No significance against {board.reference.name}: not enough seeds in common."
        )
    if any(LIMITED in text for text in texts):
        said.append(f"{LIMITED} fine-tuned on fewer rows than the task has; the notes say how many.")
    if any(GRID in text for text in texts):
        most = max(cell.grid for cell in board.cells.values())
        said.append(
            f"{GRID} of every seed the best on the dev set of a grid of up to {most} settings: a maximum, higher than a plain mean."
        )
    if any(board.published(entry, key) for entry in board.entries for key in board.keys):
        said.append("published: the paper's value for a student of this shape, vocabulary, method and layer mapping, whatever its text.")
    if setting := choose_setting(board.measured):
        said.append(f"Latency: {setting_title(setting)}.")
    return said


def model_notes(board: Board) -> list[str]:
    """Everything unusual or missing, each under the name of its model."""
    said = list(board.notes)
    for entry in board.measured:
        said += [f"{entry.name}: {note}" for note in entry.notes]
        said += [f"{entry.name}: no {task_title(task)}: {reason}" for task, reason in entry.missing.items()]
    return said


def task_title(task: str) -> str:
    return TASKS[task].title if task in TASKS else task


def markdown(board: Board, headline: Sequence[str], made: Sequence[str], sources: Sequence[str]) -> str:
    """The whole comparison as one Markdown page."""
    main = main_table(board, bold=True)
    parts = ["# Comparison\n", " ".join(map(_plain, headline)) + "\n", markdown_table(main.rows, main.columns)]
    parts.append("".join(f"- {_plain(line)}\n" for line in legend(board)))
    for table in tables(board):
        parts += [f"## {_plain(table.title)}\n", markdown_table([list(map(_plain, row)) for row in table.rows], table.columns)]
    for title, lines in (("Notes", model_notes(board)), ("How it was made", made), ("Published tables", sources)):
        if lines:
            parts += [f"## {title}\n", "".join(f"- {_plain(line)}\n" for line in lines)]
    return "\n".join(parts)


def _plain(text: str) -> str:
    """A name is no markup in Markdown either."""
    return text.replace("<", "&lt;").replace("*", r"\*")


def csv_text(board: Board) -> str:
    """One row for every model and test: mean, deviation, published value, difference and p."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    setting = choose_setting(board.measured)
    for entry in board.entries:
        kind, source = ("measured", "") if entry.measured else ("published", entry.row.source)
        head = (entry.name, kind)
        if entry.parameters:
            writer.writerow((*head, "", "", "parameters", entry.parameters, "", "", "", source, "", "", "", "; ".join(entry.notes)))
        if time := milliseconds(entry, setting):
            writer.writerow((*head, "", "", f"milliseconds ({setting_title(setting)})", *map(_number, time), *[""] * 7))
        for key in board.keys:
            if cell := board.cell(entry, key):
                writer.writerow((*head, *key, *_values(board, entry, key, cell, setting)))
    return file.getvalue()


def _values(board: Board, entry: Entry, key: Key, cell, setting: Setting | None) -> tuple:
    published = board.published(entry, key) or ("", "")
    if not entry.measured and entry.row and key in entry.row.scores:
        published = (entry.row.scores[key][0], entry.row.where(key))
    difference = board.differences.get((entry.name, key))
    against = (board.reference.name, _number(difference.mean), _number(difference.p)) if difference else ("", "", "")
    notes = [difference.why] if difference and difference.why else []
    notes += [f"over {', '.join(board.averaged[key])}"] if key in board.averaged else []
    notes += [f"best of a grid of {cell.grid}"] if cell.grid > 1 else []
    notes += ["fewer training rows"] if LIMITED in marks(board, entry, key) else []
    return (_number(cell.mean), _number(cell.deviation), len(cell.values) or "", *published, *against, "; ".join(notes))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
