"""One cell of a table: a model's score on one test, seed by seed, and what can be said of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxdistill.compare.published import Key
from jaxdistill.errors import InputError, nearest
from jaxdistill.tasks import TASKS


@dataclass(frozen=True)
class Cell:
    """Scores in percent. Of a grid, a seed's score is that of its run with the best dev score."""

    values: dict[int, float] = field(default_factory=dict)  # seed -> score
    chosen: dict[int, tuple] = field(default_factory=dict)  # seed -> learning rate, batch size, epochs of its run
    tried: frozenset[tuple] = frozenset()  # those of all runs
    grid: int = 1  # settings of which a seed's score is the best
    alone: float | None = None  # a mean of which no seeds are known

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values()) if self.values else self.alone

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


def mean_of(cells: Sequence[Cell]) -> Cell:
    """The average over tasks or languages, seed by seed where they have seeds in common."""
    seeds = sorted(set.intersection(*(set(cell.values) for cell in cells)))
    if not seeds or any(set(cell.values) != set(seeds) for cell in cells):  # some seeds are missing somewhere: no pairs, no deviation
        return Cell(alone=statistics.fmean(cell.mean for cell in cells))
    return Cell(
        {seed: statistics.fmean(cell.values[seed] for cell in cells) for seed in seeds},
        {seed: tuple(cell.chosen[seed] for cell in cells) for seed in seeds},
        frozenset((i, setting) for i, cell in enumerate(cells) for setting in cell.tried),
        max(cell.grid for cell in cells),
    )


def read_cells(scores: Mapping[str, Any], where: str) -> tuple[dict[Key, Cell], list[str]]:
    """Section `scores` of a file of results as cells, and notes of what is unusual about them.

    Raises:
      InputError: an unknown task, or a section that `evaluate` would not write.
    """
    cells: dict[Key, Cell] = {}
    notes: list[str] = []
    tasks = scores.get("tasks", {})
    varied = ("name", "seeds", "learning_rates", "batch_sizes", "epochs", "epochs_of")  # of these each run says its own
    protocol = {field: str(value) for field, value in scores.get("protocol", {}).items() if field not in varied}
    for name, content in tasks.items() if isinstance(tasks, Mapping) else ():
        if name not in TASKS:
            raise InputError(f"{where}: scores.tasks: unknown task {name!r}{nearest(name, TASKS)}")
        try:
            found, own = _task_cells(name, content, protocol)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where}: scores.tasks.{name}: not as evaluate writes it: {said}; evaluate the model again") from None
        cells |= found
        notes += own
    return cells, notes


def _task_cells(name: str, content: Mapping[str, Any], protocol: Mapping[str, Any]) -> tuple[dict[Key, Cell], list[str]]:
    task = TASKS[name]
    dev, metric = next(iter(task.tests)), task.metrics[0]
    notes = [f"{task.title}: {note}" for note in content.get("notes", [])]
    best: dict[int, tuple[float, tuple, Mapping]] = {}
    tried = set()
    # What a paired test needs to be equal beside the seed.
    shared = (*sorted(protocol.items()), *sorted((name, content.get("examples", {}).get(name)) for name in ("train", "train_available")))
    for run in content["runs"]:
        if run["seed"] is None:
            notes.append(f"{task.title}: scored as it is, not fine-tuned here")
        seed, setting = int(run["seed"] or 0), (run.get("learning_rate"), run.get("batch_size"), run.get("epochs"), *shared)
        first = dev if dev in run["scores"] else next(iter(run["scores"]), dev)
        score = float(run["scores"].get(first, {}).get(metric, math.nan))
        tried.add(setting)
        if not math.isfinite(score):
            notes.append(f"{task.title}: the run of seed {seed} has no finite score and is left out")
        elif seed not in best or score > best[seed][0]:
            best[seed] = (score, setting, run["scores"])
    if len(tried) > 1:
        notes.append(f"{task.title}: of every seed the best run on the dev set, a maximum over a grid of {len(tried)} settings")
    examples = content.get("examples", {})
    trained, available = examples.get("train"), examples.get("train_available")
    if trained is not None and available is not None and trained < available:
        notes.append(f"{task.title}: fine-tuned on {trained:,} of {available:,} rows")
    found: dict[Key, Cell] = {}
    for split in dict.fromkeys(split for _, _, tests in best.values() for split in tests):
        for each in dict.fromkeys(metric for _, _, tests in best.values() for metric in tests.get(split, {})):
            seeds = {seed: tests[split][each] for seed, (_, _, tests) in best.items() if each in tests.get(split, {})}
            values = {seed: 100 * float(value) for seed, value in sorted(seeds.items()) if math.isfinite(value)}
            if values:
                found[name, split, each] = Cell(values, {seed: best[seed][1] for seed in values}, frozenset(tried), len(tried))
    return found, notes


def is_limited(content: Mapping[str, Any]) -> bool:
    """Whether a task's training rows were fewer than there are."""
    examples = content.get("examples", {})
    return (examples.get("train") or 0) < (examples.get("train_available") or 0)
