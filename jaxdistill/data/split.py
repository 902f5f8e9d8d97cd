"""Which documents are held out, and documents in batches with that said of each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator


def is_held_out(text: bytes, held_out: float) -> bool:
    """Whether a document belongs to the held-out part: its text decides alone, wherever and in whatever order it is read."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < held_out * 2**64


def next_batch(documents: Iterator[str], num_bytes: int, held_out: float) -> tuple[list[str], list[str], int]:
    """The next documents until they have `num_bytes` of UTF-8 or more: their texts, their splits and their size in bytes."""
    texts: list[str] = []
    splits: list[str] = []
    size = 0
    for document in documents:
        utf8 = document.encode()
        texts.append(document)
        splits.append("held_out" if is_held_out(utf8, held_out) else "train")
        size += len(utf8)
        if size >= num_bytes:
            break
    return texts, splits, size
