"""What an output folder that exists already means: a run to go on with, or nothing of ours."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.config import Config
from jaxdistill.config import load_config as read_config
from jaxdistill.errors import InputError
from jaxdistill.faults.disk import writing

# Files of a run folder. Anything else in it means that the folder is not ours to write.
RUN_FILES = frozenset(
    "config.yaml checkpoints metrics.jsonl metrics.jsonl.tmp tensorboard wandb wandb_id loss.png summary.md diverged.md export tokens "
    "stages".split()
)
# Fields that may change between the parts of a run: they change neither the batches nor, beyond rounding, the numbers.
# The weights of the teacher and the text are compared by content, so both may move.
FREE_FIELDS = frozenset(
    "output teacher teacher_name mesh kernels export data.store data.tokenizer data.sources.*.path data.task.data training.micro_batches "
    "training.rematerialise training.freeze_after training.spike_factor training.rollbacks training.log_every training.evaluate_every "
    "training.evaluate_rows training.checkpoint_every training.keep_checkpoints training.tensorboard training.wandb".split()
)

_FREE_CHECKPOINT = re.compile(r"(stages\.[^.]+\.)?students\..+\.initialise\.checkpoint")  # read once, at the start
_IN_STAGE = re.compile(r"stages\.[^.]+\.(?=training\.|teacher$)")  # a stage's own are as free as the run's

_HEADER = "# The resolved config of a jaxdistill run, written by it.\n"


def check_output(config: Config, *, overwrite: bool) -> bool:
    """Whether the output folder holds a run of this config to go on with; writes nothing.

    1. Nothing there (or a token store alone): a new run.
    2. A run, and `overwrite`: its files are removed, the token store kept; a new run.
    3. A run of a config that agrees in all that its numbers depend on: go on from its newest checkpoint, or from the
       start if there is none yet. A finished run is one whose newest checkpoint is its last step.
    4. Anything else is refused.

    Raises:
      InputError: other files in the folder, or a field that breaks continuity, by its name.
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output: {folder} is a file; give a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if foreign := sorted(name for name in there - RUN_FILES if not name.startswith(".")):
        raise InputError(f"output: {folder} exists and is not the folder of a run (it holds {foreign[0]}); give a new folder")
    if "config.yaml" in there and not (folder / "config.yaml").read_text(encoding="utf-8").startswith(_HEADER):
        raise InputError(f"output: {folder} holds a config.yaml that no run wrote; give a new folder")
    if "config.yaml" in there and not overwrite:
        _check_continuity(read_config(folder), config, folder)
        return True
    if there & RUN_FILES - {"tokens"} and not overwrite:
        raise InputError(f"output: {folder} holds parts of a run but no config.yaml; give a new folder, or --overwrite")
    return False


@contextlib.contextmanager
def hold_output(config: Config) -> Iterator[None]:
    """Makes the folder and holds it, so that a second process does not write the same run. The lock dies with its process.

    Raises:
      InputError: another process holds it, or the folder cannot be written.
    """
    folder = Path(config.output)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"output: {folder} cannot be written: {error.strerror}") from None
    try:
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"output: another process is working on the run in {folder}") from None
            yield
    finally:
        if new and {path.name for path in folder.iterdir()} <= {".lock"}:  # nothing came of it
            shutil.rmtree(folder)


def begin_output(config: Config, *, goes_on: bool) -> None:
    """Write config.yaml; for a new run, remove an earlier one's files (not the token store) first."""
    folder = Path(config.output)
    # config.yaml goes first: killed on the way, the folder is no run any more rather than half of one.
    for name in () if goes_on else ("config.yaml", *(RUN_FILES - {"tokens", "config.yaml"})):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    temporary = folder / ".config.yaml.tmp"
    with writing("output", folder):
        temporary.write_text(_HEADER + config.to_yaml(), encoding="utf-8")
        temporary.replace(folder / "config.yaml")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{path}.{i}").items()}
    return {path: value}


def _is_free(path: str) -> bool:
    path = _IN_STAGE.sub("", path)
    parts = ["*" if part.isdigit() else part for part in path.split(".")]
    return _FREE_CHECKPOINT.fullmatch(path) is not None or any(".".join(parts[:n]) in FREE_FIELDS for n in range(1, len(parts) + 1))


def _check_continuity(saved: Config, config: Config, folder: Path) -> None:
    # The names of the stages and their order, which the fields alone do not show.
    before, now = (_flat(each.model_dump(mode="json")) | {"stages": list(each.stages)} for each in (saved, config))
    for path in [*before, *(path for path in now if path not in before)]:
        if before.get(path) != now.get(path) and not _is_free(path):
            raise InputError(
                f"{path}: the run in {folder} has {before.get(path)!r}, this config {now.get(path)!r}; "
                f"going on would be another run: give a new output folder, or --overwrite"
            )
