"""From the arrays that a step returns to the records that a person reads: merged, timed, written and shown."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxdistill.checkpoint import Position
from jaxdistill.data import languages
from jaxdistill.flops import forward_flops_per_token, step_flops_per_token
from jaxdistill.metrics import FILE_NAME, MetricsWriter, Throughput, merge, read_history
from jaxdistill.objective import named_values
from jaxdistill.optimizer import learning_rate
from jaxdistill.progress import Progress
from jaxdistill.resolve import Run

_COUNTS = {"tokens", "languages"}  # of a step's metrics


def devices_in_use() -> str:
    """As "8 x TPU v5 lite": of all processes."""
    return f"{jax.device_count()} x {'CPU' if jax.default_backend() == 'cpu' else jax.devices()[0].device_kind}"


def seconds_until(folder: Path, step: int) -> float:
    """Seconds that the run in a folder had taken at a step; work that was lost with a kill and done again is not in it."""
    history = read_history(folder) if step and (folder / FILE_NAME).is_file() else []
    return max((record.get("seconds") or 0.0 for record in history if record["step"] <= step), default=0.0)


class Recorder:
    """Metrics of a run between two logged steps. A context manager.

    Args:
      start: where the run goes on from; records after it are dropped.
    """

    def __init__(self, run: Run, start: Position, progress: Progress, is_main: bool):
        training = run.config.training
        self._run, self._progress, self._is_main = run, progress, is_main
        self._languages = [f"tokens/{name}" for name in languages(run.config.data)]
        self._seconds = seconds_until(run.output, start.step)  # of the parts of the run before this one
        self._begun = time.monotonic()
        self._devices = devices_in_use()
        self._throughput = Throughput(training.steps)
        self._begin(start)
        length = run.config.data.sequence_length
        teacher = sum(forward_flops_per_token(run.teacher, length, features) for features in run.teacher_passes.values())
        self._flops = teacher + sum(step_flops_per_token(student, length) for student in run.students)
        self._rates = {s.name: learning_rate(run.config.optimizer_of(s.name), training.steps) for s in run.students}
        self._close = ExitStack()

    def _begin(self, start: Position) -> None:
        training = self._run.config.training
        self._start, self._tokens = start, start.tokens
        self._untimed: int | None = None  # the first step: it waits for the compilation
        self._window: list[dict] = []
        self._recent: deque[tuple[int, dict]] = deque(maxlen=min(training.freeze_after, 50) + 10)  # (step, metrics)
        self.frozen: dict[str, int] = {}  # student -> step at which it was found frozen
        self._writer = MetricsWriter(
            self._run.output,
            tensorboard=training.tensorboard,
            wandb=training.wandb,
            config=self._run.config.model_dump(mode="json"),
            resume_step=start.step,
            is_main=self._is_main,
        )

    def roll_back(self, start: Position) -> None:
        """Records after `start` are dropped, as if the run had gone on from there."""
        self._close.close()
        self._begin(start)
        self._close.enter_context(self._writer)

    def __enter__(self) -> Recorder:
        self._close.enter_context(self._writer)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._close.__exit__(*exception)

    def paused(self):
        """Around work that is not training; what is under way is waited for first."""
        jax.block_until_ready(self._window)
        return self._throughput.paused()

    def add(self, step: int, metrics: dict) -> None:
        """Metrics of one step, still on the device. Waits for the step before, so that one is always under way."""
        jax.block_until_ready(self._window[-1:])
        self._window.append(metrics)
        self._recent.append((step, metrics))
        if self._untimed is None:
            jax.block_until_ready(metrics)
            self._untimed = int(jax.device_get(metrics["tokens"]))
            self._throughput.start(step)
        self._progress.update(step)

    def _counted(self, window: list[dict]) -> dict[str, int]:
        """Real tokens seen, over all processes, with those of the steps in `window`."""
        found = self._tokens | {"tokens": self._tokens["tokens"] + int(sum(metrics["tokens"] for metrics in window))}
        for number, name in enumerate(self._languages):
            found[name] = self._tokens.get(name, 0) + int(sum(metrics["languages"][number] for metrics in window))
        return found

    def position(self, step: int) -> Position:
        """After this step, the last one that was added."""
        window = jax.device_get([{name: metrics[name] for name in _COUNTS & metrics.keys()} for metrics in self._window])
        return replace(self._start, step=step, tokens=self._counted(window))

    def diverged(self, *, wait: bool) -> bool:
        """Whether no student was left after the step before, which is known already; `wait`: after the last one."""
        known = [metrics["diverged"] for _, metrics in self._recent]
        return any(jax.device_get(known[-1:] if wait else known[-2:-1]))

    def is_sound(self) -> bool:
        """Whether no student is in a stretch of failures: a state to go back to."""
        failures = [int(own["failures"]) for own in jax.device_get(self._recent[-1][1]["students"]).values()]
        limit = self._run.config.training.freeze_after
        return not any(0 < count < limit for count in failures) and min(failures) < limit

    def last_steps(self) -> dict[int, dict[str, dict[str, float]]]:
        """Step -> student -> its numbers, of the last steps until no student was left."""
        found: dict[int, dict[str, dict[str, float]]] = {}
        for step, metrics in jax.device_get(list(self._recent)):
            found[int(step)] = {}
            for student in self._run.students:
                own = metrics["students"][student.name]
                values = merge([own["parts"]])
                numbers = {"loss": named_values(student.terms, values, student.name, step - 1)[f"{student.name}/loss"]}
                numbers |= {name: float(own[name]) for name in ("gradient_norm", "skipped", "spiked", "failures")}
                found[int(step)][student.name] = numbers | {"learning_rate": float(self._rates[student.name](step - 1))}
            if metrics["diverged"]:
                break
        return found

    def log(self, step: int, held_out: list[dict] | None) -> None:
        """Write and show the record of a step: means since the last one, and the evaluation if there was one."""
        window, self._window = jax.device_get(self._window), []
        before, self._tokens = self._tokens["tokens"], self._counted(window)
        new_tokens = self._tokens["tokens"] - before
        self._throughput.add(new_tokens - (self._untimed or 0))
        self._untimed = 0
        record: dict[str, Any] = {"step": step, "loss": 0.0}
        for student in self._run.students:
            own = [metrics["students"][student.name] for metrics in window]
            values = named_values(student.terms, merge(metrics["parts"] for metrics in own), student.name, step - 1)
            record |= values
            record["loss"] += values[f"{student.name}/loss"] if student.name not in self.frozen else 0.0
            record[f"{student.name}/gradient_norm"] = float(own[-1]["gradient_norm"])
            record[f"{student.name}/skipped"] = int(sum(metrics["skipped"] for metrics in own))
            if not window[-1]["diverged"]:  # else the run says more
                self._warn_skipped(record, student.name, step, own)
        rates = {name: float(rate(step - 1)) for name, rate in self._rates.items()}
        record["learning_rate"] = next(iter(rates.values()))
        if len(set(rates.values())) > 1:
            record |= {f"{name}/learning_rate": rate for name, rate in rates.items()}
        record |= self._tokens
        if self._start.rollbacks:
            record["rollbacks"] = self._start.rollbacks
        record |= self._throughput.read(step)
        if "tokens_per_second" in record:
            record["teraflops"] = record["tokens_per_second"] * self._flops / 1e12
        self._write(record | self._held_out(held_out, step))

    def evaluated(self, step: int, held_out: list[dict]) -> None:
        """The record of an evaluation alone: before the first step."""
        if held_out:
            self._write({"step": step} | self._tokens | self._held_out(held_out, step))

    def _held_out(self, batches: list[dict] | None, step: int) -> dict[str, float]:
        record = {}
        for student in self._run.students if batches else ():
            values = merge(batch[student.name] for batch in batches)
            for name, value in named_values(student.terms, values, student.name, step).items():
                record[f"{student.name}/held_out{name.removeprefix(f'{student.name}/loss').removeprefix(student.name)}"] = value
        return record

    def _warn_skipped(self, record: dict, student: str, step: int, own: list[dict]) -> None:
        """Says that updates were skipped, and once that a student is frozen."""
        limit, failures = self._run.config.training.freeze_after, int(own[-1]["failures"])
        if student in self.frozen:
            return
        spiked = sum(int(metrics["spiked"]) for metrics in own)
        if failures >= limit:
            step = self.frozen[student] = step - (failures - limit)
            why = "its loss was a spike or its gradient not finite" if spiked else "its gradient was not finite"
            self._progress.say(
                f"step {step}: {student} has diverged and is frozen: {why} {limit} times in a row; its parameters "
                f"are those before. A lower learning rate helps most"
            )
        elif skipped := record[f"{student}/skipped"]:
            factor = self._run.settings.spike_factor
            whys = [f"a loss over {factor:g} times the usual ({spiked})"] * (spiked > 0)
            whys += ["the gradient was not finite"] * (skipped > spiked)
            self._progress.say(f"step {step}: {skipped} updates of {student} skipped since the last line: {'; '.join(whys)}")

    def _write(self, record: dict[str, Any]) -> None:
        record |= {"seconds": round(self._seconds + time.monotonic() - self._begun, 3), "devices": self._devices}
        self._writer.write(record)
        self._progress.update(record["step"], record)
