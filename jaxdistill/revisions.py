"""Models of the Hub in a config, each at one commit: what a branch means may change while a run is away."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.config import CheckpointConfig, Config, StudentConfig, load_config
from jaxdistill.errors import InputError
from jaxdistill.models import pinned, split_revision

Change = Callable[[str, str], str]  # place in the config, model -> model


def pin_models(config: Config) -> Config:
    """The config with every model of the Hub as `owner/name@commit`; folders stay as they are.

    Raises:
      InputError: one line that names the field of a model that is not there.
    """

    def pin(place: str, model: str) -> str:
        try:
            return pinned(model)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None

    return _with_models(config, pin)


def as_begun(config: Config) -> Config:
    """The config with the commits that the run in its output folder began with, where it asks for no other."""
    folder = Path(os.path.expanduser(config.output))
    if not (folder / "config.yaml").is_file():
        return config
    known: dict[str, str] = {}

    def remember(place: str, model: str) -> str:
        known[place] = model
        return model

    _with_models(load_config(folder), remember)

    def recorded(place: str, model: str) -> str:
        before = known.get(place, model)
        return before if before != model and split_revision(before)[0] == model and not os.path.exists(model) else model

    return _with_models(config, recorded)


def _with_models(config: Config, change: Change) -> Config:
    """The config with `change(place, model)` for every model that it names."""
    update: dict[str, Any] = {"teacher": change("teacher", config.teacher), "students": _students(config.students, "students", change)}
    if config.teacher_name is None and update["teacher"] != config.teacher:
        update["teacher_name"] = split_revision(config.teacher)[0]
    if config.data.tokenizer:
        update["data"] = config.data.model_copy(update={"tokenizer": change("data.tokenizer", config.data.tokenizer)})
    stages = {}
    for name, stage in config.stages.items():
        place, own = f"stages.{name}", {}
        if isinstance(stage.teacher, str):
            own["teacher"] = change(f"{place}.teacher", stage.teacher)
        if isinstance(stage.students, dict):
            own["students"] = _students(stage.students, f"{place}.students", change)
        stages[name] = stage.model_copy(update=own)
    return config.model_copy(update=update | {"stages": stages})


def _students(students: Mapping[str, StudentConfig], place: str, change: Change) -> dict[str, StudentConfig]:
    found = {}
    for name, student in students.items():
        start = student.initialise
        if isinstance(start, CheckpointConfig):
            start = start.model_copy(update={"checkpoint": change(f"{place}.{name}.initialise.checkpoint", start.checkpoint)})
            student = student.model_copy(update={"initialise": start})
        found[name] = student
    return found
