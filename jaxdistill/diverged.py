"""A run in which no student is left: back to the last good checkpoint, or the end, with what is known of the last steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jaxdistill.batches import run_order
from jaxdistill.checkpoint import Checkpoints, Position
from jaxdistill.data import RowSource, TextStream, TokenStore
from jaxdistill.errors import DivergedError
from jaxdistill.faults.disk import writing
from jaxdistill.processes import is_main
from jaxdistill.progress import Progress
from jaxdistill.recorder import Recorder
from jaxdistill.resolve import Run
from jaxdistill.update import TrainState

Step = dict[str, float]  # of one student at one step: loss, gradient_norm, learning_rate, skipped, spiked, failures


def roll_back(
    run: Run, store: RowSource, checkpoints: Checkpoints, recorder: Recorder, step: int, restart: Callable, progress: Progress
) -> tuple[TrainState, Position]:
    """No student is left at `step`: the last good state, to go on from with the batches that nobody has read yet.

    Raises:
      DivergedError: that was done `training.rollbacks` times; RUN/diverged.md holds the diagnosis, after a rollback too.
    """
    was, page = recorder.position(step), run.output / "diverged.md"
    times = f"no finite gradient, or a spike, for {run.config.training.freeze_after} updates in a row"
    if is_main():
        title = f"Step {step}: every student has diverged ({times})"
        with writing("output", run.output):
            page.write_text(diagnosis(run, store, was.offset, recorder.last_steps(), title), encoding="utf-8")
    if was.rollbacks >= run.config.training.rollbacks:
        tried = f", {was.rollbacks} rollbacks to a good checkpoint did not help" if was.rollbacks else ""
        raise DivergedError(
            f"step {step}: every student has diverged ({times}){tried}; {page} shows the last steps, their rows and what to try; "
            f"begin anew with a lower learning rate, --overwrite"
        )
    checkpoints.wait()
    state, good = restart()
    at = replace(good, offset=was.offset + step - good.step, rollbacks=was.rollbacks + 1)
    recorder.roll_back(at)
    progress.say(f"step {step}: every student has diverged ({times}): back to step {at.step}, on other batches (see {page})")
    return state, at


def first_failure(steps: dict[int, dict[str, Step]]) -> int:
    """The step at which the last stretch of failures began, of the student that was the last to fail."""
    last = max(steps)
    return last - int(min(own["failures"] for own in steps[last].values())) + 1


def rows_of(run: Run, store: RowSource, position: int) -> np.ndarray:
    """Row numbers, of the split `train`, in batch number `position` (1 is the first)."""
    size = run.config.training.batch_size
    return run_order(run, store).rows(np.arange((position - 1) * size, position * size))


def source_names(run: Run, store: RowSource) -> list[str]:
    data = run.config.data
    if data.task:
        return [data.task.name] * len(store.source_rows("train"))
    return [source.path or str(source.dataset) for source in data.sources]


def held(run: Run, store: RowSource, position: int) -> str:
    """How many rows of which source a batch held."""
    sources = np.searchsorted(np.cumsum(store.source_rows("train")), rows_of(run, store, position), side="right")
    names = source_names(run, store)
    return ", ".join(f"{count} of {names[number]}" for number, count in zip(*np.unique(sources, return_counts=True), strict=True))


def reason(own: Step) -> str:
    if not own["skipped"]:
        return ""
    return "spike" if own["spiked"] else "frozen" if np.isfinite(own["gradient_norm"]) else "not finite"


def advice(run: Run, store: RowSource, steps: dict[int, dict[str, Step]]) -> list[str]:
    """What helps most, in the order in which to try it."""
    training, first, found = run.config.training, first_failure(steps), []
    warmup = max(round(run.config.optimizer.warmup * training.steps), 1)
    if first <= 2:
        found.append("It failed from the first updates: look at the teacher (a weight that is not finite?) before anything else.")
    if first <= 2 * warmup:
        found.append(f"A lower `optimizer.learning_rate` or a longer `optimizer.warmup` (now {warmup} steps: it failed at step {first}).")
    else:
        found.append("A lower `optimizer.learning_rate`; a smaller `optimizer.clip_norm`.")
    if run.settings.dtype == "bfloat16":
        found.append("`training.precision: float32`, to see whether bfloat16 is to blame.")
    if any(own["spiked"] for own in steps[max(steps)].values()):
        found.append(
            f"If so large a loss is lawful here: a higher `training.spike_factor` (now {run.settings.spike_factor:g}), 0 for none."
        )
    if isinstance(store, TokenStore):
        found.append("The rows below, if other batches went well: `jaxdistill.data.TokenStore(folder).read_rows('train', rows)`.")
    found.append(
        f"`training.rollbacks` (now {training.rollbacks}) may be raised and the run gone on with; every other field begins a new run."
    )
    return found


def diagnosis(run: Run, store: RowSource, offset: int, steps: dict[int, dict[str, Step]], title: str) -> str:
    """A page of Markdown.

    Args:
      offset: of the batches: that of step n is number n + offset.
      steps: step -> student -> its numbers, of the last steps.
    """
    first = first_failure(steps)
    lines = [
        f"# {title}",
        "",
        f"Precision {run.settings.dtype}, batches of {run.config.training.batch_size} rows.",
        "",
        "## What helps",
        "",
    ]
    lines += [f"{number}. {text}" for number, text in enumerate(advice(run, store, steps), 1)]
    lines += [
        "",
        "## The last steps",
        "",
        "| step | student | loss | gradient norm | learning rate | update | batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for step, students in steps.items():
        batch = held(run, store, step + offset)
        for name, own in students.items():
            numbers = " | ".join(f"{own[key]:.4g}" for key in ("loss", "gradient_norm", "learning_rate"))
            lines.append(f"| {step} | {name} | {numbers} | {reason(own) or 'done'} | number {step + offset}: {batch} |")
    if isinstance(store, TextStream):
        return "\n".join([*lines, ""])  # its rows have no numbers that could be looked up
    rows = ", ".join(map(str, _shown(rows_of(run, store, first + offset).tolist())))
    return "\n".join([*lines, "", "## The rows of the batch at which it began", "", f"Step {first}, split train: {rows}", ""])


def _shown(rows: Sequence[int], most: int = 256) -> list[int | str]:
    return [*rows] if len(rows) <= most else [*rows[:most], f"... ({len(rows)} in all)"]
