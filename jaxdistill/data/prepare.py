"""Text into a token store: documents split, tokenised and packed part by part, so that a killed run goes on where it was.

A source is divided into shards that hosts share out, a shard into parts. A part is a pure function of its shard's text: the store
has the same bytes whoever made it and however often it was killed. A part's record is written after its rows, a shard's after
its parts, the manifest after all shards: a folder without a manifest is never taken for a store, and what has a record is not
made again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import processes
from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data import duplicates, layout
from jaxdistill.data.finished import store_manifest, verified
from jaxdistill.data.layout import SPLITS
from jaxdistill.data.reader import TokenStore, open_remote
from jaxdistill.data.rows import pack_documents
from jaxdistill.data.shards import SHARD_BYTES, Shard, ShardReader, fingerprint_of, source_shards
from jaxdistill.data.source_files import Hashes
from jaxdistill.data.sources import DocumentCounts, found_source, hub_stream, with_text
from jaxdistill.data.split import is_held_out as is_held_out
from jaxdistill.data.split import next_batch
from jaxdistill.data.storage import Folder, RemoteFolder, open_folder
from jaxdistill.data.tokenizer import TextTokenizer
from jaxdistill.errors import InputError
from jaxdistill.urls import is_url

PART_BYTES = 32 << 20  # UTF-8 text of a part: about 10 s of work lost at a kill, and 3,000 parts for 100 GB
BATCH_BYTES = 2 << 20  # UTF-8 text tokenised at once: enough for the threads, and the encodings take 100 times as much memory
WATCHED_DOCUMENTS = 1000  # between two reports of a pass that only reads

Progress = Callable[..., None]


def prepare(
    data: DataConfig,
    *,
    tokenizer: TextTokenizer,
    store: str | Path,
    progress: Progress | None = None,
    expected: str | None = None,
    verify: bool = False,
    shared: bool = False,
    tell: Callable[[str], None] | None = None,
) -> TokenStore:
    """The token store of this text: the one in `store` if it was made from the same input, else a new one there.

    A store of other input is replaced, but for the shards that both have; what a killed or failed prepare had finished is kept. While
    another run prepares the same store here, waits for it.

    Args:
      store: a folder, or a URL that fsspec can write to (gs://, s3://). A finished store at a URL is used as it lies, without its text.
      expected: fingerprint of the store that a run began with: that store is used as it lies, whatever became of its sources.
      verify: compare every part of a finished store with its sha256, and make the damaged ones again.
      shared: every process of the run calls this, they share the work, and `store` is a place that all of them reach.
      progress: called again and again with documents, tokens (without special ones), bytes_done and bytes_total (of the files as
        they lie on disk; None if a source is on the Hub), of this process's share.
      tell: called by the main process with what `verify` found, a line.

    Raises:
      InputError: a source cannot be read or holds no text, a part of the split would be empty, `store` holds other files, or the
        disk is full. What is finished stays, and the same call goes on.
    """
    group = processes if shared else _Alone
    if is_url(store) and not verify:
        with group.together():
            opened = open_remote(data, str(store), tokenizer=tokenizer, expected=expected)
        if opened is not None:
            return opened
    folder, made = open_folder(store, verify=verify), []
    # Said outright, tokenizers neither stays single-threaded nor warns when the process is forked afterwards.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with contextlib.ExitStack() as held:
        with group.together():
            plan = _plan(data, tokenizer, folder, expected, verify, held) if group.is_main() else None
        plan = group.from_main(plan)
        if plan is not None:
            try:
                made = _build(_Job(data, tokenizer, folder, progress, group), plan)
            except InputError:
                if group.is_main():
                    folder.remove_if_empty()
                raise
    with group.together():
        opened = TokenStore(store)
    if verify and tell is not None and group.is_main():
        tell(verified(opened.folder, len(opened.manifest["parts"]), made))
    return opened


def _plan(
    data: DataConfig, tokenizer: TextTokenizer, folder: Folder, expected: str | None, verify: bool, held: contextlib.ExitStack
) -> dict[str, Any] | None:
    """What there is to do, for all processes, with the store locked; None: nothing."""
    if expected is not None and not verify and _is_prepared(folder, expected, data):
        return None
    hashes = Hashes(folder)
    found = [found_source(source, hashes) for source in data.sources]
    contents = [content for content, _ in found]
    rows = fingerprint_of(
        layout.VERSION, PART_BYTES, data.sequence_length, data.held_out,
        [tokenizer.fingerprint, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.vocab_size],
    )  # fmt: skip
    read = [[source.format, source.column, content] for source, content in zip(data.sources, contents, strict=True)]
    # Everything the rows depend on. Weights, languages and packing are the reader's affair.
    fingerprint = fingerprint_of(rows, SHARD_BYTES, read, data.deduplicate)
    if expected not in (None, fingerprint):
        raise InputError(f"data: the text or its tokenizer changed since the run began, and {folder.place} no longer holds what it read")
    if not verify and _is_prepared(folder, fingerprint, data):
        return None
    if verify and (layout.read_manifest(folder) or {"fingerprint": fingerprint}).get("fingerprint") != fingerprint:
        raise InputError(f"{folder.place}: made from other text or by another tokenizer than the config's; without --verify it is replaced")
    folder.make()
    layout.check_own(folder)
    held.enter_context(folder.locked())
    if not verify and _is_prepared(folder, fingerprint, data):
        return None
    hashes.save()
    revisions = [content.get("revision") for content in contents]
    shards = source_shards(_pinned(data, revisions), found, fingerprint if data.deduplicate else rows)
    if isinstance(folder, RemoteFolder) and layout.read_manifest(folder) is not None and not verify:
        raise InputError(f"{folder.place}: holds the token store of another text or tokenizer; give data.store another URL, or delete it")
    layout.remove_stale(folder, shards, keep_text=data.deduplicate)
    return {"fingerprint": fingerprint, "shards": [shard.to_json() for shard in shards], "revisions": revisions}


def _pinned(data: DataConfig, revisions: list[str | None]) -> list[SourceConfig]:
    """The commits that the fingerprint names are those to read, also if a dataset changes meanwhile."""
    both = zip(data.sources, revisions, strict=True)
    return [source if source.path is not None else source.model_copy(update={"revision": revision}) for source, revision in both]


def _is_prepared(folder: Folder, fingerprint: str, data: DataConfig) -> bool:
    """Whether the finished store is there; it learns the languages that the config gives its sources now."""
    manifest = layout.read_manifest(folder)
    if manifest is None or manifest.get("fingerprint") != fingerprint or manifest.get("version") != layout.VERSION:
        return False
    languages, known = [source.language for source in data.sources], manifest.get("sources")
    if not isinstance(known, list) or len(known) != len(languages) or not all(isinstance(source, dict) for source in known):
        raise InputError(f"{folder.place}/{layout.MANIFEST}: damaged; delete it, and prepare makes it again from the parts")
    if [source.get("language") for source in known] != languages:
        for source, language in zip(known, languages, strict=True):
            source["language"] = language
        folder.write(layout.MANIFEST, layout.to_json(manifest))
    return True


class _Alone:
    """A group of this process alone, whatever others the run has."""

    together = contextlib.nullcontext

    @staticmethod
    def is_main() -> bool:
        return True

    @staticmethod
    def from_main(value: Any) -> Any:
        return value

    @staticmethod
    def gathered(value: Any) -> list[Any]:
        return [value]


@dataclass
class _Job:
    """One build by one process: what every part needs, and what has been done so far."""

    data: DataConfig
    tokenizer: TextTokenizer
    folder: Folder
    progress: Progress | None
    group: Any  # `processes`, or `_Alone`
    bytes_total: int | None = None
    documents: int = 0
    tokens: int = 0
    bytes_done: int = 0  # of the shards that are finished
    sources: list[SourceConfig] = field(default_factory=list)
    streams: dict[int, Any] = field(default_factory=dict)  # datasets of the Hub, by the number of the source
    made: list[str] = field(default_factory=list)  # names of the parts that were written

    def report(self, counts: DocumentCounts, *, documents: int, tokens: int) -> None:
        self.documents += documents
        self.tokens += tokens
        if self.progress is not None:
            done = self.bytes_done + counts.bytes_read
            self.progress(documents=self.documents, tokens=self.tokens, bytes_done=done, bytes_total=self.bytes_total)

    def watched(self, documents: Iterator[str], counts: DocumentCounts) -> Iterator[str]:
        """The documents, while the progress shows how far they have been read."""
        for number, document in enumerate(documents):
            if number % WATCHED_DOCUMENTS == 0:
                self.report(counts, documents=0, tokens=0)
            yield document

    def reader(self, shard: Shard, counts: DocumentCounts) -> ShardReader:
        source = self.sources[shard.source]
        if source.path is None and shard.source not in self.streams:
            self.streams[shard.source] = hub_stream(source)
        return ShardReader(source, shard, counts, self.streams.get(shard.source))


def _build(job: _Job, plan: dict[str, Any]) -> list[str]:
    """Makes every shard that is not there yet, each process its share; the main one writes the manifest. Names of the parts made."""
    own_name = uuid.uuid4().hex
    names = job.group.gathered(own_name)
    index, count = names.index(own_name), len(names)
    shards = [Shard.from_json(fields) for fields in plan["shards"]]
    job.sources = _pinned(job.data, plan["revisions"])
    job.folder.make()
    with job.group.together():
        checked = {number: layout.read_shard(job.folder, shards[number], check_files=True) for number in range(index, len(shards), count)}
    unfinished = job.group.gathered([number for number, shard in checked.items() if shard is None])
    # The large ones first, in turns, so that no process ends up with all of them.
    todo = sorted(itertools.chain(*unfinished), key=lambda number: (-shards[number].size, number))
    own = [shards[number] for number in sorted(todo[index::count])]
    search = job.data.deduplicate and bool(todo)
    to_hash = [shard for shard in shards[index::count] if search and not duplicates.is_hashed(job.folder, shard)]
    done = [(shards[number], parts) for number, shard in checked.items() if shard for parts in shard[1:]]
    if all(source.path is not None for source in job.sources):
        job.bytes_total = sum(shard.size for shard in itertools.chain((shard for shard, _ in done), to_hash, own))
    for shard, parts in done:
        job.report(DocumentCounts(), documents=_sum(parts, "documents"), tokens=_sum(parts, "tokens"))
        job.bytes_done += shard.size
    if search:
        _find_duplicates(job, shards, to_hash, plan["fingerprint"])
    with job.group.together():
        for shard in own:
            _make_shard(job, shard)
    with job.group.together():
        if job.group.is_main():
            _finish(job, shards, plan["fingerprint"])
    return sorted(itertools.chain(*job.group.gathered(job.made)))


def _sum(parts: list[dict[str, Any]], what: str) -> int:
    return sum(part[what][split] for part in parts for split in SPLITS)


def _find_duplicates(job: _Job, shards: list[Shard], own: list[Shard], fingerprint: str) -> None:
    with job.group.together():
        for shard in own:
            counts = DocumentCounts()
            reader = job.reader(shard, counts)
            duplicates.write_hashes(job.folder, shard, job.watched(with_text(reader, counts), counts))
            reader.check()
            job.bytes_done += shard.size
    with job.group.together():
        if job.group.is_main():
            duplicates.mark_duplicates(job.folder, shards, fingerprint)


def _make_shard(job: _Job, shard: Shard) -> None:
    """Writes the parts of a shard that are not there yet, then its record; documents of a finished part are read past."""
    counts = DocumentCounts()
    reader = job.reader(shard, counts)
    documents = with_text(reader, counts)
    if job.data.deduplicate:
        documents = duplicates.without_duplicates(job.folder, shard, documents, counts)
    parts = 0
    while True:
        record = layout.read_part(job.folder, shard, parts, check_files=True)
        if record is not None:
            deque(itertools.islice(documents, sum(record["documents"].values())), maxlen=0)
            job.report(counts, documents=_sum([record], "documents"), tokens=_sum([record], "tokens"))
        elif not _write_part(job, shard, parts, documents, counts, reader):
            break
        parts += 1
    record = {"fingerprint": shard.fingerprint, "source": shard.source, "shard": shard.shard, "parts": parts}
    record |= {what: getattr(counts, what) for what in ("skipped", "invalid_utf8", "duplicates")}
    job.folder.write(layout.shard_file(shard), layout.sealed(record))
    job.bytes_done += shard.size


def _write_part(job: _Job, shard: Shard, part: int, documents: Iterator[str], counts: DocumentCounts, reader: ShardReader) -> bool:
    """Tokenises, packs and writes the next documents up to `PART_BYTES`; False if there are none left."""
    encoded: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    part_bytes = 0
    while part_bytes < PART_BYTES:
        texts, splits, size = next_batch(documents, min(BATCH_BYTES, PART_BYTES - part_bytes), job.data.held_out)
        if not texts:
            break
        part_bytes += size
        arrays = job.tokenizer.encode(texts)
        for split, ids in zip(splits, arrays, strict=True):
            encoded[split].append(ids)
        job.report(counts, documents=len(texts), tokens=sum(map(len, arrays)))
    if not part_bytes:
        return False
    record: dict[str, Any] = {
        "fingerprint": shard.fingerprint,
        "source": shard.source,
        "shard": shard.shard,
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
        for kind, rows in zip(layout.KINDS, (tokens, segments, layout.row_checksums(tokens, segments)), strict=True):
            name = layout.row_file(record, split, kind)
            record["files"][name] = job.folder.write(name, rows.tobytes())
    reader.check()
    job.folder.write(layout.record_file(record), layout.sealed(record))
    job.made.append(layout.part_name(record))
    return True


def _finish(job: _Job, shards: list[Shard], fingerprint: str) -> None:
    """The manifest, once every shard is there."""
    made = []
    for shard in shards:
        found = layout.read_shard(job.folder, shard, check_files=False)
        if found is None:
            raise InputError(f"{job.folder.place}: what another process made is not there; data.store is a place that all processes reach")
        made.append((shard, *found))
    try:
        manifest = store_manifest(job.data, job.tokenizer, fingerprint, made)
    except InputError:
        layout.remove_stale(job.folder, [], keep_text=False)  # the input must change: no part of it would be used again
        raise
    job.folder.write(layout.MANIFEST, layout.to_json(manifest))
    if job.data.deduplicate:
        layout.remove_text(job.folder)
