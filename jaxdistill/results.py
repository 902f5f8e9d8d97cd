"""What is known of a model, in one JSON file for each: RESULTS/<name>.json, a section for every command that measures.

    {"name", "model": {...}, "scores": {...}, "latency": {...}, "lost": {...}}

`evaluate` writes scores, `latency` latency, `lost` lost; each replaces its own section only. `compare` reads them all.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jaxdistill.errors import InputError
from jaxdistill.models import find_model, hub_origin, load_config, num_parameters, weights_sha256

FORMAT = "jaxdistill results"


class _Loose(pydantic.BaseModel):
    """What readers rely on; there may be more."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class _Run(_Loose):
    seed: int | None
    scores: dict[str, dict[str, float | int]]


class _TaskScores(_Loose):
    runs: list[_Run]
    examples: dict[str, int] = {}
    notes: list[str] = []


class _Protocol(_Loose):
    name: str = ""
    learning_rates: list[float | int] = []
    batch_sizes: list[int] = []
    epochs: int = 0
    epochs_of: dict[str, int] = {}
    seeds: list[int] = []


class _Scores(_Loose):
    tasks: dict[str, _TaskScores]
    protocol: _Protocol = _Protocol()
    missing: dict[str, str] = {}


class _Latency(_Loose):
    measurements: list[dict[str, Any]]


class _HeatMap(_Loose):
    title: str
    rows: list[str | int]
    columns: list[str | int]
    values: list[list[float | int | None]]


class _LostTable(_Loose):
    title: str
    columns: list[str]
    rows: list[list[Any]]


class _Lost(_Loose):
    heatmaps: list[_HeatMap] = []
    tables: list[_LostTable] = []
    answers: list[str] = []


class _Result(_Loose):
    name: str = ""
    model: dict[str, Any]
    scores: _Scores | None = None
    latency: _Latency | None = None
    lost: _Lost | None = None


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
    if origin := hub_origin(folder):
        found["revision"] = origin[1]  # of the Hub: its commit
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
        "teacher_layers": _layers(config.get("teacher")),
        "objective": objective_of(last),
        "before": {name: objective_of(stages[name]) for name in list(stages)[:-1] if _trains(stages[name], student)},
        "task": (data.get("task") or {}).get("name"),
        "initialise": own.get("initialise"),
        "stages": list(stages),
        "tokens": (steps or 0) * (training.get("batch_size") or 0) * (data.get("sequence_length") or 0),
    }


def _layers(teacher: str | None) -> int | None:
    """Of a teacher whose folder is still there; the Hub is not asked for a number."""
    if not teacher or not (Path(teacher) / "config.json").is_file():
        return None
    return load_config(teacher).num_layers


def _trains(stage: dict, student: str) -> bool:
    """Whether a stage trains a student: it names the patterns of those it does, or students of its own; else all."""
    patterns = stage.get("students") or ["*"]
    return any(fnmatch.fnmatchcase(student, pattern) for pattern in patterns)


def find_models(arguments: Iterable[str]) -> dict[str, str]:
    """Name -> folder or Hub id of the models that a command was given, each checked to be there.

    An argument is a model folder, a Hub id, NAME=one of the two, or the folder of a run: then every student in RUN/export.

    Raises:
      InputError: no such model, a run without exports, NAME= of several students, or one name for two models.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or os.path.isdir(os.path.expanduser(argument)):  # a folder's own name may hold the sign
            name, path = "", argument
        models = _exports(find_model(path)) or {_own_name(path): path}
        if name and len(models) > 1:
            raise InputError(f"{argument}: {path} is a run of {len(models)} students; name one of them, as in NAME={models.popitem()[1]}")
        for own, place in models.items():
            if (name or own) in found:
                raise InputError(f"{place}: there is a model {name or own!r} already ({found[name or own]}); name one by NAME={place}")
            found[name or own] = place
    files: dict[Path, str] = {}
    for name in found:
        file = result_file(Path(), name)
        if file in files:
            raise InputError(f"{name}: its results would lie in {file} as those of {files[file]}; name one of them by NAME={found[name]}")
        files[file] = name
    return found


def _own_name(path: str) -> str:
    return model_name(os.path.abspath(path)) if os.path.isdir(os.path.expanduser(path)) else model_name(path)


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
    safe = re.sub(r"[^\w.-]", "_", name)
    return folder / f"{safe}.json"


def is_result(path: Path) -> bool:
    """Whether a JSON file is one of results, or cannot be read and might be: others may lie beside them."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return isinstance(value, dict) and value.get("format") == FORMAT


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
    try:
        _Result.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {place}: not as the commands write it: {first['msg']}; delete the file, or measure again") from None
    return value


def write_section(folder: Path, name: str, model: dict[str, Any], section: str, content: dict[str, Any]) -> Path:
    """Put one section into the model's file, whole or not at all; the others stay. Raises as `update_section`."""
    return update_section(folder, name, model, section, lambda before: content)


def update_section(
    folder: Path,
    name: str,
    model: dict[str, Any],
    section: str,
    change: Callable[[dict[str, Any] | None], dict[str, Any]],
    *,
    replace: bool = False,
) -> Path:
    """Change one section of the model's file as it is now, so that two commands at once lose nothing of each other.

    Args:
      change: from the section that is there, or None, to the new one.
      replace: a file of a model with other weights is begun anew.

    Raises:
      InputError: the file is of a model with other weights.
    """
    if section not in SECTIONS:
        raise ValueError(f"unknown section {section}")
    path = result_file(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        value: dict[str, Any] = {"format": FORMAT, "name": name}
        if path.exists() and not (replace and not is_same_model(read_result(path), model)):
            value = read_result(path)
            check_same_model(value, model, path)
        value |= {"model": model, section: change(value.get(section))}
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    return path


def is_same_model(value: dict[str, Any], model: dict[str, Any]) -> bool:
    return value["model"].get("weights_sha256") == model["weights_sha256"]


def check_same_model(value: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Raises InputError when a file of results is of a model with other weights."""
    if not is_same_model(value, model):
        raise InputError(
            f"{path}: results of a model with other weights ({value['model'].get('source')}); give this one another name (NAME=PATH), "
            f"or another folder of results, or delete the file"
        )
