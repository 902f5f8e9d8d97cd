"""Documents that occur more than once, found by a hash of their text in constant memory; of equal ones the first stays.

The first is that of the lowest source, shard and place in it, whoever reads it and when. Three steps, each of which a killed run may
repeat: every shard's hashes are written down, equal ones are found range by range of the hash, and a shard is read again
without what was marked in it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxdistill.data import layout
from jaxdistill.data.shards import Shard
from jaxdistill.data.sources import DocumentCounts
from jaxdistill.data.storage import Folder
from jaxdistill.errors import InputError

CHUNK_DOCUMENTS = 1 << 20  # sorted at once: 24 MB
RANGE_DOCUMENTS = 1 << 21  # compared at once, on average: about 200 MB

HERE, ELSEWHERE = 1, 2  # the same document stands before: in the same chunk, or found by the search over all

HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u8")])  # 16 bytes of blake2b, and which document of the shard it is


def _sorted_unique(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a chunk of hashes: the first of each, sorted, and the documents of the others."""
    order = np.lexsort((hashes["low"], hashes["high"]))  # stable: of equal hashes the first document comes first
    ordered = hashes[order]
    again = _equals_previous(ordered)
    return ordered[~again], ordered["document"][again]


def _equals_previous(ordered: np.ndarray) -> np.ndarray:
    again = np.zeros(len(ordered), bool)
    again[1:] = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    return again


def write_hashes(folder: Folder, shard: Shard, documents: Iterable[str]) -> None:
    """Writes the shard's hashes, in sorted chunks, and a byte for each of its documents: `HERE` if its chunk has it before."""
    stem, chunks, total = layout.shard_name(shard), [], 0
    numbered = iter(documents)
    with folder.writing(f"{stem}.hashes") as hash_path, folder.writing(f"{stem}.repeats") as repeat_path:
        with open(hash_path, "wb") as hash_file, open(repeat_path, "wb") as repeat_file:
            while True:
                digests = b"".join(
                    hashlib.blake2b(document.encode(), digest_size=16).digest() for document in itertools.islice(numbered, CHUNK_DOCUMENTS)
                )
                pairs = np.frombuffer(digests, "<u8").reshape(-1, 2)
                if not len(pairs):
                    break
                hashes = np.empty(len(pairs), HASH)
                hashes["high"], hashes["low"], hashes["document"] = pairs[:, 0], pairs[:, 1], np.arange(total, total + len(pairs))
                first, again = _sorted_unique(hashes)
                repeats = np.zeros(len(pairs), np.uint8)
                repeats[again.astype(np.int64) - total] = HERE
                hash_file.write(first.tobytes())
                repeat_file.write(repeats.tobytes())
                chunks.append(len(first))
                total += len(pairs)
    folder.write(f"{stem}.documents.json", layout.to_json({"fingerprint": shard.text, "documents": total, "chunks": chunks}))


def is_hashed(folder: Folder, shard: Shard) -> bool:
    """Whether the shard's hashes are there, whole and of this text."""
    stem = layout.shard_name(shard)
    record = layout.read_json(folder, f"{stem}.documents.json") or {}
    chunks, documents = record.get("chunks"), record.get("documents")
    if record.get("fingerprint") != shard.text or not isinstance(chunks, list) or not all(type(length) is int for length in chunks):
        return False
    sizes = [path.stat().st_size if path.is_file() else None for path in (folder.path / f"{stem}.{kind}" for kind in ("hashes", "repeats"))]
    return sizes == [sum(chunks) * HASH.itemsize, documents]


def _chunks(folder: Folder, shard: Shard) -> Iterator[np.ndarray]:
    """The sorted chunks of a shard, mapped."""
    stem = layout.shard_name(shard)
    lengths = layout.read_json(folder, f"{stem}.documents.json")["chunks"]
    hashes = np.memmap(folder.path / f"{stem}.hashes", HASH, mode="r") if sum(lengths) else np.empty(0, HASH)
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        yield hashes[start:end]


def mark_duplicates(folder: Folder, shards: Sequence[Shard], fingerprint: str) -> None:
    """Marks every document that another shard or chunk has before; one process, after all hashes are written."""
    if (layout.read_json(folder, layout.DUPLICATES) or {}).get("fingerprint") == fingerprint:
        return
    folder.delete(layout.DUPLICATES)
    for marked in filter(len, (_marks(folder, shard, "r+") for shard in shards)):
        marked[marked == ELSEWHERE] = 0  # found by a search that was killed, or that had another text beside this one
        marked.flush()
    total = sum(len(chunk) for shard in shards for chunk in _chunks(folder, shard))
    ranges = max(1, -(-total // RANGE_DOCUMENTS))
    edges = [number * 2**64 // ranges for number in range(ranges)]
    for first, last in zip(edges, [*edges[1:], None], strict=True):
        found, owners = [], []
        for number, shard in enumerate(shards):
            for chunk in _chunks(folder, shard):
                start = np.searchsorted(chunk["high"], np.uint64(first))
                end = len(chunk) if last is None else np.searchsorted(chunk["high"], np.uint64(last))
                found.append(np.array(chunk[start:end]))
                owners.append(np.full(end - start, number, np.int32))
        if found:
            _mark(folder, shards, np.concatenate(found), np.concatenate(owners))
    folder.write(layout.DUPLICATES, layout.to_json({"fingerprint": fingerprint}))


def _mark(folder: Folder, shards: Sequence[Shard], hashes: np.ndarray, owners: np.ndarray) -> None:
    """Marks all but the first of equal hashes, which stand in the order of their documents."""
    order = np.lexsort((hashes["low"], hashes["high"]))
    again = order[_equals_previous(hashes[order])]
    again = again[np.argsort(owners[again], kind="stable")]
    numbers, starts = np.unique(owners[again], return_index=True)
    for number, start, end in zip(numbers, starts, np.append(starts, len(again))[1:], strict=True):
        marked = _marks(folder, shards[number], "r+")
        marked[hashes["document"][again[start:end]].astype(np.int64)] = ELSEWHERE
        marked.flush()


def _marks(folder: Folder, shard: Shard, mode: str) -> np.ndarray:
    path = folder.path / f"{layout.shard_name(shard)}.repeats"
    return np.memmap(path, np.uint8, mode=mode) if path.stat().st_size else np.empty(0, np.uint8)


def without_duplicates(folder: Folder, shard: Shard, documents: Iterable[str], counts: DocumentCounts) -> Iterator[str]:
    """The shard's documents that are not marked; counts the others."""
    marked = _marks(folder, shard, "r")
    for number, document in enumerate(documents):
        if number >= len(marked):
            raise InputError(
                f"source {shard.source}, shard {shard.shard}: more documents than when its duplicates were searched; start again"
            )
        if marked[number]:
            counts.duplicates += 1
        else:
            yield document
