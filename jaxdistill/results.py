"""What is known of a model, in one JSON file for each: RESULTS/<name>.json, a section for every command that measures.

    {"name", "model": {...}, "scores": {...}, "latency": {...}, "lost": {...}}

`evaluate` writes scores, `latency` latency, `lost` lost; each replaces its own section only. `compare` reads them all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from jaxdistill.errors import InputError
from jaxdistill.models import find_model, load_config, num_parameters, weights_sha256

FORMAT = "jaxdistill results"
SECTIONS = ("scores", "latency", "lost")


def describe_model(path_or_hub_id: str | Path) -> dict[str, Any]:
    """Section `model`: where it lies, its hash and shape; of an exported student also what it was distilled from and how.

    Raises:
      InputError: no such model.
    """
    folder = find_model(path_or_hub_id)
    config = load_config(folder)
    sizes = ("family", "num_layers", "num_heads", "hidden_size", "intermediate_size", "vocab_size")
    found: dict[str, Any] = {"source": str(path_or_hub_id), "weights_sha256": weights_sha256(folder)}
    found |= {name: getattr(config, name) for name in sizes} | {"parameters": num_parameters(config)}
    # RUN/export/<student>: the run's config says what it is.
    run = folder.absolute().parent.parent
    if folder.absolute().parent.name == "export" and (run / "config.yaml").is_file():
        found["distilled"] = _distilled(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")), folder.absolute().name)
    return found


def _distilled(config: dict, student: str) -> dict[str, Any] | None:
    """Teacher, terms and tokens of a student, from its run's config; of several stages, the last one's, and the terms before it."""
    own = (config.get("students") or {}).get(student) or {}
    training, data = config.get("training") or {}, config.get("data") or {}
    stages = {name: stage or {} for name, stage in (config.get("stages") or {}).items()}
    last = stages[list(stages)[-1]] if stages else {}
    if isinstance(last.get("students"), dict):  # students of the stage's own
        own = last["students"].get(student) or {}

    def objective_of(stage: dict) -> Any:
        # What a stage says goes over the student's own, as in `stages.py`.
        return stage.get("objective") or own.get("objective") or config.get("objective") or []

    steps = (last.get("training") or {}).get("steps") or training.get("steps")
    return {
        "teacher": config.get("teacher_name") or config.get("teacher"),
        "objective": objective_of(last),
        "before": {name: objective_of(stages[name]) for name in list(stages)[:-1]},
        "initialise": own.get("initialise"),
        "stages": list(stages),
        "tokens": (steps or 0) * (training.get("batch_size") or 0) * (data.get("sequence_length") or 0),
    }


def find_models(arguments: Iterable[str]) -> dict[str, str]:
    """Name -> folder or Hub id of the models that a command was given, each checked to be there.

    An argument is a model folder, a Hub id, NAME=one of the two, or the folder of a run: then every student in RUN/export.

    Raises:
      InputError: no such model, a run without exports, NAME= of several students, or one name for two models.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).expanduser().is_dir():  # a folder's own name may hold the sign
            name, path = "", argument
        models = _exports(find_model(path)) or {_own_name(path): path}
        if name and len(models) > 1:
            raise InputError(f"{argument}: {path} is a run of {len(models)} students; name one of them, as in NAME={models.popitem()[1]}")
        for own, place in models.items():
            if (name or own) in found:
                raise InputError(f"{place}: there is a model {name or own!r} already ({found[name or own]}); name one by NAME={place}")
            found[name or own] = place
    return found


def _own_name(path: str) -> str:
    return model_name(os.path.abspath(path)) if Path(path).expanduser().is_dir() else model_name(path)


def _exports(folder: Path) -> dict[str, str]:
    """The students that a run has exported; of a folder that is no run, nothing."""
    if not (folder / "config.yaml").is_file():
        return {}
    places = sorted(place for place in folder.glob("export/*") if (place / "config.json").is_file() and not place.name.startswith("."))
    if not places:
        raise InputError(f"{folder}: a run without exported students; jaxdistill export {folder} writes them")
    return {place.name: str(place) for place in places}


def model_name(path_or_hub_id: str | Path) -> str:
    """Name of a model in tables and of its file: the last part of its path."""
    return Path(str(path_or_hub_id).rstrip("/")).name


def result_file(folder: Path, name: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def read_result(path: Path) -> dict[str, Any]:
    """One file of results.

    Raises:
      InputError: not such a file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as results: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InputError(f"{path}: not a file of results (evaluate, latency and lost write them)")
    return value


def write_section(folder: Path, name: str, model: dict[str, Any], section: str, content: dict[str, Any]) -> Path:
    """Put one section into the model's file, whole or not at all; the others stay.

    Raises:
      InputError: the file is of a model with other weights.
    """
    if section not in SECTIONS:
        raise ValueError(f"unknown section {section}")
    path = result_file(folder, name)
    value: dict[str, Any] = {"format": FORMAT, "name": name}
    if path.exists():
        value = read_result(path)
        check_same_model(value, model, path)
    value |= {"model": model, section: content}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def check_same_model(value: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Raises InputError when a file of results is of a model with other weights."""
    if value.get("model", {}).get("weights_sha256") != model["weights_sha256"]:
        raise InputError(
            f"{path}: results of a model with other weights ({value.get('model', {}).get('source')}); give this one another name "
            f"(NAME=PATH), or another folder of results"
        )
