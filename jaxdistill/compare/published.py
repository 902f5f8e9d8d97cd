"""The published tables that ship with the package: their rows as models, with their scores as the papers print them (in percent)."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from jaxdistill.errors import InputError, nearest
from jaxdistill.tasks import GLUE, TASKS

FOLDER = Path(__file__).parent.parent / "published"
# How `compare` names a table and what stands at the foot of a page that shows one of its numbers.
SOURCES = {
    "udagawa2023": "Udagawa, Trivedi, Merler, Bhattacharjee: A Comparative Analysis of Task-Agnostic Distillation Methods for Compressing "
    "Transformer Language Models. EMNLP 2023 Industry Track, arXiv 2310.08797. Dev sets, mean of 3 seeds.",
    "wang2023": "Wang, Weissweiler, Schütze, Plank: How to Distill your BERT: An Empirical Study on the Impact of Weight Initialisation "
    "and Distillation Objectives. ACL 2023, arXiv 2305.15032. Dev sets; task-agnostic: best of a grid, task-specific: mean of 4 runs.",
}
Key = tuple[str, str, str]  # task, split, metric
GLUE_ALL: Key = ("glue", "", "average")
GLUE_WITHOUT_COLA: Key = ("glue", "", "average_without_cola")
GLUE_PAPER: Key = ("glue", "as published", "average_without_cola")  # beside rows of which nothing else is published
XNLI_AVERAGE: Key = ("xnli", "languages", "accuracy")
_BY_TITLE = {task.title: task for task in TASKS.values()}
# By the size of the numbers: published/SOURCES.md.
_METRICS = {"udagawa2023": {"qqp": "f1"}}
_UNCLEAR = {"mrpc", "cola"}  # of wang2023's task-specific tables
_AVERAGES = {"glue_avg_without_cola": GLUE_WITHOUT_COLA, "xnli_avg": XNLI_AVERAGE}


@dataclass
class Published:
    """One row of a published table: a model that somebody else trained."""

    source: str
    name: str
    keys: dict[str, str]  # method, layer_mapping, setting, student, ... : what a filter may name
    parameters: int | None = None
    latency_ms: float | None = None  # CPU of the paper
    scores: dict[Key, tuple[float, str]] = field(default_factory=dict)  # percent, table
    averaged: dict[Key, frozenset[str]] = field(default_factory=dict)  # tasks that an average holds

    def where(self, key: Key) -> str:
        return f"{self.source}, {self.scores[key][1]}"


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _key(source: str, title: str) -> Key:
    """Of a GLUE task by its title in the paper; the metric is the catalogue's first one, unless the paper's is another."""
    task = _BY_TITLE[title]
    return task.name, next(iter(task.tests)), _METRICS.get(source, {}).get(task.name, task.metrics[0])


@lru_cache
def udagawa_shapes() -> dict[tuple[int, int, int, int], str]:
    """Shape (layers, heads, hidden, feed-forward) -> student."""
    sizes = ("num_layers", "num_heads", "hidden_size", "intermediate_size")
    return {tuple(int(row[size]) for size in sizes): row["student"] for row in _rows("udagawa2023_students")}


@lru_cache
def udagawa2023() -> tuple[Published, ...]:
    students = {row["student"]: row for row in _rows("udagawa2023_students")}
    found: dict[tuple[str, ...], Published] = {}

    def row_of(row: dict[str, str]) -> Published:
        student = "teacher" if row["student"].lower() == "teacher" else row["student"]
        keys = {"method": row["method"], "layer_mapping": row["layer_mapping"], "setting": row["setting"], "student": student}
        name = " ".join(dict.fromkeys(word for word in (student, row["method"], row["layer_mapping"], row["setting"]) if word))
        short = row["setting"].removesuffix("lingual")
        size, latency = students[student][f"params_{row['setting']}_M"], students[student][f"latency_{short}_cpu_ms"]
        model = Published("udagawa2023", f"{name} (udagawa2023)", keys, int(size) * 1_000_000, float(latency))
        return found.setdefault(tuple(keys.values()), model)

    for row in _rows("udagawa2023_table3"):
        table = "table 4" if row["method"] == "DistilBERT" else "table 3"
        row_of(row).scores[_AVERAGES[row["metric"]]] = (float(row["score"]), table)
    for row in _rows("udagawa2023_glue_per_task"):
        key = GLUE_ALL if row["task"] == "avg_all" else _key("udagawa2023", row["task"])
        row_of(row).scores[key] = (float(row["score"]), "table 5" if row["setting"] == "monolingual" else "table 6")
    for row in _rows("udagawa2023_xnli_per_language"):
        row_of(row).scores["xnli", row["language"], "accuracy"] = (float(row["accuracy"]), "table 7")
    tasks = frozenset(GLUE) - {"wnli"}
    for model in found.values():
        model.averaged = {GLUE_ALL: tasks, GLUE_WITHOUT_COLA: tasks - {"cola"}}
    return tuple(found.values())


@lru_cache
def wang2023() -> tuple[Published, ...]:
    found = []
    for setting, tables in (("task_specific", ("table 1", "table 3")), ("task_agnostic", ("table 2", "table 4"))):
        for row in _rows(f"wang2023_{setting}"):
            start = row["initialised_from"]
            table = tables[0] if start in ("4,8,12", "random", "") else tables[1]
            keys = {"objective": row["objective"], "initialised_from": start, "setting": setting}
            begun = f" from {start}" if start else ""
            model = Published(
                "wang2023", f"{row['objective'].removesuffix(' (published)')}{begun} {setting.replace('_', '-')} (wang2023)", keys
            )
            titles = [title for title in row if title in _BY_TITLE]
            for title in titles:
                if setting == "task_agnostic" or _BY_TITLE[title].name not in _UNCLEAR:
                    model.scores[_key("wang2023", title)] = (float(row[title]), table)
            if setting == "task_agnostic":
                model.scores[GLUE_ALL] = (float(row["avg"]), table)
                model.averaged[GLUE_ALL] = frozenset(_BY_TITLE[title].name for title in titles)
            found.append(model)
    return tuple(found)


TABLES = {"udagawa2023": udagawa2023, "wang2023": wang2023}


def is_table(name: str) -> bool:
    return name.split(":")[0] in TABLES


def select(name: str) -> list[Published]:
    """Rows of `udagawa2023` or `wang2023`; `udagawa2023:3L:monolingual` those that have every value named, whatever its column.

    Raises:
      InputError: no such table, a value that no row has, or values that no row has together.
    """
    table, *wanted = name.split(":")
    if table not in TABLES:
        raise InputError(f"{name}: no published table {table!r}{nearest(table, TABLES)}")
    models = list(TABLES[table]())
    known = {_plain(value): value for model in models for value in model.keys.values() if value}
    for value in wanted:
        if _plain(value) not in known:
            raise InputError(f"{name}: no row of {table} has {value!r}{nearest(value, known.values())}")
        models = [model for model in models if _plain(value) in map(_plain, model.keys.values())]
    if not models:
        raise InputError(f"{name}: no row of {table} has {' and '.join(wanted)} together")
    return models


def _plain(value: str) -> str:
    return re.sub(r"[\s_-]+", "-", value.strip().lower())
