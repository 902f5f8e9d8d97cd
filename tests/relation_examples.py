"""Vectors, masks and segments for the relation losses, and their values in numpy float64, one text and head at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Texts of rows of 14 slots, with room on either side, and packed; both have an empty row.
TEXTS = [[9], [4], [0], [1]]
PACKED = [[7, 5, 2], [3, 1, 9], [14], [0]]


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


def spoil_padding(vectors: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """NaN and infinity in every padded slot."""
    spoilt = vectors.copy()
    spoilt[segments == 0] = np.resize(np.float32([np.nan, np.inf, -np.inf]), vectors.shape[-1])
    return spoilt


def places_of_texts(segments: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(row, slots) of every text."""
    return [(row, np.nonzero(own == n)[0]) for row, own in enumerate(segments) for n in sorted(set(own.tolist()) - {0})]


def one_text_a_row(vectors: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Every text in a row of its own, zeros behind it."""
    rows = np.zeros((len(places_of_texts(segments)), *vectors.shape[1:]), vectors.dtype)
    for text, (row, own) in zip(rows, places_of_texts(segments), strict=True):
        text[: len(own)] = vectors[row, own]
    return rows


def assert_close(ours, reference, tolerance=1e-5):
    """Relative to each number, or to the largest."""
    reference = np.asarray(reference)
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance * max(np.abs(reference).max(), 1e-12))


def scores_by_loops(side, segments, num_heads: int, scaled: bool = True) -> Iterator[np.ndarray]:
    """Scores [n, n] of every text and head. `side` is vectors, or (queries, keys)."""
    queries, keys = (np.asarray(x, np.float64) for x in (side if isinstance(side, tuple) else (side, side)))
    size = queries.shape[-1] // num_heads
    for row, places in places_of_texts(segments):
        for head in range(num_heads):
            numbers = slice(head * size, (head + 1) * size)
            yield queries[row, places, numbers] @ keys[row, places, numbers].T / (np.sqrt(size) if scaled else 1.0)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(axis=-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


def divergence_by_loops(student, teacher, segments, num_heads: int) -> tuple[float, int]:
    """(sum, count) of the KL, written as the definition says it."""
    total, count = 0.0, 0
    for scores in zip(*(scores_by_loops(side, segments, num_heads) for side in (teacher, student)), strict=True):
        logs = [log_softmax(x) for x in scores]
        total += (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
        count += len(logs[0])
    return total, count


def squares_by_loops(student, teacher, segments, num_heads: int, scaled: bool = False) -> tuple[float, int]:
    """(sum, count) of the squared differences of scores."""
    total, count = 0.0, 0
    for teachers, students in zip(*(scores_by_loops(side, segments, num_heads, scaled) for side in (teacher, student)), strict=True):
        total += ((students - teachers) ** 2).sum()
        count += students.size
    return total, count


def finite_difference(value, vectors: np.ndarray, place: tuple[int, ...], step: float = 1e-5) -> float:
    """Central, of `value(vectors)` in float64."""
    ends = []
    for sign in (1, -1):
        moved = vectors.astype(np.float64)
        moved[place] += sign * step
        ends.append(value(moved))
    return (ends[0] - ends[1]) / (2 * step)
