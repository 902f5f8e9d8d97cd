"""A token store as batches: rows by number, in the order that (seed, step) decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxdistill.data import layout
from jaxdistill.data.order import RowOrder
from jaxdistill.errors import InputError

READ_THREADS = 2  # reading is memory-bound: more threads do not make it faster
PREFETCHED_BATCHES = 8

Batch = dict[str, np.ndarray]  # input_ids, attention_mask (1 = real token) and segment_ids (0 = padding), each int32 [B, S]


@runtime_checkable
class RowSource(Protocol):
    """What a run reads its rows from, of the splits `train` and `held_out`: a token store, or a task's examples."""

    fingerprint: str
    sequence_length: int

    def num_rows(self, split: str) -> int: ...

    def source_rows(self, split: str) -> tuple[int, ...]: ...

    def read_batch(self, split: str, row_numbers: np.ndarray) -> Batch: ...


class _Split:
    """The rows of one split over all part files, numbered from 0 in the order of the manifest."""

    def __init__(self, folder: Path, manifest: dict, split: str):
        sequence_length = manifest["sequence_length"]
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        starts = [0]
        for part in manifest["parts"]:
            num_rows = part["rows"][split]
            if num_rows == 0:
                continue
            arrays = []
            for kind, dtype in (("tokens", np.dtype(manifest["dtype"])), ("segments", np.dtype("<u2"))):
                path = folder / layout.row_file(part["source"], part["part"], split, kind)
                expected = num_rows * sequence_length * dtype.itemsize
                size = path.stat().st_size if path.is_file() else None
                if size != expected:
                    found = "missing" if size is None else f"{size} bytes instead of {expected}"
                    raise InputError(f"{path}: {found}; the token store is damaged: delete {folder} and prepare it again")
                # Plain arrays: a row taken from np.memmap is again a memmap, which costs more than the reading.
                arrays.append(np.asarray(np.memmap(path, dtype, mode="r", shape=(num_rows, sequence_length))))
            self.parts.append((arrays[0], arrays[1]))
            starts.append(starts[-1] + num_rows)
        self.starts = np.array(starts)


class TokenStore:
    """A complete token store, open for reading; `manifest` says what it was made from and what it holds."""

    def __init__(self, folder: str | Path):
        """Raises InputError when there is no complete store in `folder`, or a file of it is missing or truncated."""
        self.folder = Path(folder)
        manifest = layout.read_manifest(self.folder)
        if manifest is None:
            raise InputError(f"{self.folder}: no complete token store there; run prepare")
        if manifest["version"] != layout.VERSION:
            raise InputError(f"{self.folder}: a token store of version {manifest['version']}, this is {layout.VERSION}; run prepare")
        self.manifest = manifest
        self.sequence_length: int = manifest["sequence_length"]
        self.fingerprint: str = manifest["fingerprint"]
        self._splits = {split: _Split(self.folder, manifest, split) for split in layout.SPLITS}

    def num_rows(self, split: str) -> int:
        return int(self._splits[split].starts[-1])

    def source_rows(self, split: str) -> tuple[int, ...]:
        """How many rows each source has; they lie one source after the other."""
        return tuple(source["rows"][split] for source in self.manifest["sources"])

    def read_rows(self, split: str, row_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of the rows, int32 [n, S] each; IndexError for a number outside of the split."""
        row_numbers = np.asarray(row_numbers, np.int64)
        starts, parts = self._splits[split].starts, self._splits[split].parts
        if len(row_numbers) and not 0 <= row_numbers.min() <= row_numbers.max() < starts[-1]:
            raise IndexError(f"row numbers of {split} go from 0 to {starts[-1] - 1}")
        part_numbers = np.searchsorted(starts, row_numbers, side="right") - 1
        by_part = np.argsort(part_numbers, kind="stable")
        used, firsts = np.unique(part_numbers[by_part], return_index=True)
        tokens, segments = (np.empty((len(row_numbers), self.sequence_length), np.int32) for _ in range(2))
        for part, first, end in zip(used, firsts, np.append(firsts, len(by_part))[1:], strict=True):
            places = by_part[first:end]
            rows = row_numbers[places] - starts[part]
            tokens[places] = parts[part][0][rows]
            segments[places] = parts[part][1][rows]
        return tokens, segments

    def read_batch(self, split: str, row_numbers: np.ndarray) -> Batch:
        """The rows as a batch."""
        tokens, segments = self.read_rows(split, row_numbers)
        return {"input_ids": tokens, "attention_mask": (segments > 0).astype(np.int32), "segment_ids": segments}


def batches(
    store: RowSource, order: RowOrder, *, batch_size: int, start_step: int, num_steps: int, rows: slice | np.ndarray = slice(None)
) -> Iterator[Batch]:
    """The batches of training steps start_step, start_step + 1, ... (`num_steps` of them), read ahead by Grain.

    Step s holds the samples s * batch_size to (s + 1) * batch_size - 1 of `order`, whatever start_step is.

    Args:
      batch_size: rows of the global batch.
      rows: which rows of each global batch to read: this process's share.
    """
    import grain

    if order.rows_per_epoch != store.num_rows("train"):
        raise ValueError(f"the order is one of {order.rows_per_epoch} rows, the store has {store.num_rows('train')} to train on")
    samples = np.arange(batch_size)[rows]

    # Grain's element is the whole batch: row by row it is a hundred times slower.
    def read(step: int) -> Batch:
        return store.read_batch("train", order.rows(step * batch_size + samples))

    steps = grain.MapDataset.range(start_step, start_step + num_steps)
    return iter(steps.map(read).to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES)))


def held_out_rows(store: RowSource, limit: int) -> np.ndarray:
    """At most `limit` row numbers spread evenly over the held-out part, int64; always the same ones."""
    num_rows = store.num_rows("held_out")
    count = min(limit, num_rows)
    return np.arange(count) * num_rows // max(count, 1)
