"""A task's rows as a run of distillation reads them: one example a row, padded on the right, with its label.

A task is small: it is tokenised at the start and held in memory, where a text has a token store on disk.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from jaxdistill.config import TaskConfig
from jaxdistill.data import Batch, TextTokenizer
from jaxdistill.errors import InputError, nearest
from jaxdistill.tasks.catalogue import TASKS, Split, Task
from jaxdistill.tasks.read import Rows, read_split
from jaxdistill.tasks.tokens import TaskTokens, encode_rows


def find_task(name: str) -> Task:
    """The task of `data.task`.

    Raises:
      InputError: an unknown name.
    """
    if name not in TASKS:
        raise InputError(f"data.task.name: unknown task {name!r}{nearest(name, TASKS)}")
    return TASKS[name]


def _read(config: TaskConfig, task: Task, split: Split) -> Rows:
    try:
        return read_split(task, split, config.data)
    except InputError as error:
        raise InputError(f"data.task.data: {str(error).removeprefix('data: ')}") from None


def num_training_rows(config: TaskConfig) -> int:
    """How many rows an epoch has; reads the split, tokenises nothing.

    Raises:
      InputError: from `read_split`.
    """
    task = find_task(config.name)
    num_rows = len(_read(config, task, task.train))
    return min(config.train_limit or num_rows, num_rows)


class TaskStore:
    """Rows of a task with the surface of a `TokenStore`: `train`, and as `held_out` the task's first test split.

    `fingerprint` is the hash of every token and label: of all that the batches depend on.
    """

    def __init__(self, splits: dict[str, TaskTokens], *, pad_id: int, sequence_length: int):
        self.sequence_length = sequence_length
        self._splits, self._pad_id = splits, pad_id
        digest = hashlib.sha256(json.dumps({"version": 1, "sequence_length": sequence_length, "pad_id": pad_id}).encode())
        for name, tokens in splits.items():
            digest.update(f"{name} {len(tokens)} {tokens.labels.dtype.str}".encode())
            for arrays in (tokens.ids, tokens.types, [tokens.lengths, tokens.labels]):
                for array in arrays:
                    digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()

    def num_rows(self, split: str) -> int:
        return len(self._splits[split])

    def source_rows(self, split: str) -> tuple[int, ...]:
        """A task is one source."""
        return (self.num_rows(split),)

    def read_batch(self, split: str, row_numbers: np.ndarray) -> Batch:
        """The rows as a batch: input_ids, token_type_ids, attention_mask and segment_ids [n, S]; labels [n].

        Raises:
          IndexError: a number outside of the split.
        """
        tokens, numbers = self._splits[split], np.asarray(row_numbers, np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(tokens):
            raise IndexError(f"row numbers of {split} go from 0 to {len(tokens) - 1}")
        ids = np.full((len(numbers), self.sequence_length), self._pad_id, np.int32)
        types, real = np.zeros_like(ids), np.zeros_like(ids)
        for row, number in enumerate(numbers):
            length = len(tokens.ids[number])
            ids[row, :length], types[row, :length], real[row, :length] = tokens.ids[number], tokens.types[number], 1
        return {
            "input_ids": ids, "token_type_ids": types, "attention_mask": real, "segment_ids": real, "labels": tokens.labels[numbers],
        }  # fmt: skip


def open_task(config: TaskConfig, *, tokenizer: TextTokenizer, family: str, sequence_length: int) -> TaskStore:
    """Read and tokenise a task: its training split, and the first of its test splits (GLUE: the dev set).

    Args:
      family: bert, roberta or xlm-roberta: how a pair of texts is written.

    Raises:
      InputError: from `read_split`.
    """
    task = find_task(config.name)
    found = {}
    for name, split in (("train", task.train), ("held_out", next(iter(task.tests.values())))):
        rows = _read(config, task, split)
        if name == "train" and config.train_limit:
            rows = rows.sample(config.train_limit)
        found[name] = encode_rows(rows, tokenizer, family, sequence_length)
    return TaskStore(found, pad_id=tokenizer.pad_id, sequence_length=sequence_length)
