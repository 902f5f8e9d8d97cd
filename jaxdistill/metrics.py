"""The numbers of a run: merging, throughput, and the files that keep them (JSON lines, TensorBoard, Weights & Biases)."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import operator
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError
from jaxdistill.faults.disk import writing

FILE_NAME = "metrics.jsonl"


def merge(sums_and_counts: Iterable[Mapping[str, tuple[Any, Any]]]) -> dict[str, float]:
    """Total sum over total count of every name, over all steps (or batches) at once.

    One division, because a mean of means would weigh a batch with few tokens like a full one. A name may be missing from
    some of the mappings; a name that counted nothing at all is nan.
    """
    totals: dict[str, tuple[float, float]] = {}
    for metrics in sums_and_counts:
        for name, (total, count) in metrics.items():
            old_total, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_total + float(total), old_count + float(count))
    return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


def model_flops_utilisation(flops_per_token: float, tokens_per_second: float, peak_flops: float) -> float:
    """Share (0 to 1) of the peak that the model's own arithmetic uses.

    Args:
      flops_per_token: FLOPs that the formulas need for one token, teacher and students; recomputation does not count.
      tokens_per_second: over all devices.
      peak_flops: FLOP/s of all devices together, at the precision of the matrix products.
    """
    if peak_flops <= 0:
        raise ValueError(f"peak_flops must be positive, got {peak_flops}")
    return flops_per_token * tokens_per_second / peak_flops


class Throughput:
    """Training speed since the last reading; evaluation, checkpoints and the compilation do not count.

    Computation is asynchronous: before `start`, `read` and `paused`, wait for the values of the last step, or the time of
    queued steps lands on the wrong side.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter):
        self._total_steps, self._clock = total_steps, clock
        self._tokens = 0
        self._pause = 0.0  # seconds paused since the last reading
        self._started: tuple[float, int] | None = None  # time and step; None while compiling
        self._last = 0.0

    def start(self, step: int) -> None:
        """Time counts from here: call it once, when the first step (the one that compiles) is done."""
        now = self._clock()
        self._started, self._last, self._tokens, self._pause = (now, step), now, 0, 0.0

    def add(self, tokens: int) -> None:
        """Counts the real tokens of one step; steps before `start` are left out."""
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and checkpoints; one inside another counts twice."""
        begin = self._clock()
        try:
            yield
        finally:
            self._pause += self._clock() - begin

    def read(self, step: int) -> dict[str, float]:
        """`tokens_per_second` since the last reading and `eta_seconds`; empty while nothing has been timed.

        The time left is reckoned from the whole time since `start`, pauses included, because what is left pauses as well.
        """
        if self._started is None:
            return {}
        now, (start, first_step) = self._clock(), self._started
        result, seconds = {}, now - self._last - self._pause
        if seconds > 0 and self._tokens:
            result["tokens_per_second"] = self._tokens / seconds
        if step > first_step:
            result["eta_seconds"] = (now - start) / (step - first_step) * max(self._total_steps - step, 0)
        self._last, self._tokens, self._pause = now, 0, 0.0
        return result


def _to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no nan or inf, and Python's extension of it breaks other readers (jq, JavaScript, pandas). A string in place of
    # the number would change the type of a column, so the number is null and `not_finite` says what it was.
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    bad = {name: str(value) for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**plain, **dict.fromkeys(bad), "not_finite": bad} if bad else plain


def _from_json(record: dict[str, Any]) -> dict[str, Any]:
    bad = record.pop("not_finite", {})
    return {**record, **{name: float(value) for name, value in bad.items()}}


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every line with its record. A process that was killed leaves a torn last line: it is left out."""
    lines = path.read_bytes().split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not a record")
        except ValueError:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number}: not a JSON object with a step; delete the line to go on without it") from None
        found.append((line, record))
    return found


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run in the order they were written; nan and inf are floats again.

    Raises:
      InputError: the folder holds no metrics, or a line other than the last is broken.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a run")
    return [_from_json(record) for _, record in _read_lines(path)]


def _keep_until(path: Path, step: int) -> None:
    """Drops the records after `step`, which the resumed run writes again; all of them if it starts over."""
    if not path.exists():
        return
    kept = [line for line, record in _read_lines(path) if record["step"] <= step] if step else []
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl and their numbers to TensorBoard (RUN/tensorboard) and W&B; a context manager.

    Nothing is written before the context is entered, and only by the main process.

    Args:
      folder: the run's; made if it is not there.
      wandb: name of the W&B project, or None.
      config: the resolved config, for W&B.
      resume_step: step of the checkpoint that the run goes on from; later records are dropped. 0 starts over.

    Raises:
      InputError: W&B is asked for and not installed.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool, wandb: str | None, config: dict, resume_step: int, is_main: bool):
        self._folder, self._is_main, self._resume_step = Path(folder), is_main, resume_step
        self._tensorboard, self._project, self._config = tensorboard, wandb, config
        self._close = contextlib.ExitStack()
        self._sinks: list[Callable[[dict[str, Any]], None]] = []
        self._wandb = None
        if wandb is not None and is_main:
            try:
                self._wandb = importlib.import_module("wandb")
            except ImportError:
                raise InputError("training.wandb: wandb is not installed: pip install 'jaxdistill[wandb]'") from None

    def __enter__(self) -> MetricsWriter:
        if self._is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._close:  # what is already open is closed if the next one fails to open
                self._open_file()
                if self._tensorboard:
                    self._open_tensorboard()
                if self._wandb is not None:
                    self._open_wandb()
                self._close = self._close.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._close.__exit__(*exception)
        self._sinks = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; it holds its `step` and is on disk when this returns. Values: numbers, strings or None."""
        record = {**record, "step": operator.index(record["step"])}
        for sink in self._sinks:
            sink(record)

    def _open_file(self) -> None:
        path = self._folder / FILE_NAME
        _keep_until(path, self._resume_step)
        file = self._close.enter_context(path.open("ab", buffering=0))  # a full disk fails the write, not the closing after it

        def sink(record: dict[str, Any]) -> None:
            with writing("output", self._folder):
                line = (json.dumps(_to_json(record), allow_nan=False) + "\n").encode()
                while line:
                    line = line[file.write(line) :]

        self._sinks.append(sink)

    def _open_tensorboard(self) -> None:
        from tensorboardX import SummaryWriter  # a second to import

        # It warns of every nan on stderr, through the progress bar; the curves and the record show them anyway.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        # The suffix: two files opened within one second would get the same name, and the second would empty the first.
        purge_step, suffix = self._resume_step + 1 if self._resume_step else 0, f".{self._resume_step}.{os.getpid()}"
        writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step, filename_suffix=suffix, flush_secs=5)
        self._close.callback(writer.close)

        def sink(record: dict[str, Any]) -> None:
            for name, value in record.items():
                value = value.item() if hasattr(value, "item") else value
                if name != "step" and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, record["step"])

        self._sinks.append(sink)

    def _open_wandb(self) -> None:
        path = self._folder / "wandb_id"
        if not (self._resume_step and path.is_file()):
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        run: Any = self._wandb.init(
            project=self._project, dir=str(self._folder), config=self._config, id=path.read_text(encoding="utf-8"), resume="allow"
        )
        # W&B's own counter drops what goes back in time, as the steps of a resumed run do: the x axis is our step instead.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._close.push(lambda kind, *_: run.finish(exit_code=0 if kind is None else 1))
        self._sinks.append(run.log)
