"""Tiny tasks as folders in the layout of the Hub's datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tiny_texts import make_texts

from jaxdistill.tasks import TASKS


def task_columns(name: str, count: int, seed: int = 0) -> dict[str, list]:
    task, rng = TASKS[name], np.random.default_rng(seed)
    columns: dict[str, list] = {column: make_texts(count, seed=seed + i, longest=6) for i, column in enumerate(task.columns)}
    labels = rng.uniform(*task.range, count).round(2).tolist() if task.range else rng.integers(0, task.num_labels, count).tolist()
    return columns | {"label": labels}


def write_split(folder: Path, split: str, columns: dict[str, list]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}-00000-of-00001.parquet")


def write_task(data: Path, name: str, *, train: int = 24, test: int = 14) -> Path:
    """DATA/NAME with every split of a GLUE task; a seed of its own for each."""
    task = TASKS[name]
    write_split(data / name, "train", task_columns(name, train, 1))
    for i, split in enumerate(task.tests.values()):
        write_split(data / name, split.split, task_columns(name, test, 2 + i))
    return data


def write_lines(file: Path, columns: dict[str, list]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
