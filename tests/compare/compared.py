"""Files of results with scores that a person can check, for the tests of `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxdistill.compare.board import Board, make_board
from jaxdistill.compare.entries import read_inputs

SHAPE = {"num_layers": 3, "num_heads": 12, "hidden_size": 384, "intermediate_size": 1024}
MODEL = SHAPE | {"source": "/home/someone/private/runs/a/export/x", "family": "bert", "vocab_size": 30522, "parameters": 16_000_000}
MINILM = {"kind": "relation_kl", "layer_map": {"strategy": "teacher_layer", "teacher_layer": -3}}


def distilled(*objective: Any, **more: Any) -> dict[str, Any]:
    return {"teacher": "google-bert/bert-base-uncased", "objective": list(objective), "initialise": "random", "stages": []} | more


def runs(*scores: float, metric: str = "accuracy", split: str = "validation", **setting: Any) -> list[dict[str, Any]]:
    """One run a seed."""
    own = {"learning_rate": 2e-5, "batch_size": 32, "epochs": 3} | setting
    return [own | {"seed": seed, "seconds": 1.0, "scores": {split: {metric: score}}} for seed, score in enumerate(scores)]


def task(listed: list[dict[str, Any]], train: int = 100, available: int = 100, **more: Any) -> dict[str, Any]:
    return {"examples": {"train": train, "train_available": available, "validation": 50}, "runs": listed, "notes": []} | more


def write_result(folder: Path, name: str, tasks: dict[str, Any] | None, model: dict[str, Any] | None = None, **sections: Any) -> Path:
    """`name`.json; `model` goes over MODEL, with the name as the hash of the weights."""
    value: dict[str, Any] = {"format": "jaxdistill results", "name": name, "model": MODEL | {"weights_sha256": name} | (model or {})}
    if tasks is not None:
        protocol = {"name": "udagawa2023", "learning_rates": [2e-5], "batch_sizes": [32], "epochs": 3, "seeds": [0, 1, 2], "report": "last"}
        value["scores"] = {"protocol": protocol, "tasks": tasks, "missing": {}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.glob('*.json'))):02}.json"
    path.write_text(json.dumps(value | sections), encoding="utf-8")
    return path


def board_of(*inputs: Any, reference: str | None = None, results: str = "no such folder") -> Board:
    return make_board(read_inputs([str(each) for each in inputs], Path(results)), reference)


def entry_of(board: Board, name: str):
    return next(entry for entry in board.entries if entry.name == name)
