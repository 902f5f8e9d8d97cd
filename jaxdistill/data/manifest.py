"""What the manifest of a token store must hold for its rows to be read; it may come from anywhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxdistill.data import layout
from jaxdistill.errors import InputError

_Count = Annotated[int, Field(ge=0, lt=2**40)]

DAMAGED = "the token store is damaged: `jaxdistill prepare CONFIG --verify` makes its damaged parts again, then start the run again"


class _Read(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")


class _Rows(_Read):
    train: _Count
    held_out: _Count


class _Source(_Read):
    source: str
    rows: _Rows


class _Part(_Read):
    # Numbers only: names of files are made from them, so that none can lead out of the store.
    source: _Count
    shard: _Count
    part: _Count
    rows: _Rows


class _Tokenizer(_Read):
    fingerprint: str


class _Manifest(_Read):
    fingerprint: str
    tokenizer: _Tokenizer
    dtype: Literal["<u2", "<u4"]
    sequence_length: Annotated[int, Field(ge=8, le=8192)]
    held_out: float
    sources: Annotated[list[_Source], Field(min_length=1)]
    parts: list[_Part]


def check_manifest(manifest: Any, where: str) -> None:
    """Raises InputError where this is not the manifest of a token store of this version, or its numbers do not agree."""
    if not isinstance(manifest, dict) or manifest.get("format") != layout.FORMAT:
        raise InputError(f"{where}: not the manifest of a token store")
    if manifest.get("version") != layout.VERSION:
        raise InputError(f"{where}: a token store of version {manifest.get('version')!r}, this is {layout.VERSION}; run prepare")
    try:
        read = _Manifest.model_validate(manifest)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {place}: {first['msg']}; {DAMAGED}") from None
    totals = [dict.fromkeys(layout.SPLITS, 0) for _ in read.sources]
    before = (-1, -1, -1)
    for part in read.parts:
        place = (part.source, part.shard, part.part)
        if place <= before or part.source >= len(totals):
            raise InputError(f"{where}: its parts are not in order, or of a source that is not there; {DAMAGED}")
        before = place
        for split in layout.SPLITS:
            totals[part.source][split] += getattr(part.rows, split)
    if totals != [source.rows.model_dump() for source in read.sources]:
        raise InputError(f"{where}: its parts have other rows than its sources; {DAMAGED}")
