"""The files of a token store: what they are called, how each is written whole or not at all, and what may be deleted."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError

FORMAT = "jaxdistill token store"
VERSION = 1
SPLITS = ("train", "held_out")
MANIFEST = "manifest.json"
LOCK = "lock"
PART_FILE = re.compile(r"\d{3,}-\d{6,}\.(json|(train|held_out)\.(tokens|segments))(\.tmp)?")

logger = logging.getLogger(__name__)


def row_file(source: int, part: int, split: str, kind: str) -> str:
    """Name of the file with a part's rows: raw little-endian numbers, [rows, S]; kind is tokens or segments."""
    return f"{source:03d}-{part:06d}.{split}.{kind}"


def record_file(source: int, part: int) -> str:
    """Name of the file that says what a part holds; written last, so that the part is complete when it is there."""
    return f"{source:03d}-{part:06d}.json"


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_whole(path: Path, data: bytes) -> str:
    """Writes the file so that it is there with all of `data` or not at all, even if the machine stops; returns its sha256."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete store, or None if there is none; a manifest.json of something else raises InputError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not the manifest of a token store; give data.store another folder")
    return manifest


def read_part(folder: Path, source: int, part: int, fingerprint: str) -> dict[str, Any] | None:
    """The record of a part that is complete, undamaged and made from the same input, else None."""
    try:
        record = json.loads((folder / record_file(source, part)).read_bytes())
    except FileNotFoundError:
        return None
    if record["fingerprint"] != fingerprint:
        return None
    for name, digest in record["files"].items():
        try:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return None
        except FileNotFoundError:
            return None
    return record


def open_folder(folder: Path) -> None:
    """Makes the folder of a store, or checks that an existing one holds nothing else (InputError): what is stale in it gets deleted."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made a folder: {error.strerror}") from error
    read_manifest(folder)
    own = (MANIFEST, MANIFEST + ".tmp", LOCK)
    foreign = sorted(name for name in os.listdir(folder) if name not in own and not PART_FILE.fullmatch(name))
    if foreign:
        raise InputError(f"{folder}: holds {foreign[0]!r}, which is no part of a token store; give data.store an empty or new folder")


def remove_parts(folder: Path, *, except_fingerprint: str | None = None) -> None:
    """Deletes the manifest, then every part that was not made from the input with this fingerprint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    keep: set[str] = set()
    for path in folder.glob("*.json"):
        record = json.loads(path.read_bytes())
        if record["fingerprint"] == except_fingerprint:
            keep |= {path.name, *record["files"]}
    for name in os.listdir(folder):
        if PART_FILE.fullmatch(name) and name not in keep:
            (folder / name).unlink()


def remove_store(folder: Path) -> None:
    """Deletes the manifest and all parts, and the folder if that leaves it empty."""
    remove_parts(folder)
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the store's lock; while another process prepares the same store, says so and waits. The lock dies with its process."""
    try:
        file = open(folder / LOCK, "w")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: another process is preparing this token store; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
