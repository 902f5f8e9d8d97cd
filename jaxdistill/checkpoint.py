"""Checkpoints (Orbax, asynchronous), and what a run folder that exists already means."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdistill.checksums import DamagedError, array_path, checksums, damage
from jaxdistill.config import Config
from jaxdistill.config import load_config as read_config
from jaxdistill.data import RowSource
from jaxdistill.errors import InputError, without_abandoned, writing
from jaxdistill.models import weights_sha256
from jaxdistill.processes import gathered, is_main
from jaxdistill.resolve import Run
from jaxdistill.update import StudentState, TrainState

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
_PACKAGES = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


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


def newest_record(config: Config) -> dict[str, Any] | None:
    """The record beside the newest checkpoint of the run in the output folder that has a whole one; None without a checkpoint."""
    folder = Path(config.output) / "checkpoints"
    if not folder.is_dir():
        return None
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.newest_whole(checkpoints.record)
        return found and found[1]


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


def check_teacher(run: Run, identity: dict[str, str]) -> None:
    """Raises InputError when the teacher's weights are not those that the run began with."""
    if identity["teacher"] != weights_sha256(run.teacher_folder):
        raise InputError(f"teacher: its weights changed since the run in {run.output} began; give a new output folder, or --overwrite")


def run_identity(run: Run, store: RowSource) -> dict[str, str]:
    """Hashes of what a run learns from, wherever it lies."""
    return {"teacher": weights_sha256(run.teacher_folder), "data": store.fingerprint}


@dataclass(frozen=True)
class Position:
    """Where a run is, beside its state: what a checkpoint's record says of it."""

    step: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"tokens": 0})  # real ones seen; of several languages also "tokens/<language>"
    offset: int = 0  # the batch of a step is number step + offset: a run that was rolled back reads on instead of again
    rollbacks: int = 0


def run_record(run: Run, identity: dict[str, str], position: Position) -> dict[str, Any]:
    """What lies beside the state in a checkpoint. A batch is a function of (seed, step + offset), so the position is whole."""
    own = asdict(position)
    return {
        **own.pop("tokens"),
        **own,
        "identity": identity,
        "config": run.config.model_dump(mode="json"),
        "layer_map": run.layer_map,
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Of what computes a run, as they are here."""
    return {name: version(name) for name in _PACKAGES}


def position_of(record: dict[str, Any]) -> Position:
    tokens = {name: count for name, count in record.items() if name == "tokens" or name.startswith("tokens/")}
    return Position(tokens=tokens, **{each.name: record[each.name] for each in fields(Position) if each.name != "tokens"})


def _tree(state: TrainState) -> dict:
    names = [field.name for field in fields(StudentState)]
    return {"step": state.step, "students": {name: {f: getattr(s, f) for f in names} for name, s in state.students.items()}}


def _record_sum(record: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in record.items() if key != "record_sum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Checkpoints:
    """The checkpoints of a run, RUN/checkpoints/<step>: the train state, and a JSON record beside it. A context manager.

    The record holds checksums of every array and of itself. One that is damaged is put aside as <step>.damaged, never deleted.
    """

    def __init__(self, folder: Path, *, keep: int | None = None):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a dozen lines for every save, and pages for what it raises
        if jax.process_count() == 1:
            # Replicas would share the writing of an array in slices, and each shape of a slice is compiled: worth it across hosts.
            handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
            ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        self._hook, sys.unraisablehook = sys.unraisablehook, without_abandoned(sys.unraisablehook)
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.wait()
            self._manager.close()
        finally:
            gc.collect()
            sys.unraisablehook = self._hook

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Returns when the arrays are copied; they are written meanwhile. `record` is JSON. A step that is saved is left alone.

        Raises:
          InputError: this one or the one before could not be written, because of the disk.
        """
        if step == self.latest():
            return
        tree = _tree(state)
        record = record | {"checksums": checksums(tree)}
        record |= {"record_sum": _record_sum(record)}
        with writing("output", self.folder):
            self._check_space(tree)
            args = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
            self._manager.save(step, args=args)

    def _check_space(self, tree: dict) -> None:
        needed, disk = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(self.folder)
        if disk.total and disk.free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({needed / 2**20:.1f} MB are needed, {disk.free / 2**20:.1f} free)")

    def wait(self) -> None:
        """Returns when everything is on the disk; raises as `save`."""
        with writing("output", self.folder):
            self._manager.wait_until_finished()

    def record(self, step: int) -> dict[str, Any]:
        """Raises DamagedError."""
        with damage():
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if record["record_sum"] != _record_sum(record):
                raise DamagedError("its record is not what was written")
        return record

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step onto the shardings of `like` (ShapeDtypeStructs), whatever devices wrote it.

        Raises:
          InputError: the checkpoint holds other arrays or shapes than the config describes.
          DamagedError: on all processes, if it is damaged for one.
        """
        reason, tree = None, None
        try:
            record, target = self.record(step), _tree(like)
            with damage():
                self._check_shapes(step, target)
                tree = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
                found = checksums(tree)
                if wrong := next((path for path, value in record["checksums"].items() if found[path] != value), None):
                    raise DamagedError(f"{wrong} is not what was written")
        except DamagedError as error:
            reason = str(error)
        if reason := next(filter(None, gathered(reason)), None):
            raise DamagedError(reason)
        return TrainState(tree["step"], {name: StudentState(**arrays) for name, arrays in tree["students"].items()})

    def newest_whole(self, read: Callable[[int], Any], say: Callable[[str], None] | None = None) -> tuple[int, Any] | None:
        """What `read` makes of the newest checkpoint that is not damaged, and its step; None if there is no checkpoint.

        Args:
          say: told of damaged ones; those are then put aside, once a whole one is found.

        Raises:
          InputError: all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = read(step)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            if say and damaged:
                for other, reason in damaged.items():
                    say(f"checkpoint {other} is damaged ({reason}): put aside as {self._put_aside(other).name}, going back to {step}")
                self._manager.reload()
            return step, found
        if damaged:
            step, reason = next(iter(damaged.items()))
            names = ", ".join(map(str, damaged))
            raise InputError(f"{self.folder}: every checkpoint ({names}) is damaged, {step}: {reason}; --overwrite begins the run anew")
        return None

    def _put_aside(self, step: int) -> Path:
        names = [f"{step}.damaged", *(f"{step}.damaged-{number}" for number in range(2, 100))]
        target = next(self.folder / name for name in names if not (self.folder / name).exists())
        if is_main():
            (self.folder / str(step)).rename(target)
        gathered(None)  # no process looks before it is gone
        return target

    def _check_shapes(self, step: int, target: dict) -> None:
        # Orbax would raise for this too, after 16,000 lines on stderr.
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        wanted = _shapes(target)
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                raise InputError(
                    f"checkpoint {step}: {path} is {saved.get(path, 'missing')}, the config asks for {wanted.get(path, 'nothing')}"
                )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {array_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
