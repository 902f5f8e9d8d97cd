"""Tiny tasks in a folder of the layout that the Hub's datasets have."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_texts import make_texts

from jaxdistill.tasks import TASKS


def write_rows(data: Path, task: str, split: str, count: int, seed: int = 0, longest: int = 14) -> None:
    """data/glue/<task>/<split>.jsonl, labels in turn."""
    own = TASKS[task]
    columns = [make_texts(count, seed=10 * seed + i, longest=longest) for i in range(len(own.columns))]
    labels = [i % own.num_labels if own.labels else (i % 11) / 2 for i in range(count)]
    rows = [dict(zip((*own.columns, "label"), row, strict=True)) for row in zip(*columns, labels, strict=True)]
    folder = data / "glue" / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
