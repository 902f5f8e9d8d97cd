"""Documents out of text files and datasets of the Hub: in a fixed order, in constant memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxdistill.config import SourceConfig
from jaxdistill.data.pieces import decode, pieces, text_documents
from jaxdistill.data.source_files import (
    LARGEST_DOCUMENT,
    Hashes,
    SourceFile,
    file_contents,
    file_format,
    open_bytes,
    read_lines,
    source_files,
)
from jaxdistill.errors import InputError
from jaxdistill.models import no_such_dataset, refusal, status_of
from jaxdistill.redaction import first_line
from jaxdistill.urls import is_url

PARQUET_ROWS = 1024  # read at once, fewer where a row is long on average
PARQUET_ROWS_BYTES = 8 << 20
PARQUET_BUFFER = 1 << 20  # bytes; without it pyarrow holds a whole column chunk
COMMIT = re.compile(r"[0-9a-f]{40}")

Document = tuple[str | None, bool]  # the text (None: a null), and whether it was valid UTF-8


@dataclass
class DocumentCounts:
    """Grows while documents are read."""

    documents: int = 0
    skipped: int = 0  # null, empty or only whitespace
    invalid_utf8: int = 0  # documents in which bytes had to be replaced
    duplicates: int = 0  # left out because they stand elsewhere before
    bytes_read: int = 0  # of the files as they lie on disk


def source_name(source: SourceConfig) -> str:
    """What the user wrote, for messages and the manifest."""
    if source.path is not None:
        return source.path
    return f"{source.dataset}/{source.name}" if source.name else str(source.dataset)


def read_documents(source: SourceConfig, counts: DocumentCounts) -> Iterator[str]:
    """The documents of a source, one after the other and always in the same order.

    A row of parquet, a line of JSON or a block between blank lines of a text file is a document; a long one is several (`pieces`). Empty
    ones are left out; bytes that are not UTF-8 become U+FFFD. Both are counted in `counts`.

    Raises:
      InputError: a file, column or dataset that is not there or cannot be read; names the file, and the line where there is one.
    """
    return with_text(source_documents(source, counts), counts)


def with_text(documents: Iterable[Document], counts: DocumentCounts) -> Iterator[str]:
    """Those that hold text, each a piece or several; counts them, and what was left out or repaired."""
    for document, valid in documents:
        for text in pieces(document or ""):
            if not text or text.isspace():
                counts.skipped += 1
                continue
            counts.documents += 1
            counts.invalid_utf8 += not valid and "\ufffd" in text
            yield text


def source_documents(source: SourceConfig, counts: DocumentCounts) -> Iterator[Document]:
    """Every document of a source, also the empty ones."""
    if source.path is None:
        yield from hub_documents(source, hub_stream(source), source_name(source))
    else:
        for file in source_files(source):
            yield from file_documents(source, file.path, counts)


def read_labelled(source: SourceConfig, label_column: str) -> Iterator[tuple[str, str]]:
    """(label, document) of each row that holds text, in the order of `read_documents`; a row without a label has the label "-".

    Raises:
      InputError: as `read_documents`, or a text file, which has no columns.
    """
    for file in source_files(source) if source.path is not None else []:
        if (file_format(file.path) if source.format == "auto" else source.format) == "text":
            raise InputError(f"{file.path}: a text file has no column {label_column!r}; parquet and jsonl have columns")

    def column(name: str) -> Iterator[Document]:
        return source_documents(source.model_copy(update={"column": name}), DocumentCounts())

    for (document, _), (label, _) in zip(column(source.column), column(label_column), strict=True):
        for text in pieces(document or ""):
            if text and not text.isspace():
                yield label or "-", text


def file_documents(source: SourceConfig, path: str, counts: DocumentCounts) -> Iterator[Document]:
    """Every document of one file of a source; `counts` learns how much of the file has been read."""
    kind = file_format(path) if source.format == "auto" else source.format
    if kind is None:
        raise InputError(f"{path}: unknown kind of file; say format: parquet, jsonl or text")
    if kind == "parquet":
        yield from _parquet_documents(path, source.column, counts)
        return
    before, bytes_read = counts.bytes_read, [0]
    lines = read_lines(path, bytes_read)
    for document in _jsonl_documents(path, lines, source.column) if kind == "jsonl" else text_documents(lines):
        counts.bytes_read = before + bytes_read[0]
        yield document
    counts.bytes_read = before + bytes_read[0]


def _parquet_documents(path: str, column: str, counts: DocumentCounts) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    before, rows_done = counts.bytes_read, 0
    try:
        with open_bytes(path) as raw:
            size = raw.seek(0, 2)
            with pq.ParquetFile(raw if is_url(path) else path, buffer_size=PARQUET_BUFFER) as file:
                _check_column(file.schema_arrow, column, path)
                for batch in file.iter_batches(_rows_at_once(file.metadata, column), columns=[column]):
                    # As bytes: pyarrow does not check UTF-8 on reading and would raise on the first bad row.
                    for number, value in enumerate(batch.column(0).cast(pa.large_binary())):
                        data = value.as_py()
                        _check_size(data, f"{path}, row {rows_done + number}")
                        yield (None, True) if data is None else decode(data)
                    rows_done += batch.num_rows
                    counts.bytes_read = before + size * rows_done // file.metadata.num_rows
    except InputError:
        raise
    except Exception as error:  # ArrowException, OSError, and whatever clients of object storage raise
        raise InputError(f"{path}: cannot be read as parquet: {first_line(str(error))}") from error


def _rows_at_once(metadata: Any, column: str) -> int:
    """As many rows as take `PARQUET_ROWS_BYTES` of memory where they are longest on average."""
    longest = 1.0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        size = next((chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column), 0)
        longest = max(longest, size / max(group.num_rows, 1))
    return max(1, min(PARQUET_ROWS, int(PARQUET_ROWS_BYTES / longest)))


def _check_size(value: str | bytes | None, where: str) -> None:
    """Raises InputError for a value that is longer than a line of a file may be."""
    # Characters have at most four bytes: few values have to be encoded for it.
    if value is None or len(value) <= LARGEST_DOCUMENT // 4:
        return
    if len(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value) > LARGEST_DOCUMENT:
        raise InputError(f"{where}: a document of more than {LARGEST_DOCUMENT >> 20} MiB; divide it")


def _check_column(schema: Any, column: str, path: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise InputError(f"{path}: no column {column!r}; its columns are {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{path}: column {column!r} holds {kind}, not text")


def _jsonl_documents(path: str, lines: Iterable[bytes], column: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        decoded, valid = decode(line)
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
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


def hub_stream(source: SourceConfig) -> Any:
    """A dataset of the Hub as an `IterableDataset`; asks the Hub what it consists of, which takes seconds."""
    import datasets

    try:
        stream = datasets.load_dataset(source.dataset, name=source.name, split=source.split, revision=source.revision, streaming=True)
    except Exception as error:  # as many types as there are storage clients under it
        reason = refusal(error) if status_of(error) else first_line(str(error))
        raise InputError(f"{source_name(source)}: the dataset of the Hub cannot be opened: {reason}") from error
    if stream.column_names is not None and source.column in stream.column_names:
        stream = stream.select_columns([source.column])  # the others of a parquet file are not downloaded
    return stream


def hub_documents(source: SourceConfig, stream: Any, where: str) -> Iterator[Document]:
    """Every document of a dataset of the Hub or of a shard of it; `where` names it in errors."""
    number, examples = 0, iter(stream)
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:
            reason = first_line(str(error))
            raise InputError(f"{where}: the dataset of the Hub broke off at row {number}: {reason}; start again to go on") from error
        row = f"{where}, {source.split}, row {number}"
        text = _field(example, source.column, row)
        _check_size(text, row)
        yield text, True
        number += 1


def _resolved_revision(source: SourceConfig) -> str:
    if source.revision is not None and COMMIT.fullmatch(source.revision):
        return source.revision  # nothing to ask: a store made of it can be used again without a network
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(source.dataset), revision=source.revision).sha)
    except Exception as error:  # httpx errors, Hub errors and plain OSErrors have no common base
        hint = "with a commit's 40 digits as revision, a store that is already prepared needs no network"
        raise InputError(f"{source.dataset}: {no_such_dataset(error, source.revision) or f'{refusal(error)} ({hint})'}") from error


def source_fingerprint(source: SourceConfig) -> dict[str, Any]:
    """What the source holds: name, size and sha256 of each file, or the dataset with the commit that its revision means now.

    Files on object storage are not read for this: instead of the sha256 stands what their store says of them, a hash, a tag or a time
    (the best of `CONTENT_FIELDS`). A copy in another store may so be taken for another text.
    """
    return found_source(source, Hashes())[0]


def found_source(source: SourceConfig, hashes: Hashes) -> tuple[dict[str, Any], list[SourceFile]]:
    """The source's fingerprint, and its files in the order of reading (none of a dataset)."""
    if source.path is None:
        return {"dataset": source.dataset, "name": source.name, "split": source.split, "revision": _resolved_revision(source)}, []
    files = source_files(source)
    return {"files": file_contents(files, hashes)}, files
