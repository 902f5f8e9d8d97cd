"""A source in shards: pieces that are found without reading what lies before them, so that hosts share the work.

A shard is some consecutive files of a source, or a shard of a dataset of the Hub. What a host writes of it depends on nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxdistill.config import SourceConfig
from jaxdistill.data.source_files import SourceFile, check_unchanged
from jaxdistill.data.sources import Document, DocumentCounts, file_documents, hub_documents, hub_stream, source_name

SHARD_BYTES = 32 << 20  # on disk, of small files together; a larger file is a shard of its own


@dataclass(frozen=True)
class Shard:
    source: int  # number of the source
    shard: int  # number of the shard in it
    of: int  # shards of the source
    files: tuple[SourceFile, ...]  # none: a shard of a dataset of the Hub
    fingerprint: str  # hash of everything that its rows depend on
    text: str  # hash of everything that its documents depend on

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for a dataset of the Hub, whose sizes nobody asks for."""
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Shard:
        return cls(**{**fields, "files": tuple(SourceFile(**file) for file in fields["files"])})


def grouped(files: list[SourceFile], shard_bytes: int) -> list[list[int]]:
    """Numbers of consecutive files whose sizes together are at most `shard_bytes`; a larger file stands alone."""
    groups: list[list[int]] = []
    total = 0
    for number, file in enumerate(files):
        if not groups or total + file.size > shard_bytes:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += file.size
    return groups


def fingerprint_of(*depends_on: Any) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def source_shards(sources: Sequence[SourceConfig], found: Sequence[tuple[dict[str, Any], list[SourceFile]]], rows: str) -> list[Shard]:
    """The shards of all sources, in order.

    Args:
      found: fingerprint and files of each source.
      rows: identifies everything beside the shard's own text that its rows depend on.
    """
    shards: list[Shard] = []
    for number, (source, (content, files)) in enumerate(zip(sources, found, strict=True)):
        if source.path is not None:
            groups = grouped(files, SHARD_BYTES)
            texts = [fingerprint_of(source.format, source.column, [content["files"][j] for j in group]) for group in groups]
        else:
            num_shards = hub_stream(source).num_shards
            groups = [[] for _ in range(num_shards)]
            texts = [fingerprint_of(source.column, content, i, num_shards) for i in range(num_shards)]
        for i, (group, text) in enumerate(zip(groups, texts, strict=True)):
            shards.append(Shard(number, i, len(groups), tuple(files[j] for j in group), fingerprint_of(rows, text), text))
    return shards


class ShardReader:
    """The documents of one shard, in order; `stream` is the dataset of the Hub that it is of."""

    def __init__(self, source: SourceConfig, shard: Shard, counts: DocumentCounts, stream: Any = None):
        self._source, self._shard, self._counts, self._stream = source, shard, counts, stream
        self._open: SourceFile | None = None

    def __iter__(self) -> Iterator[Document]:
        if self._stream is not None:
            where = f"{source_name(self._source)}, shard {self._shard.shard}"
            stream = self._stream.shard(num_shards=self._shard.of, index=self._shard.shard)
            yield from hub_documents(self._source, stream, where)
        for file in self._shard.files:
            self._open = file
            yield from file_documents(self._source, file.path, self._counts)
            self.check()
        self._open = None

    def check(self) -> None:
        """Raises InputError when the file that is being read is no longer the one that was found at the beginning."""
        if self._open is not None:
            check_unchanged(self._open)
