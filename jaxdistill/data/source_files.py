"""The files of a text: which they are, what identifies their content, and their bytes; here or wherever fsspec reaches."""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxdistill.config import SourceConfig
from jaxdistill.data import compressed
from jaxdistill.data.storage import Folder, filesystem
from jaxdistill.errors import InputError
from jaxdistill.redaction import first_line
from jaxdistill.urls import is_url, local_path

EXTENSIONS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".json", ".ndjson"), "text": (".txt", ".text")}
LARGEST_DOCUMENT = 64 << 20  # bytes of a line of a file, or of a row
# What a store tells of an object, best first: its content's hash, else a tag that changes with it, else when it was written.
CONTENT_FIELDS = (
    "sha256 md5Hash content_md5 md5 Content-MD5 Digest crc32c ETag etag e_tag blob_id checksum generation version_id "
    "LastModified last_modified Last-Modified updated mtime modified created"
).split()
ASKED_AT_ONCE = 16  # files of a server, what they are
HASHES = "hashes.json"
KEPT_HASH_BYTES = 64 << 20  # smaller files are hashed again: that takes a tenth of a second
SETTLED_SECONDS = 2.0  # a file that was written to just now may be once more within one tick of its clock


@dataclass(frozen=True)
class SourceFile:
    """A file of a source as it was found when `prepare` began."""

    name: str  # does not depend on where the source lies
    path: str  # here, or a URL
    size: int  # bytes on disk
    stamp: str  # changes when the file does, as far as one can see without reading it


def file_format(path: str | Path) -> str | None:
    """Which of `EXTENSIONS` the name ends in, the ending of a compression aside; parquet is never compressed as a file."""
    name = str(path).lower()
    plain = next((name.removesuffix(ending) for ending in compressed.ENDINGS if name.endswith(ending)), name)
    for known, extensions in EXTENSIONS.items():
        if (name if known == "parquet" else plain).endswith(extensions):
            return known
    return None


def source_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source with a path, in the order of reading.

    Raises:
      InputError: nothing there, or the store cannot be reached.
    """
    path = str(source.path)
    found = _remote_files(source) if is_url(path) else _local_files(source)
    if not found:
        kind = "no file matches this glob" if glob.has_magic(path) else "no such file or folder"
        raise InputError(f"{path}: {kind}")
    return found


def _in_folder(source: SourceConfig, names: Iterator[str]) -> list[str]:
    """Of the names below a folder, those of its texts, in order; none of them is hidden."""
    formats = (source.format,) if source.format != "auto" else tuple(EXTENSIONS)
    texts = sorted(name for name in names if file_format(name) in formats and not any(part.startswith(".") for part in name.split("/")))
    if not texts:
        known = ", ".join(extension for extensions in EXTENSIONS.values() for extension in extensions)
        raise InputError(f"{source.path}: no text files in this folder; known are {known} (name others by a glob, with a format)")
    return texts


def _local_files(source: SourceConfig) -> list[SourceFile]:
    path = local_path(str(source.path))
    if path.is_file():
        named = [(path.name, path)]
    elif path.is_dir():
        below = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        named = [(name, path / name) for name in _in_folder(source, below)]
    else:
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        named = [(match.name, match) for match in matches]
    return [SourceFile(name, str(file), size, stamp) for name, file in named for size, stamp in [_local_stat(file)]]


def _local_stat(path: Path) -> tuple[int, str]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"


def _remote_files(source: SourceConfig) -> list[SourceFile]:
    url = str(source.path)
    fs, path = filesystem(url)
    try:
        fs.invalidate_cache()
        if glob.has_magic(url) and not fs.exists(path):
            entries = [info for info in fs.glob(path, detail=True).values() if info["type"] == "file"]
            found = [(info["name"].rpartition("/")[2], info) for info in sorted(entries, key=lambda info: info["name"])]
        elif (info := fs.info(path))["type"] == "file" and not _is_page(info, source):
            found = [(path.rpartition("/")[2], info)]
        else:
            below = {name[len(path.rstrip("/")) + 1 :]: info for name, info in fs.find(path, detail=True).items()}
            found = [(name, below[name]) for name in _in_folder(source, iter(below))]
        found = _with_content(fs, found)
    except FileNotFoundError as error:
        # fsspec says so of whatever a web server answers, or when there is none.
        cause = error.__cause__ if url.startswith(("http://", "https://")) else None
        if cause is not None and getattr(cause, "status", None) not in (404, 410):
            raise InputError(f"{url}: cannot be reached: {first_line(str(cause))}") from error
        return []
    except InputError:
        raise
    except Exception as error:  # every client has its own types
        raise InputError(f"{url}: cannot be listed: {first_line(str(error))}") from error
    return [_remote_file(name, fs.unstrip_protocol(info["name"]), info) for name, info in found]


def _is_page(info: dict[str, Any], source: SourceConfig) -> bool:
    """Whether this is a page with links to files: web servers have no folders, only files."""
    named = source.format != "auto" or file_format(info["name"]) is not None
    return info.get("mimetype") == "text/html" and (info["name"].endswith("/") or not named)


def _with_content(fs: Any, found: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The files as they were listed, each asked for by itself where the listing says nothing but names, as web servers' do."""

    def known(info: dict[str, Any]) -> dict[str, Any]:
        return info if remote_content(info) and info.get("size") is not None else fs.info(info["name"])

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(zip((name for name, _ in found), pool.map(known, (info for _, info in found)), strict=True))


def _remote_file(name: str, url: str, info: dict[str, Any]) -> SourceFile:
    content = remote_content(info)
    if content is None or info.get("size") is None:
        raise InputError(
            f"{url}: its store tells neither a size, nor a hash, tag or time by which a change would be noticed; copy the file first"
        )
    return SourceFile(name, url, int(info["size"]), json.dumps([info["size"], *content]))


def remote_content(info: dict[str, Any]) -> tuple[str, str] | None:
    """(field, value) of what a store promises to change with an object's content."""
    return next(((field, _as_text(info[field])) for field in CONTENT_FIELDS if info.get(field)), None)


def _as_text(value: Any) -> str:
    """Equal for what a listing and a single request say of one object, which clients write differently."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')


def check_unchanged(file: SourceFile) -> None:
    """Raises InputError when the file is gone or is another than the one that `prepare` found when it began."""
    if is_url(file.path):
        fs, path = filesystem(file.path)
        try:
            fs.invalidate_cache(path.rpartition("/")[0])
            info = fs.info(path)
        except Exception as error:  # every client has its own types
            raise InputError(f"{file.path}: is gone: {first_line(str(error))}") from error
        _, field, value = json.loads(file.stamp)
        stamp = json.dumps([info.get("size"), field, _as_text(info[field]) if info.get(field) else value])
    else:
        stamp = _local_stat(Path(file.path))[1]
    if stamp != file.stamp:
        raise InputError(f"{file.path}: has changed while it was read; start again when it is complete")


class Hashes:
    """sha256 of files here. Those of large ones are kept beside the store, and believed while size, times and inode stay."""

    def __init__(self, folder: Folder | None = None):
        self._kept: dict[str, Any] = {}
        self._folder, self._new = folder, False
        with_hashes = folder.read(HASHES) if folder else None
        try:
            read = json.loads(with_hashes or b"{}")
            self._kept = read if isinstance(read, dict) else {}
        except (ValueError, RecursionError):
            pass  # written by nobody of ours: as if it were not there

    def sha256(self, path: Path) -> str:
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                found = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
                kept = self._kept.get(str(path))
                if isinstance(kept, list) and kept[:-1] == found and isinstance(kept[-1], str):
                    return kept[-1]
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if stat.st_size >= KEPT_HASH_BYTES and time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            self._kept[str(path)], self._new = [*found, digest], True
        return digest

    def save(self) -> None:
        """Into the store's folder, which is there by now."""
        if self._new and self._folder:
            self._folder.write(HASHES, json.dumps(self._kept, indent=1).encode())


def file_contents(files: list[SourceFile], hashes: Hashes) -> list[dict[str, Any]]:
    """What identifies each file wherever it lies: name, size and sha256; of a remote one what its store promises instead of a hash."""
    contents = []
    for file in files:
        if is_url(file.path):
            _, field, value = json.loads(file.stamp)
            contents.append({"name": file.name, "size": file.size, field: value})
        else:
            contents.append({"name": file.name, "size": file.size, "sha256": hashes.sha256(Path(file.path))})
    return contents


def open_bytes(path: str) -> Any:
    """The file's bytes as they lie on disk."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def read_lines(path: str, bytes_read: list[int]) -> Iterator[bytes]:
    """The lines of a file, unpacked; `bytes_read` gets one number, how far the file on disk has been read.

    Raises:
      InputError: the file is gone or damaged, or a line is longer than any document.
    """
    try:
        with open_bytes(path) as raw:
            source = io.BufferedReader(raw, 1 << 20) if is_url(path) else raw
            lines, first = compressed.decompressed(source, path), True
            while line := lines.readline(LARGEST_DOCUMENT + 1):
                if len(line) > LARGEST_DOCUMENT:
                    raise InputError(f"{path}: a line of more than {LARGEST_DOCUMENT >> 20} MiB; divide it")
                bytes_read[0] = source.tell()
                yield line.removeprefix(codecs.BOM_UTF8) if first else line
                first = False
    except InputError:
        raise
    except Exception as error:  # OSError, EOFError, zlib.error, lzma.LZMAError, and whatever clients of object storage raise
        raise InputError(f"{path}: cannot be read to its end: {first_line(str(error))}") from error
