"""The models of a comparison: files of results, runs, model folders and rows of published tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdistill.compare.cells import Cell, is_limited, read_cells
from jaxdistill.compare.match import find_published
from jaxdistill.compare.published import TABLES, Key, Published, is_table, select
from jaxdistill.errors import InputError, nearest
from jaxdistill.results import describe_model, is_result, model_name, read_result


@dataclass
class Entry:
    """One model. Of a published row `row` is itself; of one of ours the row that it repeats, or None and `why`."""

    name: str
    measured: bool
    model: dict[str, Any] = field(default_factory=dict)
    cells: dict[Key, Cell] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # task -> reason
    notes: list[str] = field(default_factory=list)
    limited: frozenset[str] = frozenset()  # tasks fine-tuned on fewer rows than there are
    row: Published | None = None
    why: str = ""

    @property
    def parameters(self) -> int | None:
        return self.row.parameters if not self.measured and self.row else self.model.get("parameters")


def read_inputs(inputs: Sequence[str], results: Path) -> list[Entry]:
    """Every model that the inputs name, each once, with the published row that it repeats.

    Raises:
      InputError: an input that is none of the kinds, or that holds nothing to compare.
    """
    found: list[Entry] = []
    known: dict[str, tuple[Path, dict]] | None = None
    for each in inputs:
        path = Path(each).expanduser()
        if not path.exists():
            if not is_table(each):
                raise InputError(f"{each}: neither a file or folder here nor a published table{nearest(each.split(':')[0], TABLES)}")
            found += [_published(row) for row in select(each)]
        elif path.is_file():
            found.append(_measured(read_result(path), path))
        elif folders := _models(path):
            known = _by_weights(results) if known is None else known
            found += [_looked_up(folder, known, results) for folder in folders]
        elif files := [file for file in sorted(path.glob("*.json")) if is_result(file)]:
            found += [_measured(read_result(file), file) for file in files]
        else:
            raise InputError(
                f"{each}: neither results (*.json), nor a run (config.yaml and export/), nor a model (config.json and weights)"
            )
    entries = _once(found)
    depths = {entry.name: entry.model["num_layers"] for entry in entries if isinstance(entry.model.get("num_layers"), int)}
    for entry in entries:
        if entry.measured:
            entry.row, entry.why = find_published(entry.model, depths, str(entry.protocol.get("name", "")))
    return entries


def _models(path: Path) -> list[Path]:
    """The model folders that a path stands for: itself, or the exported students of a run."""
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        return [path]
    if not (path / "config.yaml").is_file():
        return []
    folders = [folder for folder in sorted((path / "export").glob("[!.]*")) if (folder / "config.json").is_file()]
    if not folders:
        raise InputError(f"{path}: a run without exported students (export/*/config.json); finish it, or `jaxdistill export {path}`")
    return folders


def _by_weights(results: Path) -> dict[str, tuple[Path, dict]]:
    """Results by the hash of the weights; the folder need not be there."""
    found = {}
    for path in filter(is_result, sorted(results.glob("*.json")) if results.is_dir() else ()):
        value = read_result(path)
        found[str(value.get("model", {}).get("weights_sha256"))] = (path, value)
    return found


def _looked_up(folder: Path, known: Mapping[str, tuple[Path, dict]], results: Path) -> Entry:
    model = describe_model(folder)
    if model["weights_sha256"] in known:
        path, value = known[model["weights_sha256"]]
        # What the folder says of its distillation: the results may come from a copy elsewhere.
        merged = model if "distilled" in model else value["model"]
        return _measured(value | {"model": merged}, path)
    note = f"no results of these weights in {results.name}/: parameters only"
    return Entry(model_name(folder.absolute()), True, model, notes=[note])


def _measured(value: Mapping[str, Any], path: Path) -> Entry:
    model = value.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("parameters"), int):
        raise InputError(f"{path}: model.parameters: not a number; the file is not as evaluate, latency or lost write it")
    sections = {name: value.get(name) or {} for name in ("scores", "latency", "lost")}
    for name, content in sections.items():
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: {name}: not a mapping; the file is not as evaluate, latency or lost write it")
    scores = sections["scores"]
    cells, notes = read_cells(scores, str(path))
    return Entry(
        name=str(value.get("name") or path.stem),
        measured=True,
        model=dict(model),
        cells=cells,
        protocol=dict(scores.get("protocol") or {}),
        latency=dict(sections["latency"]),
        lost=dict(sections["lost"]),
        missing={str(task): str(reason) for task, reason in (scores.get("missing") or {}).items()},
        notes=notes if cells else [*notes, "no scores"],
        limited=frozenset(task for task, content in scores.get("tasks", {}).items() if is_limited(content)),
    )


def _published(row: Published) -> Entry:
    cells = {key: Cell(alone=score) for key, (score, _) in row.scores.items()}
    return Entry(row.name, False, cells=cells, row=row)


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """One entry for a model that several inputs name; two models of one name get their run's name, or a number."""
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in found:
            before = found[entry.name]
            if not entry.measured and not before.measured:
                continue
            if entry.measured and before.measured and entry.model.get("weights_sha256") == before.model.get("weights_sha256"):
                found[entry.name] = max(before, entry, key=lambda each: len(each.cells))
                continue
            source = Path(str(entry.model.get("source", "")))
            run = source.parent.parent.name if source.parent.name == "export" else ""
            names = [f"{run}/{entry.name}"] * bool(run) + [f"{entry.name} ({i})" for i in range(2, len(found) + 3)]
            entry.name = next(name for name in names if name not in found)
        found[entry.name] = entry
    return list(found.values())
