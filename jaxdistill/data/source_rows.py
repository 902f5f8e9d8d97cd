"""Rows of one source from any place in it on, tokenised as they are asked for: what a stream is made of."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data.rows import pack_documents
from jaxdistill.data.source_files import check_unchanged, source_files
from jaxdistill.data.sources import DocumentCounts, file_documents, hub_documents, hub_stream, source_name, with_text
from jaxdistill.data.split import is_held_out
from jaxdistill.data.tokenizer import TextTokenizer
from jaxdistill.errors import InputError

PART_BYTES = 4 << 20  # UTF-8 text that is packed at once; the end of its last row stays empty
BATCH_BYTES = 1 << 20  # UTF-8 text tokenised at once: the encodings take 100 times as much memory

Place = tuple[int, int, int]  # (pass over the source, piece of it, document of the piece): where reading stands


class StoppedError(Exception):
    """Nobody waits for the rows any more."""


@dataclass
class RowMaker:
    """What makes rows of documents; once `stop` is set it raises StoppedError instead."""

    data: DataConfig
    tokenizer: TextTokenizer
    stop: threading.Event

    def rows(self, documents: Iterator[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments [N, S] of all the documents."""
        ids: list[np.ndarray] = []
        while texts := list(_until(documents, BATCH_BYTES)):
            if self.stop.is_set():
                raise StoppedError
            ids += self.tokenizer.encode(texts)
        if not ids:
            shape = (0, self.data.sequence_length)
            return np.empty(shape, self.tokenizer.dtype), np.empty(shape, "<u2")
        special = {name: getattr(self.tokenizer, name) for name in ("cls_id", "sep_id", "pad_id")}
        return pack_documents(ids, sequence_length=self.data.sequence_length, **special)


def _until(documents: Iterator[str], num_bytes: int) -> Iterator[str]:
    """The next documents until they have `num_bytes` of UTF-8 or more."""
    for document in documents:
        yield document
        num_bytes -= len(document.encode())
        if num_bytes <= 0:
            return


class _Pieces:
    """A source in pieces that are opened one by one, so that a resume opens the one it needs: files, or shards of a dataset of the Hub."""

    def __init__(self, source: SourceConfig):
        self._source = source
        self._files = [] if source.path is None else source_files(source)
        self._stream = hub_stream(source) if source.path is None else None
        self.count: int = self._stream.num_shards if self._stream is not None else len(self._files)

    def documents(self, number: int, counts: DocumentCounts) -> Iterator[str]:
        """Of one piece.

        Raises:
          InputError: it cannot be read, or the file is no longer the one that was found at the beginning.
        """
        if self._stream is not None:
            shard = self._stream.shard(num_shards=self.count, index=number)
            yield from with_text(hub_documents(self._source, shard, f"{source_name(self._source)}, shard {number}"), counts)
        else:
            yield from with_text(file_documents(self._source, self._files[number].path, counts), counts)
            check_unchanged(self._files[number])


class SourceRows:
    """The training rows of one source from a place on, pass after pass, made as they are asked for."""

    def __init__(self, maker: RowMaker, number: int, place: Place = (0, 0, 0), skip: int = 0):
        self._maker, self._number, self._source = maker, number, maker.data.sources[number]
        self._place = place
        self._parts: deque[tuple[Place, np.ndarray, np.ndarray]] = deque()  # not taken yet, and where each begins in the text
        self._taken = 0  # rows of the first of these
        self._made = self._make()
        if skip:
            self.take(skip)

    def mark(self) -> list[int]:
        """Where the next row is: a place, and the row of the part that begins there."""
        return [*self._parts[0][0], self._taken] if self._parts else [*self._place, 0]

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next rows, tokens and segments [count, S]."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        while count:
            if not self._parts:
                self._parts.append(next(self._made))
            _, tokens, segments = self._parts[0]
            rows = slice(self._taken, self._taken + count)
            found.append((tokens[rows], segments[rows]))
            count -= len(found[-1][0])
            self._taken += len(found[-1][0])
            if self._taken == len(tokens):
                self._parts.popleft()
                self._taken = 0
        tokens, segments = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(segments)

    def _make(self) -> Iterator[tuple[Place, np.ndarray, np.ndarray]]:
        where, counts = f"data.sources.{self._number} ({source_name(self._source)})", DocumentCounts()
        pieces = _Pieces(self._source)
        while True:
            whole, num_rows = self._place[1:] == (0, 0), 0
            documents = self._documents(pieces, counts)
            while True:
                place = self._place
                tokens, segments = self._maker.rows(_until(documents, PART_BYTES))
                if len(tokens):
                    num_rows += len(tokens)
                    yield place, tokens, segments
                elif self._place == place:
                    break
            if whole and not num_rows:
                held = self._maker.data.held_out
                raise InputError(f"{where}: no text to train on: {counts.documents} documents, of which the share {held} is held out")
            self._place = (self._place[0] + 1, 0, 0)

    def _documents(self, pieces: _Pieces, counts: DocumentCounts) -> Iterator[str]:
        """The training documents from the place on to the end of the pass."""
        passes, first, done = self._place
        for number in range(first, pieces.count):
            start = done if number == first else 0
            for i, document in enumerate(itertools.islice(pieces.documents(number, counts), start, None), start + 1):
                self._place = (passes, number, i)
                if not is_held_out(document.encode(), self._maker.data.held_out):
                    yield document
