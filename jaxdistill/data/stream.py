"""Text that is tokenised while the run goes on, for corpora larger than the disk: no token store is made.

Training rows come in windows of a fixed number. A window holds the next rows of every source, as many of each as its weight says, and
is shuffled whole; it is a pure function of the text, so batches are pure functions of (seed, step) as those of a token store are. A
small index beside the run says where in the text each window begins: it saves a resume the tokenising of everything before, no more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import processes
from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data.order import RowOrder, shares
from jaxdistill.data.source_files import source_files
from jaxdistill.data.source_rows import PART_BYTES, RowMaker, SourceRows
from jaxdistill.data.sources import DocumentCounts, read_documents, source_fingerprint
from jaxdistill.data.split import is_held_out
from jaxdistill.data.tokenizer import TextTokenizer
from jaxdistill.errors import InputError

VERSION = 1
HELD_OUT_BYTES = 4 << 30  # of a source, read at most in search of held-out documents


class _Index:
    """Where each window begins and what its rows are, a line each. Only the main process writes."""

    def __init__(self, path: Path, num_sources: int):
        self.path = path
        self.windows: dict[int, tuple[list[list[int]], str]] = {}
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        for line in lines:
            try:
                number, marks, digest = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue  # torn by a kill: that window is made from the one before
            if _are_marks(marks, num_sources) and type(number) is int and isinstance(digest, str):
                self.windows[number] = (marks, digest)

    def nearest(self, number: int) -> int | None:
        """The last known window that is not after this one."""
        return max((known for known in self.windows if known <= number), default=None)

    def note(self, number: int, marks: list[list[int]], digest: str) -> None:
        """Writes down a window, or compares one that was made before.

        Raises:
          InputError: its rows are not those of then, or the index cannot be written.
        """
        if number in self.windows:
            if self.windows[number] != (marks, digest):
                raise InputError(
                    f"data.sources: the rows of window {number} are not those that the run read: the text changed since. Begin anew with "
                    f"--overwrite (or, if only {self.path} was damaged, delete that)"
                )
            return
        self.windows[number] = (marks, digest)
        if processes.is_main():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    # On a line of its own, whatever a kill left of the last.
                    file.write(("\n" if file.tell() else "") + json.dumps([number, marks, digest]))
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error


def _are_marks(value: Any, num_sources: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_sources
        and all(isinstance(mark, list) and len(mark) == 4 and all(type(n) is int and n >= 0 for n in mark) for mark in value)
    )


def _in_background(work: Callable[[], Any]) -> Future:
    """The future of `work` in a thread that does not keep the process from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="stream").start()
    return future


class TextStream:
    """A text as a source of rows: `train` is a window of rows, another one each epoch; `held_out` is from the beginning of the text.

    `fingerprint` is that of the tokenizer, of the sizes of the files (or the commits of datasets) and of what else the rows depend on:
    the text itself is read only once, and what a resume reads again is compared by its rows.
    """

    def __init__(self, data: DataConfig, tokenizer: TextTokenizer, folder: Path, *, batch_size: int, held_out_rows: int):
        self._data, self._tokenizer, self._held_out_rows = data, tokenizer, held_out_rows
        self.sequence_length = data.sequence_length
        window = -(-data.window // batch_size) * batch_size
        weights = [source.weight or 1.0 for source in data.sources]
        self._counts = tuple(shares(window, weights))
        if 0 in self._counts:
            number = self._counts.index(0)
            raise InputError(
                f"data.sources.{number}.weight: its share of a window of {window} rows is less than one row; raise data.window"
            )
        contents = [_content(source) for source in data.sources]
        depends_on = {
            "version": VERSION,
            "part_bytes": PART_BYTES,
            "counts": self._counts,
            "tokenizer": [tokenizer.fingerprint, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.vocab_size],
            "sources": [[source.format, source.column, content] for source, content in zip(data.sources, contents, strict=True)],
            "sequence_length": data.sequence_length,
            "held_out": data.held_out,
        }
        self.fingerprint = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self._index_path = folder / f"stream-{self.fingerprint[:16]}.jsonl"

    def num_rows(self, split: str) -> int:
        """Of `train` those of a window."""
        return sum(self.source_rows(split))

    def source_rows(self, split: str) -> tuple[int, ...]:
        return self._counts if split == "train" else tuple(len(rows[0]) for rows in self._held_out)

    def read_batch(self, split: str, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Held-out rows as a batch."""
        if split != "held_out":
            raise ValueError("the training rows of a stream have no numbers; take `batches`")
        tokens, segments = (np.concatenate(arrays)[row_numbers] for arrays in zip(*self._held_out, strict=True))
        return _batch(tokens, segments)

    @cached_property
    def _held_out(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The first held-out rows of each source in proportion to its weight, found by reading the text from its beginning."""
        maker = RowMaker(self._data, self._tokenizer, threading.Event())
        found = []
        for source, wanted in zip(self._data.sources, shares(self._held_out_rows, self._counts), strict=True):
            rows = maker.rows(self._held_out_documents(source, wanted) if wanted and self._data.held_out else iter(()))
            found.append((rows[0][:wanted], rows[1][:wanted]))
        if self._data.held_out and not any(len(rows[0]) for rows in found):
            raise InputError(
                f"data.held_out: no document of the text's beginning falls into the share {self._data.held_out}; raise it, or 0"
            )
        return found

    def _held_out_documents(self, source: SourceConfig, num_rows: int) -> Iterator[str]:
        slots, num_bytes = num_rows * self.sequence_length, HELD_OUT_BYTES
        for document in read_documents(source, DocumentCounts()):
            text = document.encode()
            num_bytes -= len(text)
            if is_held_out(text, self._data.held_out):
                yield document
                slots -= len(self._tokenizer.encode([document])[0])  # tokenised twice: they are few
            if slots <= 0 or num_bytes <= 0:
                return

    def batches(
        self,
        order: RowOrder,
        *,
        batch_size: int,
        start_step: int,
        num_steps: int,
        rows: slice | np.ndarray = slice(None),
        languages: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """As `data.batches` of a token store; the next window is made in the background while one is read."""
        stop = threading.Event()
        windows = self._windows(start_step * batch_size // order.rows_per_epoch, stop)
        samples, current, coming = np.arange(batch_size)[rows], None, _in_background(lambda: next(windows))
        try:
            for step in range(start_step, start_step + num_steps):
                number = step * batch_size // order.rows_per_epoch
                if number != current:
                    current, (tokens, segments) = number, coming.result()
                    last = (start_step + num_steps) * batch_size - 1
                    if number < last // order.rows_per_epoch:
                        coming = _in_background(lambda: next(windows))
                places = order.rows(step * batch_size + samples)
                batch = _batch(tokens[places], segments[places])
                yield batch | {"languages": languages(places)} if languages else batch
        finally:
            stop.set()

    def _windows(self, number: int, stop: threading.Event) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens and segments of window `number` and those after it, the sources' rows one after the other."""
        index, maker = _Index(self._index_path, len(self._counts)), RowMaker(self._data, self._tokenizer, stop)
        known = index.nearest(number)
        marks = index.windows[known][0] if known is not None else [[0, 0, 0, 0]] * len(self._counts)
        sources = [SourceRows(maker, i, tuple(mark[:3]), mark[3]) for i, mark in enumerate(marks)]
        for current in itertools.count(known or 0):
            marks = [source.mark() for source in sources]
            taken = [source.take(count) for source, count in zip(sources, self._counts, strict=True)]
            tokens, segments = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
            digest = hashlib.blake2b(tokens, digest_size=16)
            digest.update(segments)
            index.note(current, marks, digest.hexdigest())
            if current >= number:
                yield tokens, segments


def _batch(tokens: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    segments = segments.astype(np.int32)
    return {"input_ids": tokens.astype(np.int32), "attention_mask": (segments > 0).astype(np.int32), "segment_ids": segments}


def _content(source: SourceConfig) -> dict[str, Any]:
    """What identifies the source without reading it: names and sizes of files, the commit of a dataset."""
    if source.path is None:
        return source_fingerprint(source)
    return {"files": [[file.name, file.size] for file in source_files(source)]}


def open_stream(data: DataConfig, *, tokenizer: TextTokenizer, folder: Path, batch_size: int, held_out_rows: int) -> TextStream:
    """The text as a stream; reads none of it yet.

    Args:
      folder: of the index, made when there is something to write.
      batch_size: rows of a global batch; a window is `data.window` rows, rounded up to whole batches.
      held_out_rows: at most so many are kept for evaluation.

    Raises:
      InputError: a source that is not there, or a weight too small for a window.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # The commit that the fingerprint names is the one to read, also if the dataset changes meanwhile.
    sources = [
        source if source.path is not None else source.model_copy(update={"revision": source_fingerprint(source)["revision"]})
        for source in data.sources
    ]
    data = data.model_copy(update={"sources": tuple(sources)})
    return TextStream(data, tokenizer, folder, batch_size=batch_size, held_out_rows=held_out_rows)
