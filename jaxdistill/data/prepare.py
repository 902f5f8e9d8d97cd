"""Text into a token store: documents split, tokenised and packed part by part, so that a killed run goes on where it was.

A part is a pure function of its documents. Its record is written after its rows, the manifest after all parts: a folder without a
manifest is never taken for a store, and a part with a record is never made again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data import layout
from jaxdistill.data.layout import SPLITS
from jaxdistill.data.reader import TokenStore
from jaxdistill.data.rows import pack_documents
from jaxdistill.data.sources import DocumentCounts, read_documents, source_fingerprint, source_name
from jaxdistill.data.tokenizer import TextTokenizer
from jaxdistill.errors import InputError

PART_BYTES = 32 << 20  # UTF-8 text of a part: about 10 s of work lost at a kill, and 3,000 parts for 100 GB
BATCH_BYTES = 2 << 20  # UTF-8 text tokenised at once: enough for the threads, and the encodings take 100 times as much memory

Progress = Callable[..., None]


def is_held_out(text: bytes, held_out: float) -> bool:
    """Whether a document belongs to the held-out part: its text decides alone, wherever and in whatever order it is read."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < held_out * 2**64


@dataclass
class _Job:
    """One build: what every part needs, and what has been done so far."""

    data: DataConfig
    tokenizer: TextTokenizer
    folder: Path
    fingerprint: str
    bytes_total: int | None
    progress: Progress | None
    documents: int = 0
    tokens: int = 0
    bytes_done: int = 0  # of the sources that are finished

    def report(self, counts: DocumentCounts, *, documents: int, tokens: int) -> None:
        self.documents += documents
        self.tokens += tokens
        if self.progress is not None:
            done = self.bytes_done + counts.bytes_read
            self.progress(documents=self.documents, tokens=self.tokens, bytes_done=done, bytes_total=self.bytes_total)


def _fingerprint(data: DataConfig, tokenizer: TextTokenizer, contents: list[dict[str, Any]]) -> str:
    """Hash of everything the rows depend on. Weights and packing are not in it: they are the reader's affair."""
    depends_on = {
        "version": layout.VERSION,
        "part_bytes": PART_BYTES,
        "tokenizer": [tokenizer.fingerprint, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.vocab_size],
        "sources": [[source.format, source.column, content] for source, content in zip(data.sources, contents, strict=True)],
        "sequence_length": data.sequence_length,
        "held_out": data.held_out,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def prepare(
    data: DataConfig, *, tokenizer: TextTokenizer, store: str | Path, progress: Progress | None = None, expected: str | None = None
) -> TokenStore:
    """The token store of this text: the one in the folder `store` if it was made from the same input, else a new one there.

    A store of other input is replaced; what a killed prepare had finished is kept. While another process prepares the same store,
    waits for it.

    Args:
      expected: fingerprint of the store that a run began with: that store is used as it lies, whatever became of its sources.
      progress: called again and again with documents, tokens (without special ones), bytes_done and bytes_total (of the files as
        they lie on disk; None if a source is on the Hub).

    Raises:
      InputError: a source cannot be read or holds no text, a part of the split would be empty, or `store` holds other files.
    """
    folder = Path(store)
    if expected is not None and _is_prepared(folder, expected):
        return TokenStore(folder)
    contents = [source_fingerprint(source) for source in data.sources]
    fingerprint = _fingerprint(data, tokenizer, contents)
    if expected not in (None, fingerprint):
        raise InputError(f"data: the text or its tokenizer changed since the run began, and {folder} no longer holds what it read")
    if _is_prepared(folder, fingerprint):
        return TokenStore(folder)
    # The commit that the fingerprint names is the one to read, also if the dataset changes meanwhile.
    sources = [
        source if source.path is not None else source.model_copy(update={"revision": content["revision"]})
        for source, content in zip(data.sources, contents, strict=True)
    ]
    sizes = [file["size"] for content in contents for file in content.get("files", ())]
    bytes_total = sum(sizes) if all("files" in content for content in contents) else None
    # Said outright, tokenizers neither stays single-threaded nor warns when the process is forked afterwards.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    layout.open_folder(folder)
    with layout.locked(folder):
        if not _is_prepared(folder, fingerprint):
            layout.remove_parts(folder, except_fingerprint=fingerprint)
            try:
                manifest = _build(_Job(data, tokenizer, folder, fingerprint, bytes_total, progress), sources)
            except InputError:
                layout.remove_store(folder)  # the input must change: no part of it would be used again
                raise
            layout.write_whole(folder / layout.MANIFEST, layout.to_json(manifest))
    return TokenStore(folder)


def _is_prepared(folder: Path, fingerprint: str) -> bool:
    manifest = layout.read_manifest(folder)
    return manifest is not None and manifest["fingerprint"] == fingerprint


def _build(job: _Job, sources: list[SourceConfig]) -> dict[str, Any]:
    """Makes every part that is not there yet; returns the manifest."""
    parts: list[dict[str, Any]] = []
    summaries = []
    for number, source in enumerate(sources):
        counts = DocumentCounts()
        own_parts = list(_source_parts(job, number, source, counts))
        summary = {
            "source": source_name(source),
            **{what: {split: sum(part[what][split] for part in own_parts) for split in SPLITS} for what in ("documents", "tokens", "rows")},
            "bytes": sum(part["bytes"] for part in own_parts),
            "skipped": counts.skipped,
            "invalid_utf8": counts.invalid_utf8,
        }
        if not sum(summary["tokens"].values()):
            raise InputError(
                f"data.sources.{number} ({source_name(source)}): no text in it: {counts.documents} documents, {counts.skipped} empty ones"
            )
        summaries.append(summary)
        parts += own_parts
        job.bytes_done += counts.bytes_read
    _check_split(job.data.held_out, parts)
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "fingerprint": job.fingerprint,
        "tokenizer": {
            "fingerprint": job.tokenizer.fingerprint,
            "vocab_size": job.tokenizer.vocab_size,
            **{name: getattr(job.tokenizer, name) for name in ("cls_id", "sep_id", "pad_id", "mask_id")},
        },
        "dtype": job.tokenizer.dtype.str,
        "sequence_length": job.data.sequence_length,
        "held_out": job.data.held_out,
        "totals": {
            **{what: {split: sum(each[what][split] for each in summaries) for split in SPLITS} for what in ("documents", "tokens", "rows")},
            **{what: sum(each[what] for each in summaries) for what in ("bytes", "skipped", "invalid_utf8")},
        },
        "sources": summaries,
        "parts": [{key: part[key] for key in ("source", "part", "rows", "files")} for part in parts],
    }


def _check_split(held_out: float, parts: list[dict[str, Any]]) -> None:
    tokens = {split: sum(part["tokens"][split] for part in parts) for split in SPLITS}
    documents = sum(part["documents"][split] for part in parts for split in SPLITS)
    if held_out > 0 and not tokens["held_out"]:
        raise InputError(f"data.held_out: none of the {documents} documents falls into the share {held_out}; raise it or set it to 0")
    if not tokens["train"]:
        raise InputError(f"data.held_out: all of the {documents} documents fall into the share {held_out}; lower it or set it to 0")


def _source_parts(job: _Job, number: int, source: SourceConfig, counts: DocumentCounts) -> Iterator[dict[str, Any]]:
    """The records of a source's parts; a finished part's documents are read past, not tokenised."""
    documents = read_documents(source, counts)
    for part in itertools.count():
        record = layout.read_part(job.folder, number, part, job.fingerprint)
        if record is None:
            record = _write_part(job, number, part, documents, counts)
        else:
            num_documents = sum(record["documents"].values())
            deque(itertools.islice(documents, num_documents), maxlen=0)
            job.report(counts, documents=num_documents, tokens=sum(record["tokens"].values()))
        if record is None:
            return
        yield record


def _write_part(job: _Job, source: int, part: int, documents: Iterator[str], counts: DocumentCounts) -> dict[str, Any] | None:
    """Tokenises, packs and writes the next documents up to `PART_BYTES`; None if there are none left."""
    encoded: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    part_bytes = 0
    while part_bytes < PART_BYTES:
        texts, splits, size = _next_batch(documents, min(BATCH_BYTES, PART_BYTES - part_bytes), job.data.held_out)
        if not texts:
            break
        part_bytes += size
        arrays = job.tokenizer.encode(texts)
        for split, ids in zip(splits, arrays, strict=True):
            encoded[split].append(ids)
        job.report(counts, documents=len(texts), tokens=sum(map(len, arrays)))
    if not part_bytes:
        return None
    record: dict[str, Any] = {
        "fingerprint": job.fingerprint,
        "source": source,
        "part": part,
        "documents": {split: len(encoded[split]) for split in SPLITS},
        "tokens": {split: sum(map(len, encoded[split])) for split in SPLITS},
        "rows": dict.fromkeys(SPLITS, 0),
        "bytes": part_bytes,
        "files": {},
    }
    special_ids = {name: getattr(job.tokenizer, name) for name in ("cls_id", "sep_id", "pad_id")}
    for split in SPLITS:
        if not record["tokens"][split]:
            continue  # no file rather than an empty one, which cannot be mapped
        tokens, segments = pack_documents(encoded[split], sequence_length=job.data.sequence_length, **special_ids)
        record["rows"][split] = len(tokens)
        for kind, rows in (("tokens", tokens), ("segments", segments)):
            name = layout.row_file(source, part, split, kind)
            record["files"][name] = layout.write_whole(job.folder / name, rows.tobytes())
    layout.write_whole(job.folder / layout.record_file(source, part), layout.to_json(record))
    return record


def _next_batch(documents: Iterator[str], num_bytes: int, held_out: float) -> tuple[list[str], list[str], int]:
    """The next documents until they have `num_bytes` of UTF-8 or more: their texts, their splits and their size in bytes."""
    texts: list[str] = []
    splits: list[str] = []
    size = 0
    for document in documents:
        utf8 = document.encode()
        texts.append(document)
        splits.append("held_out" if is_held_out(utf8, held_out) else "train")
        size += len(utf8)
        if size >= num_bytes:
            break
    return texts, splits, size
