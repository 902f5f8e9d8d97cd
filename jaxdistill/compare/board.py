"""The comparison itself: which columns there are, the averages, the differences to the reference, and every note by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdistill.compare.cells import Cell, mean_of
from jaxdistill.compare.entries import Entry
from jaxdistill.compare.published import GLUE_ALL, GLUE_PAPER, GLUE_WITHOUT_COLA, XNLI_AVERAGE, Key
from jaxdistill.compare.significance import Difference, paired
from jaxdistill.errors import InputError, nearest
from jaxdistill.tasks import GLUE, TASKS

AVERAGES = {GLUE_ALL: "GLUE average", GLUE_WITHOUT_COLA: "GLUE without CoLA"}
# Everybody's dev scores on it are those of a constant answer, and no paper's average here holds it.
NOT_AVERAGED = "wnli"
# What is reported of a task's tests: of mnli the first one; the rest stands in the second table.
_METRIC_TITLES = {"matthews": "Matthews", "accuracy": "acc.", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}


@dataclass
class Board:
    """Everything that the tables, the CSV and the page show."""

    entries: list[Entry]
    columns: dict[Key, str] = field(default_factory=dict)  # of the main table -> its title
    others: dict[Key, str] = field(default_factory=dict)  # all other tests and metrics, without languages
    languages: dict[Key, str] = field(default_factory=dict)
    cells: dict[tuple[str, Key], Cell] = field(default_factory=dict)  # by model's name
    differences: dict[tuple[str, Key], Difference] = field(default_factory=dict)
    averaged: dict[Key, tuple[str, ...]] = field(default_factory=dict)  # average -> its tasks or languages
    notes: list[str] = field(default_factory=list)
    reference: Entry | None = None

    @property
    def measured(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.measured]

    @property
    def keys(self) -> dict[Key, str]:
        return self.columns | self.others | self.languages

    def cell(self, entry: Entry, key: Key) -> Cell | None:
        return self.cells.get((entry.name, key))

    def published(self, entry: Entry, key: Key) -> tuple[float, str] | None:
        """The published value of the same cell and its table; an average only where it is over the same tasks or languages."""
        row = entry.row
        if not entry.measured or row is None or key not in row.scores or not self.cell(entry, key):
            return None
        if key in self.averaged and set(self.averaged[key]) != _tasks_of(row, key):
            return None
        return row.scores[key][0], row.where(key)

    def best(self, key: Key, among: Iterable[Entry]) -> float | None:
        return max((cell.mean for entry in among if (cell := self.cell(entry, key))), default=None)

    def score_key(self) -> Key | None:
        """The average that stands for a model in a sentence or a plot, else the first column that most models have."""
        entries = [entry for entry in self.measured if entry.cells] or self.entries
        having = {key: sum(self.cell(entry, key) is not None for entry in entries) for key in self.columns}
        averages = [key for key in (GLUE_WITHOUT_COLA, GLUE_PAPER, GLUE_ALL, XNLI_AVERAGE) if having.get(key)]
        return max(averages or having, key=lambda key: having[key], default=None)


def _tasks_of(row: Any, key: Key) -> set[str]:
    return set(TASKS["xnli"].tests) - {"validation"} if key == XNLI_AVERAGE else set(row.averaged.get(key, ()))


def make_board(entries: Sequence[Entry], reference: str | None) -> Board:
    """Columns, averages and tests of these models.

    Raises:
      InputError: `reference` is none of the models measured here.
    """
    board = Board(list(entries), reference=_reference(entries, reference))
    board.cells = {(entry.name, key): cell for entry in entries for key, cell in entry.cells.items() if key not in _DERIVED}
    # Where models were measured, a task that only published rows have stands further down.
    shown = {key for entry in board.measured for key in entry.cells} or {key for entry in entries for key in entry.cells}
    for task in TASKS.values():
        dev, languages = next(iter(task.tests)), [split for split in task.tests if len(split) == 2]
        main = {(task.name, dev, task.metrics[0])} if task.name != "xnli" else set()
        for split in task.tests:
            for metric in task.metrics:
                key = (task.name, split, metric)
                if any(each in board.cells for each in ((entry.name, key) for entry in entries)):
                    place = board.languages if split in languages else board.columns if key in main and key in shown else board.others
                    place[key] = _title(key)
        if languages:
            _average_languages(board, task.name, languages)
    _average_glue(board)
    if board.reference:
        for entry in board.measured:
            for key in board.keys if entry is not board.reference else ():
                ours, other = board.cell(entry, key), board.cell(board.reference, key)
                if ours and other:
                    board.differences[entry.name, key] = paired(ours, other)
    board.entries.sort(key=_order(board))
    return board


def _order(board: Board):
    """The reference first, then the best first, those without the score after them; published rows last."""
    key = board.score_key()

    def rank(entry: Entry) -> tuple:
        cell = board.cell(entry, key) if key else None
        return not entry.measured, entry is not board.reference, cell is None, -cell.mean if cell else -(entry.parameters or 0), entry.name

    return rank


_DERIVED = (GLUE_ALL, GLUE_WITHOUT_COLA, XNLI_AVERAGE)


def _title(key: Key) -> str:
    task, split, metric = key
    first = next(iter(TASKS[task].tests))
    if len(split) == 2:
        return f"{TASKS[task].title} {split}"
    if split == first and metric == TASKS[task].metrics[0]:
        return TASKS[task].title if task != "xnli" else "XNLI dev (en)"
    where = "" if split == first else f" {split.removeprefix('validation_')}"
    return f"{TASKS[task].title}{where} {_METRIC_TITLES.get(metric, metric)}"


def _reference(entries: Sequence[Entry], name: str | None) -> Entry | None:
    measured = [entry for entry in entries if entry.measured]
    if name is not None:
        for entry in measured:
            if entry.name == name:
                return entry
        among = [entry.name for entry in measured]
        if not among:
            raise InputError(f"--reference {name}: no model measured here to pair with; published rows have no seeds")
        raise InputError(f"--reference {name}: no such model among those measured here{nearest(name, among)}")
    scored = [entry for entry in measured if entry.cells]
    return max(scored, key=lambda entry: entry.parameters or 0, default=None)


def _average_languages(board: Board, task: str, languages: Sequence[str]) -> None:
    """The mean over the languages that every model with one of them has."""
    metric = TASKS[task].metrics[0]
    having = {entry.name: {split for split in languages if (entry.name, (task, split, metric)) in board.cells} for entry in board.entries}
    ours = {name: found for name, found in having.items() if found and _is_measured(board, name)} or {n: f for n, f in having.items() if f}
    common = [split for split in languages if all(split in found for found in ours.values())] if ours else []
    key = (task, "languages", metric)
    wanted = {entry.name for entry in board.entries if task == "xnli" and entry.row and not entry.measured and key in entry.row.scores}
    if not common and not wanted:
        return
    common = common or [split for split in languages if task == "xnli"]
    board.columns[key] = f"{TASKS[task].title if task == 'xnli' else f'{TASKS[task].title} to XNLI'} ({len(common)} languages)"
    board.averaged[key] = tuple(common)
    for entry in board.entries:
        if set(common) <= having[entry.name]:
            board.cells[entry.name, key] = mean_of([board.cells[entry.name, (task, split, metric)] for split in common])
        elif entry.name in wanted and len(common) == len(languages):
            board.cells[entry.name, key] = Cell(alone=entry.row.scores[key][0])
    seen = set().union(*ours.values())
    if left := {split: [name for name, found in ours.items() if split not in found] for split in languages if split in seen - set(common)}:
        names = sorted({name for missing in left.values() for name in missing})
        board.notes.append(f"{TASKS[task].title} average: {', '.join(left)} left out, missing for {_some(names)}")


def _is_measured(board: Board, name: str) -> bool:
    return any(entry.name == name for entry in board.measured)


def _average_glue(board: Board) -> None:
    """GLUE with and without CoLA over the tasks that every model with GLUE scores has; what is left out is named."""
    main = {task: (task, next(iter(TASKS[task].tests)), TASKS[task].metrics[0]) for task in GLUE}

    def tasks_of(entry: Entry) -> set[str]:
        return {task for task, key in main.items() if (entry.name, key) in board.cells}

    having = {entry.name: tasks_of(entry) for entry in board.measured}
    compared = {name: found for name, found in having.items() if found - {NOT_AVERAGED}}
    if not compared:
        rows = {entry.name: set(entry.row.averaged.get(GLUE_ALL, ())) for entry in board.entries if not entry.measured and entry.row}
        compared = {name: found for name, found in rows.items() if found}
    seen = set().union(*compared.values())
    common = [task for task in GLUE if task != NOT_AVERAGED and compared and all(task in found for found in compared.values())]
    for task in GLUE:
        if task in seen and task not in common:
            who = [name for name, found in compared.items() if task not in found]
            why = f"missing for {_some(who)}" if task != NOT_AVERAGED else "no published average holds it"
            board.notes.append(f"GLUE averages: {TASKS[task].title} left out, {why}")
    columns = {}
    for key, title in AVERAGES.items():
        tasks = [task for task in common if task != "cola" or key == GLUE_ALL]
        if len(tasks) < 2 or (key == GLUE_ALL and "cola" not in tasks):
            continue
        columns[key] = f"{title} ({len(tasks)} tasks)"
        board.averaged[key] = tuple(tasks)
        for entry in board.entries:
            cell = _glue_average(entry, [main[task] for task in tasks], tasks, key, board.cells)
            if cell:
                board.cells[entry.name, key] = cell
    columns |= _paper_average(board, main)
    ours = [key for key in columns if "qqp" in board.averaged[key] and any(board.cell(entry, key) for entry in board.measured)]
    if ours and any(entry.row and entry.row.source == "udagawa2023" for entry in board.entries):
        board.notes.append(
            "udagawa2023's averages count QQP by what is F1 by its size, ours by accuracy: this alone makes ours about 0.4 higher"
        )
    board.columns = columns | board.columns


def _paper_average(board: Board, main: Mapping[str, Key]) -> dict[Key, str]:
    """A column for rows of which the average alone is published, where ours is over other tasks; with the models that have its tasks."""
    rows = [entry for entry in board.entries if not entry.measured and entry.row and GLUE_WITHOUT_COLA in entry.row.scores]
    if all((entry.name, GLUE_WITHOUT_COLA) in board.cells for entry in rows):
        return {}
    tasks = [task for task in GLUE if task in rows[0].row.averaged[GLUE_WITHOUT_COLA]]
    for entry in board.measured:
        if cell := _glue_average(entry, [main[task] for task in tasks], tasks, GLUE_WITHOUT_COLA, board.cells):
            board.cells[entry.name, GLUE_PAPER] = cell
    for entry in rows:
        board.cells[entry.name, GLUE_PAPER] = Cell(alone=entry.row.scores[GLUE_WITHOUT_COLA][0])
    board.averaged[GLUE_PAPER] = tuple(tasks)
    return {GLUE_PAPER: f"GLUE without CoLA ({len(tasks)} tasks, as published)"}


def _glue_average(entry: Entry, keys: Sequence[Key], tasks: Sequence[str], average: Key, cells: Mapping) -> Cell | None:
    own = [cells.get((entry.name, key)) for key in keys]
    if all(own):
        return mean_of(own)
    if not entry.measured and entry.row and average in entry.row.scores and set(entry.row.averaged.get(average, ())) == set(tasks):
        return Cell(alone=entry.row.scores[average][0])
    return None


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
