"""Documents out of text files and datasets of the Hub: in a fixed order, in constant memory."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.config import SourceConfig
from jaxdistill.errors import InputError

EXTENSIONS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".json", ".ndjson"), "text": (".txt", ".text")}
PARQUET_ROWS = 1024  # read at once; a document may be long
PARQUET_BUFFER = 1 << 20  # bytes; without it pyarrow holds a whole column chunk
LARGEST_DOCUMENT = 64 << 20  # bytes between two blank lines; tokenising takes about a hundred times as much memory
COMMIT = re.compile(r"[0-9a-f]{40}")

Document = tuple[str | None, bool]  # the text (None: a null), and whether it was valid UTF-8


@dataclass
class DocumentCounts:
    """Grows while documents are read."""

    documents: int = 0
    skipped: int = 0  # null, empty or only whitespace
    invalid_utf8: int = 0  # documents in which bytes had to be replaced
    bytes_read: int = 0  # of the local files as they lie on disk


def source_name(source: SourceConfig) -> str:
    """What the user wrote, for messages and the manifest."""
    if source.path is not None:
        return source.path
    return f"{source.dataset}/{source.name}" if source.name else str(source.dataset)


def file_format(path: Path) -> str | None:
    """Which of `EXTENSIONS` the name ends in, .gz aside; parquet is never gzipped as a file."""
    name = path.name.lower()
    for known, extensions in EXTENSIONS.items():
        if name.endswith(extensions) or (known != "parquet" and name.removesuffix(".gz").endswith(extensions)):
            return known
    return None


def local_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """(name, path) of each file of a local source, in the order of reading; the name does not depend on where the source lies."""
    path = Path(str(source.path)).expanduser()
    known = ", ".join(extension for extensions in EXTENSIONS.values() for extension in extensions)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        names = sorted(
            relative.as_posix()
            for relative in (file.relative_to(path) for file in path.rglob("*") if file.is_file())
            if file_format(relative) in ((source.format,) if source.format != "auto" else tuple(EXTENSIONS))
            and not any(part.startswith(".") for part in relative.parts)
        )
        if not names:
            raise InputError(f"{source.path}: no text files in this folder; known are {known} (name others by a glob, with a format)")
        return [(name, path / name) for name in names]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not matches:
        kind = "no file matches this glob" if glob.has_magic(str(path)) else "no such file or folder"
        raise InputError(f"{source.path}: {kind}")
    return [(match.name, match) for match in matches]


def read_documents(source: SourceConfig, counts: DocumentCounts) -> Iterator[str]:
    """The documents of a source, one after the other and always in the same order.

    A row of parquet, a line of JSON or a block between blank lines of a text file is a document. Empty ones are left out; bytes that
    are not UTF-8 become U+FFFD. Both are counted in `counts`.

    Raises:
      InputError: a file, column or dataset that is not there or cannot be read; names the file, and the line where there is one.
    """
    for text, valid in _local_documents(source, counts) if source.path is not None else _hub_documents(source):
        if not text or text.isspace():
            counts.skipped += 1
            continue
        counts.documents += 1
        counts.invalid_utf8 += not valid
        yield text


def read_labelled(source: SourceConfig, label_column: str) -> Iterator[tuple[str, str]]:
    """(label, document) of each row that holds text, in the order of `read_documents`; a row without a label has the label "-".

    Raises:
      InputError: as `read_documents`, or a text file, which has no columns.
    """
    for _, path in local_files(source) if source.path is not None else []:
        if (file_format(path) if source.format == "auto" else source.format) == "text":
            raise InputError(f"{path}: a text file has no column {label_column!r}; parquet and jsonl have columns")

    def column(name: str) -> Iterator[Document]:
        own = source.model_copy(update={"column": name})
        return _local_documents(own, DocumentCounts()) if source.path is not None else _hub_documents(own)

    for (text, _), (label, _) in zip(column(source.column), column(label_column), strict=True):
        if text and not text.isspace():
            yield label or "-", text


def _local_documents(source: SourceConfig, counts: DocumentCounts) -> Iterator[Document]:
    for _, path in local_files(source):
        kind = file_format(path) if source.format == "auto" else source.format
        if kind is None:
            raise InputError(f"{path}: unknown kind of file; say format: parquet, jsonl or text")
        if kind == "parquet":
            yield from _parquet_documents(path, source.column, counts)
        elif kind == "jsonl":
            yield from _jsonl_documents(path, source.column, counts)
        else:
            yield from _text_documents(path, counts)


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), False


def _parquet_documents(path: Path, column: str, counts: DocumentCounts) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    before, size, rows_done = counts.bytes_read, path.stat().st_size, 0
    try:
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise InputError(f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}")
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise InputError(f"{path}: column {column!r} holds {kind}, not text")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                # As bytes: pyarrow does not check UTF-8 on reading and would raise on the first bad row.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield (None, True) if value is None else _decode(value)
                rows_done += batch.num_rows
                counts.bytes_read = before + size * rows_done // file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet: {error}") from error


def _lines(path: Path, counts: DocumentCounts) -> Iterator[bytes]:
    before = counts.bytes_read
    try:
        with open(path, "rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, line in enumerate(lines):
                counts.bytes_read = before + raw.tell()
                yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read to its end: {error}") from error


def _jsonl_documents(path: Path, column: str, counts: DocumentCounts) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, counts), start=1):
        if not line.strip():
            continue
        decoded, valid = _decode(line)
        try:
            record = json.loads(decoded)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); one object per line is needed") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: a {type(record).__name__}, not an object; one object per line is needed")
        text = _field(record, column, f"{path}:{number}")
        if text is None:
            yield None, True
            continue
        # "\ud800" is valid JSON and no character: it has no UTF-8.
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield repaired, repaired == text and (valid or "\ufffd" not in text)


def _field(record: dict[str, Any], column: str, where: str) -> str | None:
    if column not in record:
        raise InputError(f"{where}: no field {column!r}; its fields are {', '.join(map(str, record))}")
    if record[column] is not None and not isinstance(record[column], str):
        raise InputError(f"{where}: {column!r} holds {type(record[column]).__name__}, not text")
    return record[column]


def _text_documents(path: Path, counts: DocumentCounts) -> Iterator[Document]:
    block: list[bytes] = []
    size = 0
    for line in _lines(path, counts):
        if line.strip():
            block.append(line.rstrip(b"\r\n"))
            size += len(line)
            if size > LARGEST_DOCUMENT:
                raise InputError(f"{path}: a document of more than {LARGEST_DOCUMENT >> 20} MiB; documents are separated by blank lines")
        elif block:
            yield _decode(b"\n".join(block))
            block, size = [], 0
    if block:
        yield _decode(b"\n".join(block))


def _hub_documents(source: SourceConfig) -> Iterator[Document]:
    import datasets

    where = source_name(source)
    try:
        stream = datasets.load_dataset(source.dataset, name=source.name, split=source.split, revision=source.revision, streaming=True)
    except Exception as error:  # as many types as there are storage clients under it
        raise InputError(f"{where}: the dataset of the Hub cannot be opened: {error}") from error
    if stream.column_names is not None and source.column in stream.column_names:
        stream = stream.select_columns([source.column])  # the others of a parquet file are not downloaded
    number, examples = 0, iter(stream)
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(f"{where}: the dataset of the Hub broke off at row {number}: {error}; start again to go on") from error
        yield _field(example, source.column, f"{where}, {source.split}, row {number}"), True
        number += 1


def _resolved_revision(source: SourceConfig) -> str:
    if source.revision is not None and COMMIT.fullmatch(source.revision):
        return source.revision  # nothing to ask: a store made of it can be used again without a network
    import huggingface_hub

    try:
        return str(huggingface_hub.dataset_info(str(source.dataset), revision=source.revision).sha)
    except Exception as error:  # httpx errors, Hub errors and plain OSErrors have no common base
        raise InputError(
            f"{source.dataset}: the dataset of the Hub cannot be reached: {error} (with a commit's 40 digits as revision, a store "
            "that is already prepared needs no network)"
        ) from error


def source_fingerprint(source: SourceConfig) -> dict[str, Any]:
    """What the source holds: name, size and sha256 of each file, or the dataset with the commit that its revision means now."""
    if source.path is None:
        return {"dataset": source.dataset, "name": source.name, "split": source.split, "revision": _resolved_revision(source)}
    files = []
    for name, path in local_files(source):
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        files.append({"name": name, "size": path.stat().st_size, "sha256": digest})
    return {"files": files}
