"""Vectors, masks and segments for the relation losses, and the divergence in numpy float64, one query at a time."""

from __future__ import annotations

import numpy as np


def make_vectors(batch: int, length: int, student: int, teacher: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(0, 1, (batch, length, width)).astype(np.float32) for width in (student, teacher))


def make_segments(texts: list[list[int]], length: int, first: int = 0) -> np.ndarray:
    """Rows [B, S] of texts of these lengths, side by side from slot `first` on; 0 is padding."""
    rows = np.zeros((len(texts), length), np.int32)
    for row, lengths in zip(rows, texts, strict=True):
        numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[first : first + len(numbers)] = numbers
    return rows


def divergence_by_loops(student, teacher, segments, num_relation_heads: int) -> tuple[float, int]:
    """(sum, count) of the KL, written as the definition says it."""
    total, count = 0.0, 0
    for row in range(len(segments)):
        for text in set(segments[row].tolist()) - {0}:
            (places,) = np.nonzero(segments[row] == text)
            for head in range(num_relation_heads):
                logs = []
                for vectors in (teacher, student):
                    size = vectors.shape[-1] // num_relation_heads
                    own = np.asarray(vectors, np.float64)[row, places, head * size : (head + 1) * size]
                    scores = own @ own.T / np.sqrt(size)
                    scores -= scores.max(axis=-1, keepdims=True)
                    logs.append(scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)))
                total += (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
                count += len(places)
    return total, count
