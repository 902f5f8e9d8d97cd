"""What a comparison says in words: its first sentences, how it was made, and where the published numbers are from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxdistill.compare.board import Board
from jaxdistill.compare.cells import Cell
from jaxdistill.compare.entries import Entry
from jaxdistill.compare.published import SOURCES, is_table
from jaxdistill.compare.speed import choose_setting, milliseconds, setting_title
from jaxdistill.compare.table import task_title

KEPT = 0.95


def headline(board: Board) -> list[str]:
    """Who scores best, and how much of the reference is kept at what size and speed."""
    key = board.score_key()
    scored = [entry for entry in board.measured if key and board.cell(entry, key)]
    if not scored:
        return _without_scores(board, key)
    what = _what(board, key)
    best = max(scored, key=lambda entry: board.cell(entry, key).mean)
    said = [f"{best.name} scores best of {_models(len(scored))}: {_score(board.cell(best, key))} ({what})."]
    reference = board.reference if board.reference and board.cell(board.reference, key) else None
    others = [entry for entry in scored if entry is not reference]
    if reference is None or not others:
        return said
    closest = max(others, key=lambda entry: board.cell(entry, key).mean)
    if best is reference:
        said = [f"{best.name}, the reference, scores best of {_models(len(scored))}: {_score(board.cell(best, key))} ({what})."]
        said.append(f"{closest.name} comes closest: {_score(board.cell(closest, key))}, {_kept(board, closest, key)}.")
    else:
        said.append(f"That is {_kept(board, best, key)}.")
    enough = KEPT * board.cell(reference, key).mean
    kept = [entry for entry in others if board.cell(entry, key).mean >= enough and entry.parameters]
    smallest = min(kept, key=lambda entry: entry.parameters, default=None)
    if smallest and smallest is not closest:
        said.append(f"{smallest.name} is the smallest that keeps {KEPT:.0%}: {_kept(board, smallest, key)}.")
    return said


def _without_scores(board: Board, key) -> list[str]:
    rows = [entry for entry in board.entries if key and board.cell(entry, key)]
    if not rows:
        return [f"{_models(len(board.entries)).capitalize()}, none with a score: run `jaxdistill evaluate` on them."]
    best = max(rows, key=lambda entry: board.cell(entry, key).mean)
    said = [f"{best.name} has the highest published score of {len(rows)}: {_score(board.cell(best, key))} ({_what(board, key)})."]
    return said + [f"{_models(len(board.measured)).capitalize()} measured here, none with a score."] * bool(board.measured)


def _what(board: Board, key) -> str:
    return board.columns[key].replace(" (", ", ").removesuffix(")")


def _models(count: int) -> str:
    return "one model" if count == 1 else f"{count} models"


def _score(cell: Cell) -> str:
    return f"{cell.mean:.1f}" + (f" ± {cell.deviation:.1f}" if cell.deviation is not None else "")


def _kept(board: Board, entry: Entry, key) -> str:
    """`96.4% of bert-base with 15% of its parameters (16.3 M), 8.2 times as fast`."""
    reference = board.reference
    said = f"{board.cell(entry, key).mean / board.cell(reference, key).mean:.1%} of {reference.name}'s"
    if entry.parameters and reference.parameters:
        said += f", with {entry.parameters / reference.parameters:.0%} of its parameters ({entry.parameters / 1e6:.1f} M)"
    setting = choose_setting(board.measured)
    ours, theirs = milliseconds(entry, setting), milliseconds(reference, setting)
    if ours and theirs:
        times = theirs[0] / ours[0]
        said += f", {times:.1f} times as fast" if times >= 1.05 else f", {1 / times:.1f} times as slow" if times <= 0.95 else ", as fast"
    return said


def how_made(board: Board, inputs: Sequence[str], results: Path, output: Path, reference: str | None) -> list[str]:
    """The protocol of every model and the command to make this page again, without a path of this machine."""
    by_protocol: dict[str, list[str]] = {}
    for entry in board.measured:
        if entry.cells:
            by_protocol.setdefault(_protocol(entry), []).append(entry.name)
    commonest = max(by_protocol.values(), key=len, default=[])
    lines = []
    for protocol, names in sorted(by_protocol.items(), key=lambda each: each[1] is commonest):
        whose = "all the others" if names is commonest and len(names) > 1 else ", ".join(names)
        lines.append(f"Fine-tuning: {protocol}" + (f" ({whose})" if len(by_protocol) > 1 else ""))
    if len(by_protocol) > 1:
        lines.append("The protocols differ: scores of models under different ones are not the same measurement.")
    if setting := choose_setting(board.measured):
        processors = sorted(
            {str(entry.latency.get("processor") or "a processor that is not named") for entry in board.measured if entry.latency}
        )
        apart = "; of different machines: not the same measurement" if len(processors) > 1 else ""
        lines.append(f"Latency: {setting_title(setting)}, mean ± deviation over repeats, on {', '.join(processors)}{apart}.")
    options = ["--results", _here(results)] + ["--output", _here(output)] + (["--reference", reference] if reference else [])
    command = shlex.join(["jaxdistill", "compare", *(each if is_table(each) else _here(Path(each)) for each in inputs), *options])
    return [*lines, f"To repeat: {command}"]


def _protocol(entry: Entry) -> str:
    said = entry.protocol
    if said.get("train") is False:
        return "scored as they are, not fine-tuned here"
    epochs = f"{said.get('epochs', '?')} epochs"
    if of := said.get("epochs_of"):
        epochs += f" ({', '.join(f'{task_title(task)} {count}' for task, count in of.items())})"
    parts = [
        str(said.get("name") or "unnamed protocol"),
        f"learning rate {_listed(said.get('learning_rates'))}",
        f"batch {_listed(said.get('batch_sizes'))}",
        epochs,
        f"seeds {_listed(said.get('seeds'))}",
    ]
    if said.get("report"):
        parts.append(
            {"last": "score after the last epoch", "best": "best epoch and setting on the dev set"}.get(said["report"], str(said["report"]))
        )
    if said.get("train_limit"):
        parts.append(f"at most {said['train_limit']:,} training rows")
    usual = {"max_length": 128, "warmup": 0.0, "weight_decay": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0}
    usual["precision"] = "float32"
    parts += [f"{name.replace('_', ' ')} {said[name]}" for name, value in usual.items() if said.get(name, value) != value]
    return ", ".join(parts)


def _listed(values) -> str:
    return "/".join(f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value) for value in values) if values else "?"


def _here(path: Path) -> str:
    """A path as this page may show it: relative to where the command runs, else its last part."""
    path = path.expanduser()
    if path.is_absolute() or ".." in path.parts:
        resolved = path.resolve()
        return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else resolved.name
    return str(path)


def sources(board: Board) -> list[str]:
    """The papers whose numbers are shown, and which row stands beside which model."""
    used = {entry.row.source for entry in board.entries if entry.row}
    lines = [f"{name}: {SOURCES[name]}" for name in SOURCES if name in used]
    for entry in board.measured:
        if entry.row:
            shown = sorted({board.published(entry, key)[1] for key in board.keys if board.published(entry, key)})
            where = f"; shown from {', '.join(shown)}" if shown else "; none of its scores is comparable to ours here"
            lines.append(f"{entry.name} stands beside {entry.row.name}{where}")
    students = [entry for entry in board.measured if not entry.row and entry.model.get("distilled")]
    return lines + [f"{entry.name} stands beside none: {entry.why}" for entry in students]
