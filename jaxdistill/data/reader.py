"""A token store as batches: rows by number, in the order that (seed, step) decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxdistill.config import DataConfig
from jaxdistill.data import layout
from jaxdistill.data.files import LocalFiles, RemoteFiles, Rows
from jaxdistill.data.manifest import DAMAGED, check_manifest
from jaxdistill.data.order import RowOrder
from jaxdistill.data.tokenizer import TextTokenizer
from jaxdistill.errors import InputError
from jaxdistill.urls import is_url, local_path

READ_THREADS = 2  # reading is memory-bound: more threads do not make it faster
REMOTE_THREADS = 8  # of object storage, where a batch waits for its slowest request

Batch = dict[str, np.ndarray]  # input_ids, attention_mask (1 = real token) and segment_ids (0 = padding), each int32 [B, S]


@runtime_checkable
class RowSource(Protocol):
    """What a run reads its rows from, of the splits `train` and `held_out`: a token store, a stream, or a task's examples."""

    fingerprint: str
    sequence_length: int

    def num_rows(self, split: str) -> int: ...

    def source_rows(self, split: str) -> tuple[int, ...]: ...

    def read_batch(self, split: str, row_numbers: np.ndarray) -> Batch: ...


class _Split:
    """The rows of one split over all part files, numbered from 0 in the order of the manifest."""

    def __init__(self, parts: list[dict], split: str):
        self.parts = [part for part in parts if part["rows"][split]]
        self.names = [{kind: layout.row_file(part, split, kind) for kind in layout.KINDS} for part in self.parts]
        self.starts = np.cumsum([0, *(part["rows"][split] for part in self.parts)])


class TokenStore:
    """A complete token store, open for reading; `manifest` says what it was made from and what it holds.

    Every row that is read is compared with its checksum.
    """

    def __init__(self, folder: str | Path):
        """A folder, or a URL that fsspec knows (gs://, s3://, hf://, ...).

        Raises:
          InputError: no complete store there, a file of it is missing or truncated (of a folder), it cannot be reached (a URL).
        """
        self._files = RemoteFiles(str(folder)) if is_url(folder) else LocalFiles(local_path(folder))
        self.folder = self._files.place
        manifest = self._files.manifest()
        if manifest is None:
            raise InputError(f"{self.folder}: no complete token store there; run prepare")
        check_manifest(manifest, f"{self.folder}/{layout.MANIFEST}")
        self.manifest = manifest
        self.sequence_length: int = manifest["sequence_length"]
        self.fingerprint: str = manifest["fingerprint"]
        self._splits = {split: _Split(manifest["parts"], split) for split in layout.SPLITS}
        self._check_sizes()

    @property
    def remote(self) -> bool:
        return isinstance(self._files, RemoteFiles)

    def _empty_rows(self, count: int) -> Rows:
        shape = (count, self.sequence_length)
        return {
            "tokens": np.empty(shape, self.manifest["dtype"]), "segments": np.empty(shape, "<u2"), "crc": np.empty((count,), "<u4"),
        }  # fmt: skip

    def _check_sizes(self) -> None:
        sizes, one = self._files.sizes(), {kind: rows.nbytes for kind, rows in self._empty_rows(1).items()}
        for split, parts in self._splits.items() if sizes is not None else ():
            for part, names in zip(parts.parts, parts.names, strict=True):
                for kind, name in names.items():
                    expected, size = part["rows"][split] * one[kind], sizes.get(name)
                    if size != expected:
                        found = "missing" if size is None else f"{size} bytes instead of {expected}"
                        raise InputError(f"{self.folder}/{name}: {found}; {DAMAGED}")

    def num_rows(self, split: str) -> int:
        return int(self._splits[split].starts[-1])

    def source_rows(self, split: str) -> tuple[int, ...]:
        """How many rows each source has; they lie one source after the other."""
        return tuple(source["rows"][split] for source in self.manifest["sources"])

    def read_rows(self, split: str, row_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments of the rows, int32 [n, S] each.

        Raises:
          IndexError: a number outside of the split.
          InputError: a row differs from its checksum, or cannot be read.
        """
        row_numbers, parts = np.asarray(row_numbers, np.int64), self._splits[split]
        if len(row_numbers) and not 0 <= row_numbers.min() <= row_numbers.max() < parts.starts[-1]:
            raise IndexError(f"row numbers of {split} go from 0 to {parts.starts[-1] - 1}")
        part_numbers = np.searchsorted(parts.starts, row_numbers, side="right") - 1
        rows, found = row_numbers - parts.starts[part_numbers], self._empty_rows(len(row_numbers))
        self._files.read(parts.names, part_numbers, rows, found)
        wrong = np.flatnonzero(layout.row_checksums(found["tokens"], found["segments"]) != found["crc"])
        if len(wrong):
            name, row = parts.names[part_numbers[wrong[0]]]["tokens"], rows[wrong[0]]
            raise InputError(f"{self.folder}/{name}: row {row} differs from its checksum; {DAMAGED}")
        return found["tokens"].astype(np.int32), found["segments"].astype(np.int32)

    def read_batch(self, split: str, row_numbers: np.ndarray) -> Batch:
        """The rows as a batch."""
        tokens, segments = self.read_rows(split, row_numbers)
        return {"input_ids": tokens, "attention_mask": (segments > 0).astype(np.int32), "segment_ids": segments}


def batches(
    store: RowSource,
    order: RowOrder,
    *,
    batch_size: int,
    start_step: int,
    num_steps: int,
    rows: slice | np.ndarray = slice(None),
    languages: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[Batch]:
    """The batches of training steps start_step, start_step + 1, ... (`num_steps` of them), read ahead by Grain.

    Step s holds the samples s * batch_size to (s + 1) * batch_size - 1 of `order`, whatever start_step is.

    Args:
      batch_size: rows of the global batch.
      rows: which rows of each global batch to read: this process's share.
      languages: row numbers of the store -> the number of each row's language, which the batch holds as `languages` then.
    """
    import grain

    if order.rows_per_epoch != store.num_rows("train"):
        raise ValueError(f"the order is one of {order.rows_per_epoch} rows, the store has {store.num_rows('train')} to train on")
    samples = np.arange(batch_size)[rows]

    # Grain's element is the whole batch: row by row it is a hundred times slower.
    def read(step: int) -> Batch:
        numbers = order.rows(step * batch_size + samples)
        batch = store.read_batch("train", numbers)
        return batch | {"languages": languages(numbers)} if languages else batch

    threads = REMOTE_THREADS if isinstance(store, TokenStore) and store.remote else READ_THREADS
    steps = grain.MapDataset.range(start_step, start_step + num_steps)
    return iter(steps.map(read).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)))


def open_remote(data: DataConfig, url: str, *, tokenizer: TextTokenizer, expected: str | None = None) -> TokenStore | None:
    """The finished token store at a URL, as it lies: its text is not read again, so it need not be here. None: there is none.

    Args:
      expected: fingerprint of the store that a run began with.

    Raises:
      InputError: a store of another tokenizer, row length, held-out share or number of sources.
    """
    if RemoteFiles(url).manifest() is None:
        return None
    store = TokenStore(url)
    made = {
        "data.tokenizer": (store.manifest["tokenizer"]["fingerprint"], tokenizer.fingerprint),
        "data.sequence_length": (store.sequence_length, data.sequence_length),
        "data.held_out": (store.manifest["held_out"], data.held_out),
        "data.sources": (len(store.manifest["sources"]), len(data.sources or ())),
    }
    for field, (there, wanted) in made.items():
        if there != wanted:
            raise InputError(f"{field}: the token store at {store.folder} was made with {there}, this config has {wanted}")
    if expected not in (None, store.fingerprint):
        raise InputError(f"data.store: {store.folder} is not the token store that the run began with; --overwrite begins anew")
    return store


def held_out_rows(store: RowSource, limit: int) -> np.ndarray:
    """At most `limit` row numbers spread evenly over the held-out part, int64; always the same ones."""
    num_rows = store.num_rows("held_out")
    count = min(limit, num_rows)
    return np.arange(count) * num_rows // max(count, 1)
