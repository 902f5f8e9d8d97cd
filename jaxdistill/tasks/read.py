"""Rows of a task's split, from a folder in the layout of the Hub's datasets or from the Hub."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import RowOrder
from jaxdistill.errors import InputError
from jaxdistill.tasks.catalogue import Split, Task

HUB = {"glue": "nyu-mll/glue", "xnli": "facebook/xnli", "snli": "stanfordnlp/snli"}


class MissingSplit(InputError):
    """A split is not there: the task can be left out, where others are."""


@dataclass(frozen=True)
class Rows:
    """Checked rows: a list of texts for each column, and their labels (int32, float32 of a regression)."""

    texts: tuple[list[str], ...]
    labels: np.ndarray
    unlabelled: int = 0  # rows without a gold label, which are left out

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Hash of every text and label."""
        digest = hashlib.sha256(self.labels.tobytes())
        for column in self.texts:
            for text in column:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def sample(self, limit: int) -> Rows:
        """At most this many rows, a random subset that is always the same, in the order of the file."""
        if limit >= len(self):
            return self
        chosen = np.sort(RowOrder((len(self),), None, 0).rows(np.arange(limit)))
        return replace(self, texts=tuple([column[i] for i in chosen] for column in self.texts), labels=self.labels[chosen])


def read_split(task: Task, split: Split, data: str | None = None) -> Rows:
    """Every row of a split; rows labelled -1 (SNLI's pairs without a consensus) are left out and counted.

    Args:
      data: folder that holds SUITE/NAME/SPLIT-*.parquet (or .parquet, .jsonl), NAME/SPLIT-* or SPLIT-*; None: the Hub.

    Raises:
      MissingSplit: no such split there.
      InputError: a folder that is none, without the task's columns, without a row, a label outside of the task's range, a
        text that is none.
    """
    columns, where = _read_hub(task, split) if data is None else _read_folder(task, split, Path(os.path.expanduser(data)))
    wanted = [*task.columns, "label"]
    if lacking := [name for name in wanted if name not in columns]:
        raise InputError(f"{where}: no column {lacking[0]!r} for {task.name}, which has {', '.join(wanted)}; found {', '.join(columns)}")
    texts = tuple(columns[name] for name in task.columns)
    for name, column in zip(task.columns, texts, strict=True):
        for number, text in enumerate(column):
            if not isinstance(text, str):
                raise InputError(f"{where}: row {number} of {name!r} holds {type(text).__name__}, not text")
    labels = _checked_labels(task, columns["label"], where)
    gold = np.ones(len(labels), bool) if task.range else labels >= 0
    if not gold.any():
        what = "no row" if len(gold) == 0 else "no labelled row (all are -1, as in GLUE's hidden test sets)"
        raise InputError(f"{where}: {what} in split {split.split!r} of {task.name}")
    kept = tuple([text for text, good in zip(column, gold, strict=True) if good] for column in texts)
    return Rows(kept, labels[gold], int((~gold).sum()))


def _checked_labels(task: Task, values: list[Any], where: str) -> np.ndarray:
    if task.range:
        low, high = task.range
        for number, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{where}: row {number} has label {value!r}; {task.name} has numbers from {low:g} to {high:g}")
        return np.asarray(values, np.float32)
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < task.num_labels:
            named = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
            raise InputError(f"{where}: row {number} has label {value!r}; {task.name} has {named} (and -1: unlabelled)")
    return np.asarray(values, np.int32)


def _read_folder(task: Task, split: Split, data: Path) -> tuple[dict[str, list], str]:
    if not data.is_dir():
        raise InputError(f"data: {data} is no folder; give one in the layout of {HUB[split.suite]}, or leave data out for the Hub")
    places = [data / split.suite / split.name, data / split.name] if split.name else [data / split.suite]
    if data.name == split.suite and not split.name:
        places.append(data)
    for place in places:
        found = (sorted(place.glob(split.split + ending)) for ending in ("-*.parquet", ".parquet", "-*.jsonl", ".jsonl"))
        files = next(filter(None, found), [])  # of several forms the first: a copy is no further half
        if files:
            parts = [_read_file(file) for file in files]
            for file, part in zip(files, parts, strict=True):
                if set(part) != set(parts[0]):
                    raise InputError(f"{file}: columns {', '.join(part)}, and {files[0].name} has {', '.join(parts[0])}")
            columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
            return columns, str(files[0] if len(files) == 1 else place)
    named = "/".join(filter(None, (split.suite, split.name)))
    raise MissingSplit(f"{data}: no split {split.split!r} of {task.name} ({named}/{split.split}-*.parquet or .jsonl)")


def _read_file(file: Path) -> dict[str, list]:
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(file).to_pydict()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{file}: cannot be read as parquet: {error}") from None
    columns: dict[str, list] = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or (columns and set(row) != set(columns)):
                raise InputError(f"{file}:{number}: not a JSON object with the fields of the first line")
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return columns


def _read_hub(task: Task, split: Split) -> tuple[dict[str, list], str]:
    import datasets

    where = "/".join(filter(None, (HUB[split.suite], split.name, split.split)))
    try:
        table = datasets.load_dataset(HUB[split.suite], split.name or None, split=split.split)
        return {name: list(table[name]) for name in table.column_names}, where
    except Exception as error:  # as many types as there are storage clients under it
        raise InputError(
            f"{where}: the dataset of the Hub cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}; "
            f"check the network, or give a folder of the same layout with data="
        ) from error
