"""A task's texts as token ids, and several short texts packed into a row, so that hardly any padding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxdistill.data import TextTokenizer
from jaxdistill.tasks.read import Rows

ROW_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # few, so that few shapes are compiled


@dataclass(frozen=True)
class TaskTokens:
    """Examples with their special tokens; `types` are BERT's token types (0 elsewhere)."""

    ids: list[np.ndarray]
    types: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], np.int64)


def truncated(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of the two texts of a pair are kept when both together have `room`: the longer one loses first."""
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def encode_rows(rows: Rows, tokenizer: TextTokenizer, family: str, max_length: int) -> TaskTokens:
    """The rows as the family writes them: [CLS] a [SEP] b [SEP] for BERT, <s> a </s></s> b </s> for RoBERTa and XLM-R.

    Longer ones than `max_length` tokens are cut, of a pair the longer text first (transformers' `longest_first`).
    """
    cls, sep = np.array([tokenizer.cls_id], np.int32), np.array([tokenizer.sep_id], np.int32)
    columns = [tokenizer.encode(texts) for texts in rows.texts]
    between = [sep] if family == "bert" else [sep, sep]
    ids, types = [], []
    for texts in zip(*columns, strict=True):
        texts = [text.astype(np.int32) for text in texts]
        if len(texts) == 1:
            parts = [cls, texts[0][: max_length - 2], sep]
            ids.append(np.concatenate(parts))
            types.append(np.zeros(len(ids[-1]), np.int32))
            continue
        keep = truncated(len(texts[0]), len(texts[1]), max_length - 2 - len(between))
        head = np.concatenate([cls, texts[0][: keep[0]], between[0]])
        tail = np.concatenate([*between[1:], texts[1][: keep[1]], sep])
        ids.append(np.concatenate([head, tail]))
        types.append(np.repeat(np.array([0, family == "bert"], np.int32), [len(head), len(tail)]))
    return TaskTokens(ids, types, rows.labels)


def row_length(longest: int, limit: int) -> int:
    """The shortest usual row that holds the longest example, at most `limit` positions."""
    return min(next((length for length in ROW_LENGTHS if length >= longest), longest), limit)


def pack(lengths: Sequence[int] | np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Places of texts in rows of `length` slots: (row of each, first slot of each, number of rows). Longest first, first fit."""
    rows, starts = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int32)
    used: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        size = int(lengths[i])
        row = next((row for row, taken in enumerate(used) if taken + size <= length), len(used))
        if row == len(used):
            used.append(0)
        rows[i], starts[i] = row, used[row]
        used[row] += size
    return rows, starts, len(used)


def packed_batch(
    tokens: TaskTokens, chosen: np.ndarray, *, length: int, num_examples: int, row_step: int, num_rows: int = 0
) -> dict[str, np.ndarray]:
    """A batch of some examples, packed.

    Args:
      chosen: numbers of the examples, at most `num_examples`; what is missing has weight 0.
      row_step: the rows are a multiple of this, and at least `num_rows`: few shapes are few compilations.

    Returns:
      input_ids, token_type_ids, segment_ids [R, S] (segments count from 1 in a row, 0 is padding); row, slot [B] of each
      example's first token; labels, weight [B].
    """
    rows, starts, needed = pack([len(tokens.ids[i]) for i in chosen], length)
    num_rows = max(-(-needed // row_step) * row_step, num_rows)
    batch = {name: np.zeros((num_rows, length), np.int32) for name in ("input_ids", "token_type_ids", "segment_ids")}
    segments = [0] * num_rows
    for i in np.argsort(starts, kind="stable"):  # numbered in the order of their slots
        row, start, example = rows[i], starts[i], chosen[i]
        segments[row] += 1
        place = slice(start, start + len(tokens.ids[example]))
        batch["input_ids"][row, place] = tokens.ids[example]
        batch["token_type_ids"][row, place] = tokens.types[example]
        batch["segment_ids"][row, place] = segments[row]
    missing = (0, num_examples - len(chosen))
    batch |= {"row": np.pad(rows, missing), "slot": np.pad(starts, missing), "labels": np.pad(tokens.labels[chosen], missing)}
    batch["weight"] = np.pad(np.ones(len(chosen), np.float32), missing)
    return batch
