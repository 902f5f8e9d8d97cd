"""What a student's card says of its text: where it is from, in which languages, how much of it there is and how it was drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.card.cells import HUB_NAME, cell, linked
from jaxdistill.config import SourceConfig
from jaxdistill.data import languages, source_name
from jaxdistill.resolve import Run
from jaxdistill.urls import is_url

Manifest = Mapping[str, Any]

_ON_HUB = re.compile(r"hf://datasets/(?P<dataset>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/|\Z)")
_CODE = re.compile(r"[a-z]{2,3}")  # ISO 639, which is what the Hub's metadata takes


def datasets_of(run: Run, manifest: Manifest | None) -> list[str]:
    """Datasets of the Hub that the text is from."""
    return list(dict.fromkeys(filter(None, (_dataset(source) for source in _sources(run, manifest)))))


def codes_of(run: Run, manifest: Manifest | None) -> list[str] | None:
    """Languages of the text for the card's metadata; None: no source says one."""
    said = [source.language for source in _sources(run, manifest) if source.language]
    return [code for code in dict.fromkeys(said) if _CODE.fullmatch(code)] if said else None


def text_rows(run: Run, manifest: Manifest | None) -> list[tuple[str, str]]:
    """Rows of the card's table.

    Args:
      manifest: of the token store that the run read; None: it is not at hand, or there is none.
    """
    data = run.config.data
    if run.task:
        return [("task", f"{run.task.title} ({data.task.name}), one example a row")]
    known = _known(manifest)
    sources = [_described(source, known[i] if known else {}) for i, source in enumerate(_sources(run, manifest))]
    unseen = "; as the config names it: its token store was there already and could not be asked" if _is_remote(run) and not known else ""
    rows = [("text", "; ".join(sources) + unseen)]
    said = [_size(manifest.get("totals"))] if manifest and len(sources) > 1 else []
    said += ["duplicates left out" if manifest.get("deduplicate") else ""] if manifest else ["deduplicated" if data.deduplicate else ""]
    said.append(f"{100 * data.held_out:g} % of the documents held out, not trained on" if data.held_out else "nothing held out")
    if data.sampling_exponent is not None:
        said.append(f"a language is drawn by its share of the rows to the power {data.sampling_exponent:g}")
    said.append("read as a stream" if data.streaming else "")
    return [*rows, ("text, in all", "; ".join(filter(None, said)))]


def tokens_by_language(run: Run, record: Mapping[str, Any]) -> str:
    """Of a record of the run's metrics, where it counts several languages: " (en 1,000, de 900)"."""
    if run.task:
        return ""
    counts = {name: record.get(f"tokens/{name}") for name in languages(run.config.data)}
    shown = [f"{cell(name.replace('source_', 'text '))} {count:,}" for name, count in counts.items() if isinstance(count, int)]
    return f" ({', '.join(shown)})" if shown else ""


def _is_remote(run: Run) -> bool:
    return is_url(run.store) and not run.config.data.streaming


def _known(manifest: Manifest | None) -> list[Mapping[str, Any]]:
    found = manifest.get("sources") if manifest else None
    return found if isinstance(found, list) and all(isinstance(each, Mapping) for each in found) else []


def _sources(run: Run, manifest: Manifest | None) -> Sequence[SourceConfig]:
    """Those of the config; of a store at a URL, which is used as it lies, those that it was made from, where they go by another name."""
    sources, known = run.config.data.sources or (), _known(manifest)
    if not _is_remote(run) or len(known) != len(sources):
        return sources
    return [_as_made(source, each) for source, each in zip(sources, known, strict=True)]


def _as_made(source: SourceConfig, known: Mapping[str, Any]) -> SourceConfig:
    name, language = str(known.get("source")), source.language or known.get("language")
    said = {"weight": source.weight, "language": str(language) if language else None}
    if name == source_name(source):
        return source.model_copy(update=said)
    if is_url(name) or Path(name).is_absolute() or not HUB_NAME.match(name):
        return SourceConfig.model_construct(path=name, **said)
    owner, dataset, *configuration = name.split("/", 2)
    return SourceConfig.model_construct(dataset=f"{owner}/{dataset}", name="".join(configuration) or None, split="", **said)


def _dataset(source: SourceConfig) -> str | None:
    found = _ON_HUB.match(source.path or "")
    return found["dataset"] if found else source.dataset


def _described(source: SourceConfig, known: Mapping[str, Any]) -> str:
    language = f" ({cell(source.language)})" if source.language else ""
    share = "" if source.weight is None else f", weight {source.weight:g}"
    size = f", {size}" if (size := _size(known)) else ""
    return f"{_place(source)}{language}{share}{size}"


def _place(source: SourceConfig) -> str:
    on_hub = _ON_HUB.match(source.path or "")
    if source.path is not None and not on_hub:  # the name alone: where it lay is nobody's business
        return f"`{cell(Path(source.path).name)}`"
    dataset = str(_dataset(source))
    name = linked(dataset, f"datasets/{dataset}") if HUB_NAME.fullmatch(dataset) else f"`{cell(dataset)}`"
    if on_hub:
        parts, revision = [f"`{cell(source.path[on_hub.end() :])}`"], on_hub["revision"]
    else:
        parts, revision = [cell(part) for part in (source.name, source.split) if part], source.revision
    return ", ".join([name, *parts, *([f"revision `{cell(revision)}`"] if revision else [])])


def _size(counts: Any) -> str:
    """Documents and tokens of an entry of a manifest, over both splits; "" where it does not say them."""
    found = [sum(_numbers(counts, what)) for what in ("documents", "tokens")]
    return f"{found[0]:,} documents of {found[1]:,} tokens" if all(found) else ""


def _numbers(counts: Any, what: str) -> list[int]:
    by_split = counts.get(what) if isinstance(counts, Mapping) else None
    values = list(by_split.values()) if isinstance(by_split, Mapping) else []
    return values if all(type(value) is int for value in values) else []
