"""The manifest of a token store, from the records of its shards and parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data import layout
from jaxdistill.data.layout import SPLITS
from jaxdistill.data.shards import Shard
from jaxdistill.data.sources import source_name
from jaxdistill.data.tokenizer import TextTokenizer
from jaxdistill.errors import InputError

Record = dict[str, Any]
Made = tuple[Shard, Record, list[Record]]  # a shard, its record, those of its parts

BY_SPLIT = ("documents", "tokens", "rows")
LEFT_OUT = ("skipped", "invalid_utf8", "duplicates")


def store_manifest(data: DataConfig, tokenizer: TextTokenizer, fingerprint: str, made: Sequence[Made]) -> Record:
    """What manifest.json holds.

    Args:
      made: every shard of every source, in order.

    Raises:
      InputError: a source without text, or an empty part of the split.
    """
    summaries = []
    for number, source in enumerate(data.sources):
        summary = _summary(source, [each for each in made if each[0].source == number])
        if not sum(summary["tokens"].values()):
            repeated = f" and {summary['duplicates']} duplicates" if summary["duplicates"] else ""
            raise InputError(
                f"data.sources.{number} ({source_name(source)}): no text in it: {sum(summary['documents'].values())} documents, "
                f"{summary['skipped']} empty ones{repeated}"
            )
        summaries.append(summary)
    totals = {what: {split: sum(each[what][split] for each in summaries) for split in SPLITS} for what in BY_SPLIT}
    totals |= {what: sum(each[what] for each in summaries) for what in ("bytes", *LEFT_OUT)}
    _check_split(data.held_out, totals)
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "fingerprint": fingerprint,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            **{name: getattr(tokenizer, name) for name in ("cls_id", "sep_id", "pad_id", "mask_id")},
        },
        "dtype": tokenizer.dtype.str,
        "sequence_length": data.sequence_length,
        "held_out": data.held_out,
        "deduplicate": data.deduplicate,
        "totals": totals,
        "sources": summaries,
        "parts": [{key: part[key] for key in ("source", "shard", "part", "rows", "files")} for _, _, parts in made for part in parts],
    }


def verified(place: Any, parts: int, made: Sequence[str]) -> str:
    """What `prepare --verify` found, in a line; `made`: names of the parts that it made again."""
    if not made:
        return f"{place}: all {parts:,} parts are as they were made"
    return f"{place}: {len(made):,} of {parts:,} parts were damaged or missing and were made again: {made[0]}{', ...' if made[1:] else ''}"


def _summary(source: SourceConfig, made: Sequence[Made]) -> Record:
    parts = [part for _, _, own in made for part in own]
    return {
        "source": source_name(source),
        "language": source.language,
        **{what: {split: sum(part[what][split] for part in parts) for split in SPLITS} for what in BY_SPLIT},
        "bytes": sum(part["bytes"] for part in parts),
        **{what: sum(record[what] for _, record, _ in made) for what in LEFT_OUT},
    }


def _check_split(held_out: float, totals: Record) -> None:
    documents = sum(totals["documents"].values())
    if held_out > 0 and not totals["tokens"]["held_out"]:
        raise InputError(
            f"data.held_out: none of the {documents:,} documents falls into the share {held_out}; raise it or set it to 0 (blank lines "
            "divide the documents of text files)"
        )
    if not totals["tokens"]["train"]:
        raise InputError(f"data.held_out: all of the {documents} documents fall into the share {held_out}; lower it or set it to 0")
