"""From the arrays that a step returns to the records that a person reads: merged, timed, written and shown."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import jax

from jaxdistill.flops import forward_flops_per_token, step_flops_per_token
from jaxdistill.metrics import MetricsWriter, Throughput, merge
from jaxdistill.objective import named_values
from jaxdistill.optimizer import learning_rate
from jaxdistill.progress import Progress
from jaxdistill.resolve import Run


class Recorder:
    """Metrics of a run between two logged steps. A context manager.

    Args:
      start: step that the run goes on from; records after it are dropped.
      tokens: real tokens seen until then.
    """

    def __init__(self, run: Run, start: int, tokens: int, progress: Progress, is_main: bool):
        training = run.config.training
        self._run, self._progress, self._tokens = run, progress, tokens
        self._throughput = Throughput(training.steps)
        self._untimed: int | None = None  # the first step: it waits for the compilation
        self._window: list[dict] = []
        self._writer = MetricsWriter(
            run.output,
            tensorboard=training.tensorboard,
            wandb=training.wandb,
            config=run.config.model_dump(mode="json"),
            resume_step=start,
            is_main=is_main,
        )
        length = run.config.data.sequence_length
        teacher = sum(forward_flops_per_token(run.teacher, length, features) for features in run.teacher_passes.values())
        self._flops = teacher + sum(step_flops_per_token(student, length) for student in run.students)
        self._rates = {s.name: learning_rate(run.config.optimizer_of(s.name), training.steps) for s in run.students}
        self.frozen: dict[str, int] = {}  # student -> step at which it was found frozen
        self._close = ExitStack()

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
        if self._untimed is None:
            jax.block_until_ready(metrics)
            self._untimed = int(jax.device_get(metrics["tokens"]))
            self._throughput.start(step)
        self._progress.update(step)

    def tokens(self) -> int:
        """Real tokens seen so far, over all processes."""
        return self._tokens + int(sum(jax.device_get([metrics["tokens"] for metrics in self._window])))

    def log(self, step: int, held_out: list[dict] | None) -> None:
        """Write and show the record of a step: means since the last one, and the evaluation if there was one."""
        window, self._window = jax.device_get(self._window), []
        new_tokens = int(sum(metrics["tokens"] for metrics in window))
        self._tokens += new_tokens
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
            self._warn_skipped(record, student.name, step, int(own[-1]["failures"]))
        rates = {name: float(rate(step - 1)) for name, rate in self._rates.items()}
        record["learning_rate"] = next(iter(rates.values()))
        if len(set(rates.values())) > 1:
            record |= {f"{name}/learning_rate": rate for name, rate in rates.items()}
        record["tokens"] = self._tokens
        record |= self._throughput.read(step)
        if "tokens_per_second" in record:
            record["teraflops"] = record["tokens_per_second"] * self._flops / 1e12
        self._write(record | self._held_out(held_out, step))

    def evaluated(self, step: int, held_out: list[dict]) -> None:
        """The record of an evaluation alone: before the first step."""
        if held_out:
            self._write({"step": step, "tokens": self._tokens} | self._held_out(held_out, step))

    def _held_out(self, batches: list[dict] | None, step: int) -> dict[str, float]:
        record = {}
        for student in self._run.students if batches else ():
            values = merge(batch[student.name] for batch in batches)
            for name, value in named_values(student.terms, values, student.name, step).items():
                record[f"{student.name}/held_out{name.removeprefix(f'{student.name}/loss').removeprefix(student.name)}"] = value
        return record

    def _warn_skipped(self, record: dict, student: str, step: int, failures: int) -> None:
        """Says that updates were skipped, and once that a student is frozen."""
        limit = self._run.config.training.freeze_after
        if student in self.frozen:
            return
        if failures >= limit:
            step = self.frozen[student] = step - (failures - limit)
            self._progress.say(
                f"step {step}: {student} has diverged and is frozen: its gradient was not finite {limit} times in a row; its parameters "
                f"are those before. A lower learning rate helps most"
            )
        elif skipped := record[f"{student}/skipped"]:
            self._progress.say(f"step {step}: {skipped} updates of {student} skipped since the last line: the gradient was not finite")

    def _write(self, record: dict[str, Any]) -> None:
        self._writer.write(record)
        self._progress.update(record["step"], record)
