"""Checkpoints (Orbax, asynchronous): the train state, and a record of what it belongs to."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxdistill.config import Config
from jaxdistill.data import RowSource
from jaxdistill.errors import InputError
from jaxdistill.faults.checksums import DamagedError, array_path, checksums, damage
from jaxdistill.faults.disk import CommitFailures, without_abandoned, writing
from jaxdistill.models import weights_sha256
from jaxdistill.processes import gathered, is_main
from jaxdistill.resolve import Run
from jaxdistill.update import StudentState, TrainState

_PACKAGES = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def newest_record(config: Config) -> dict[str, Any] | None:
    """The record beside the newest checkpoint of the run in the output folder that has a whole one; None without a checkpoint."""
    folder = Path(config.output) / "checkpoints"
    if not folder.is_dir():
        return None
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.newest_whole(checkpoints.record)
        return found and found[1]


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
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs a dozen lines for every save, and pages for what it raises
        self._failures, self._damaged = CommitFailures(folder), False
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
        logging.getLogger("absl").addFilter(self._failures)
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.wait()
            self._manager.close()
        finally:
            if self._damaged or sys.exception():
                gc.collect()  # what Orbax abandoned is heard of now; seconds in a process of many objects
            sys.unraisablehook = self._hook
            logging.getLogger("absl").removeFilter(self._failures)

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
                damaged[step], self._damaged = str(error), True
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
