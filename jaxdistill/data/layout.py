"""The files of a token store: what they are called, what a complete one looks like, and what may be deleted."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data.shards import Shard, fingerprint_of
from jaxdistill.data.source_files import HASHES
from jaxdistill.data.storage import LOCK, Folder
from jaxdistill.errors import InputError

FORMAT = "jaxdistill token store"
VERSION = 2
SPLITS = ("train", "held_out")
KINDS = ("tokens", "segments", "crc")
MANIFEST = "manifest.json"
DUPLICATES = "duplicates.json"  # there when all duplicates of all shards are marked
# Of a shard, of a part of it (or of a part of an older version); no other file in the folder is ever opened, written or deleted.
PART_FILE = re.compile(
    r"(?P<shard>\d{3,}-\d{6,})(-\d{6,})?"
    r"\.(json|(train|held_out)\.(tokens|segments|crc)|(?P<text>documents\.json|hashes|repeats))(\.tmp)?"
)


def part_name(part: Mapping[str, Any]) -> str:
    """How the names of a part's files begin; `part` is its record, or its entry in the manifest."""
    return f"{part['source']:03d}-{part['shard']:06d}-{part['part']:06d}"


def row_file(part: Mapping[str, Any], split: str, kind: str) -> str:
    """Name of the file with a part's rows of one split, raw little-endian numbers.

    The kind is tokens ([rows, S] in the manifest's dtype), segments ([rows, S] uint16) or crc ([rows] uint32: `row_checksums`).
    """
    return f"{part_name(part)}.{split}.{kind}"


def record_file(part: Mapping[str, Any]) -> str:
    """Name of the file that says what a part holds; written last, so that the part is complete when it is there."""
    return f"{part_name(part)}.json"


def row_checksums(tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """CRC-32 of each row's bytes as they lie in the files, its tokens and then its segments: [rows] uint32, little-endian."""
    rows = zip(tokens, segments, strict=True)
    return np.fromiter((zlib.crc32(row_segments, zlib.crc32(row)) for row, row_segments in rows), "<u4", len(tokens))


def shard_name(shard: Shard) -> str:
    """How the names of a shard's files begin."""
    return f"{shard.source:03d}-{shard.shard:06d}"


def shard_file(shard: Shard) -> str:
    """Name of the file that says how many parts a shard has, written after all of them."""
    return f"{shard_name(shard)}.json"


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """The mapping in a file; None if there is no such file, or something else in it."""
    try:
        value = json.loads(folder.read(name) or b"null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sealed(record: Mapping[str, Any]) -> bytes:
    """A record as JSON, with the checksum of what it says."""
    return to_json({**record, "sha256": fingerprint_of(record)})


def _read_sealed(folder: Folder, name: str) -> dict[str, Any] | None:
    """The record in a file; None if there is none, or it does not say what was written."""
    record = read_json(folder, name) or {}
    seal = record.pop("sha256", None)
    return record if seal == fingerprint_of(record) else None


def read_manifest(folder: Folder | Path) -> dict[str, Any] | None:
    """The manifest of a complete store, or None if there is none; a manifest.json of something else raises InputError."""
    folder = Folder(folder) if isinstance(folder, Path) else folder
    if folder.read(MANIFEST) is None:
        return None
    manifest = read_json(folder, MANIFEST)
    if manifest is None or manifest.get("format") != FORMAT:
        raise InputError(f"{folder.place}/{MANIFEST}: not the manifest of a token store; give data.store another folder")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def read_part(folder: Folder, shard: Shard, part: int, *, check_files: bool) -> dict[str, Any] | None:
    """The record of a part that is complete and made from the same input, else None; `check_files`: and undamaged."""
    place = {"source": shard.source, "shard": shard.shard, "part": part}
    record = _read_sealed(folder, record_file(place))
    if record is None or record.get("fingerprint") != shard.fingerprint or any(record.get(key) != value for key, value in place.items()):
        return None
    for what in ("documents", "tokens", "rows"):
        counts = record.get(what)
        if not isinstance(counts, dict) or not all(_is_count(counts.get(split)) for split in SPLITS):
            return None
    names = {row_file(place, split, kind) for split in SPLITS for kind in KINDS if record["rows"][split]}
    files = record.get("files")
    if not _is_count(record.get("bytes")) or not isinstance(files, dict) or files.keys() != names:
        return None
    if check_files and not all(isinstance(digest, str) and folder.holds(name, digest) for name, digest in files.items()):
        return None
    return record


def read_shard(folder: Folder, shard: Shard, *, check_files: bool) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The record of a shard that is finished, and those of its parts; else None."""
    record = _read_sealed(folder, shard_file(shard))
    if record is None or record.get("fingerprint") != shard.fingerprint:
        return None
    if not all(_is_count(record.get(what)) for what in ("parts", "skipped", "invalid_utf8", "duplicates")):
        return None
    parts = []
    for number in range(record["parts"]):
        part = read_part(folder, shard, number, check_files=check_files)
        if part is None:
            return None
        parts.append(part)
    return record, parts


def check_own(folder: Folder) -> None:
    """Raises InputError when the folder holds anything but a token store: what is stale in it gets deleted."""
    read_manifest(folder)
    own = (MANIFEST, MANIFEST + ".tmp", LOCK, HASHES, HASHES + ".tmp", DUPLICATES, DUPLICATES + ".tmp")
    foreign = sorted(name for name in folder.names() if name not in own and not PART_FILE.fullmatch(name))
    if foreign:
        raise InputError(f"{folder.place}: holds {foreign[0]!r}, which is no part of a token store; give data.store an empty or new folder")


def remove_stale(folder: Folder, shards: Iterable[Shard], *, keep_text: bool) -> None:
    """Deletes the manifest, then every file that is not of a finished part of one of these shards.

    `keep_text`: also what was found of their documents stays, for the search of duplicates.
    """
    folder.delete(MANIFEST)
    by_name = {shard_name(shard): shard for shard in shards}
    kept: dict[str, bool] = {}  # by the name of a record
    for name in sorted(folder.names()):
        found = PART_FILE.fullmatch(name)
        if found is None:
            continue
        shard = by_name.get(found["shard"])
        if found["text"]:
            record, fingerprint = f"{found['shard']}.documents.json", shard and keep_text and shard.text
        else:
            record, fingerprint = f"{name.partition('.')[0]}.json", shard and shard.fingerprint
        if record not in kept:
            kept[record] = bool(fingerprint) and (read_json(folder, record) or {}).get("fingerprint") == fingerprint
        if name.endswith(".tmp") or not kept[record]:
            folder.delete(name)
    if not keep_text:
        folder.delete(DUPLICATES)


def remove_text(folder: Folder) -> None:
    """Deletes what was kept for the search of duplicates."""
    folder.delete(DUPLICATES)
    for name in folder.names():
        if (found := PART_FILE.fullmatch(name)) and found["text"]:
            folder.delete(name)
