"""Where the rows of a token store lie: mapped files of a folder, or byte ranges of objects that fsspec reaches (gs, s3, hf, ...)."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import layout
from jaxdistill.data.manifest import DAMAGED
from jaxdistill.errors import InputError
from jaxdistill.redaction import first_line

# A map keeps a file descriptor of its own (Python's mmap does), and of these a process has 1,024 by default. Files of larger stores are
# opened for each batch, which takes some 10 us a file; mapping anew would take 70.
MAPPED_FILES = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 16_000)
REQUESTS = 64  # under way at once, of one batch
RETRY_SECONDS = (1.0, 4.0, 10.0)  # before a request is made again
NEAR_BYTES = 64 << 10  # ranges of one object this close are one request: the bytes between cost less than another round trip
LARGEST_REQUEST = 8 << 20

Rows = dict[str, np.ndarray]  # kind -> rows of that kind: tokens and segments [n, S], crc [n]


class LocalFiles:
    """The files of a folder: mapped when they are read for the first time, or, where they are many, opened when they are read."""

    def __init__(self, folder: Path):
        self.place: Path = folder
        self._map = lru_cache(MAPPED_FILES)(self._mapped)
        self._few = True

    def manifest(self) -> dict[str, Any] | None:
        """None where there is none; InputError for a file of something else."""
        return layout.read_manifest(self.place)

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file."""
        with os.scandir(self.place) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        self._few = len(found) <= MAPPED_FILES
        return found

    def _mapped(self, name: str, dtype: np.dtype, width: tuple[int, ...]) -> np.ndarray:
        # A plain array: a row taken from np.memmap is again a memmap, which costs more than the reading.
        return np.asarray(np.memmap(self.place / name, dtype, mode="r")).reshape(-1, *width)

    def _rows(self, name: str, dtype: np.dtype, width: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
        if self._few:
            return self._map(name, dtype, width)[rows]
        size = dtype.itemsize * math.prod(width)
        with open(self.place / name, "rb", buffering=0) as file:
            data = b"".join(os.pread(file.fileno(), size, row * size) for row in rows.tolist())
        if len(data) != size * len(rows):
            raise InputError(f"{self.place}/{name}: ends before row {rows.max()}; {DAMAGED}")
        return np.frombuffer(data, dtype).reshape(-1, *width)

    def read(self, names: Sequence[dict[str, str]], part_numbers: np.ndarray, rows: np.ndarray, into: Rows) -> None:
        """Fills `into` with row rows[i] of part part_numbers[i]; names: file of each kind, of every part."""
        by_part = np.argsort(part_numbers, kind="stable")
        used, firsts = np.unique(part_numbers[by_part], return_index=True)
        for part, (first, end) in zip(used, itertools.pairwise([*firsts, len(by_part)]), strict=True):
            places = by_part[first:end]
            for kind, found in into.items():
                found[places] = self._rows(names[part][kind], found.dtype, found.shape[1:], rows[places])


class RemoteFiles:
    """Objects below a URL, read by ranges; `filesystem` and `root` are fsspec's.

    Raises:
      InputError: no client for this kind of URL.
    """

    def __init__(self, url: str):
        import fsspec

        self.place: str = url.rstrip("/")
        try:
            self.filesystem, self._root = fsspec.core.url_to_fs(self.place)
        except Exception as error:  # no client installed, no credentials
            raise InputError(f"{self.place}: cannot be opened: {_said(error)}") from error
        self._lock = threading.Lock()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(REQUESTS, "ranges")

    def sizes(self) -> dict[str, int] | None:
        """None: listing an object store takes longer than a run's start may; an object that is cut short is found when it is read."""
        return None

    def manifest(self) -> dict[str, Any] | None:
        """None where there is none.

        Raises:
          InputError: something else, or the object store cannot be reached.
        """
        path = f"{self.place}/{layout.MANIFEST}"
        try:
            return json.loads(self.filesystem.cat_file(f"{self._root}/{layout.MANIFEST}"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            raise InputError(f"{path}: not the manifest of a token store") from None
        except Exception as error:  # the clients of object stores raise their own types
            raise InputError(f"{path}: cannot be read: {_said(error)}") from error

    def read(self, names: Sequence[dict[str, str]], part_numbers: np.ndarray, rows: np.ndarray, into: Rows) -> None:
        """As `LocalFiles.read`.

        Raises:
          InputError: an object is missing or too short, or cannot be read after some tries.
        """
        ranges = []
        for kind, found in into.items():
            size = found.dtype.itemsize * math.prod(found.shape[1:])
            starts = (rows * size).tolist()
            ranges += [(names[part][kind], start, start + size) for part, start in zip(part_numbers, starts, strict=True)]
        chunks = iter(self._ranges(ranges))
        for found in into.values():
            joined = b"".join(itertools.islice(chunks, len(rows)))
            found[:] = np.frombuffer(joined, found.dtype).reshape(found.shape)

    def _ranges(self, ranges: list[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of each (name, start, end), near ones fetched together."""
        from fsspec.utils import merge_offset_ranges

        if not ranges:
            return []
        names, starts, ends = map(list, zip(*ranges, strict=True))
        blocks = list(zip(*merge_offset_ranges(names, starts, ends, max_gap=NEAR_BYTES, max_block=LARGEST_REQUEST), strict=True))
        blocks.sort()
        data = self._fetch(blocks)
        for (name, start, end), block in zip(blocks, data, strict=True):
            if len(block) > end - start:
                raise InputError(
                    f"{self.place}/{name}: its server ignores byte ranges ({len(block):,} bytes came where {end - start:,} were asked "
                    "for): copy the token store to a folder"
                )
        begins, found = [block[:2] for block in blocks], []
        for name, start, end in ranges:
            number = bisect_right(begins, (name, start)) - 1
            offset = start - blocks[number][1]
            chunk = data[number][offset : offset + end - start]
            if len(chunk) != end - start:
                raise InputError(f"{self.place}/{name}: ends before byte {end}; {DAMAGED}")
            found.append(chunk)
        return found

    def _fetch(self, blocks: list[tuple[str, int, int]]) -> list[bytes]:
        data: list[Any] = [None] * len(blocks)
        missing = list(range(len(blocks)))
        for wait in (*RETRY_SECONDS, None):
            for number, result in zip(missing, self._requests([blocks[number] for number in missing]), strict=True):
                data[number] = result
            missing = [number for number in missing if isinstance(data[number], BaseException)]
            if not missing:
                return data
            error, name = data[missing[0]], blocks[missing[0]][0]
            if isinstance(error, FileNotFoundError):
                raise InputError(f"{self.place}/{name}: missing; {DAMAGED}") from error
            if wait is None:
                raise InputError(f"{self.place}/{name}: cannot be read after {len(RETRY_SECONDS) + 1} tries: {_said(error)}") from error
            time.sleep(wait)
        raise AssertionError

    def _requests(self, blocks: list[tuple[str, int, int]]) -> list[bytes | BaseException]:
        """What each request returns or raises; in parallel."""
        paths = [f"{self._root}/{name}" for name, _, _ in blocks]
        starts, ends = [block[1] for block in blocks], [block[2] for block in blocks]
        if self.filesystem.async_impl:
            return self.filesystem.cat_ranges(paths, starts, ends, batch_size=REQUESTS, on_error="return")

        def one(path: str, start: int, end: int) -> bytes | BaseException:
            try:
                return self.filesystem.cat_file(path, start, end, cache_type="none")  # a cache would read megabytes ahead
            except Exception as error:
                return error

        with self._lock:
            pool = self._pool
        return list(pool.map(one, paths, starts, ends))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(str(error))}"
