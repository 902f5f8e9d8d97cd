"""The whole run on one page: read this file first.

text -> batch -> teacher features -> every student's losses -> one update each -> checkpoint -> export
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import runtime
from jaxdistill.batches import evaluation_batches, training_batches
from jaxdistill.checkpoint import (
    Checkpoints,
    begin_output,
    check_output,
    check_teacher,
    hold_output,
    newest_record,
    run_identity,
    run_record,
)
from jaxdistill.config import Config, load_config, select_students
from jaxdistill.data import RowSource, prepare
from jaxdistill.errors import DivergedError, InputError
from jaxdistill.export import export_run
from jaxdistill.features import deepest_layer
from jaxdistill.metrics import read_history
from jaxdistill.models import EncoderConfig, load_pretrained, num_parameters
from jaxdistill.progress import Progress, choose_progress, preparing
from jaxdistill.recorder import Recorder
from jaxdistill.report import SUMMARY_COLUMNS, markdown_table, plot_losses, print_table, summary_row, summary_table
from jaxdistill.resolve import Run, resolve_stages
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state, compile_step, initial_state, place_teacher
from jaxdistill.students import describe_initialisation, own_head, projected_embeddings
from jaxdistill.tasks import open_task
from jaxdistill.train_step import Student, TrainState, evaluation_step


@dataclass(frozen=True)
class Distilled:
    """What a run leaves: each student's encoder config and parameters, the logged records, the folders."""

    students: dict[str, tuple[EncoderConfig, dict]]
    history: list[dict[str, Any]]
    exports: dict[str, Path]
    output: Path
    frozen: dict[str, int]  # students that diverged, and at which step they were frozen


def distill(
    config: Config | Mapping | str | Path | None = None,
    /,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    only: Sequence[str] = (),
    **fields: Any,
) -> Distilled:
    """Distil the students of a config; a run that was interrupted goes on from its newest checkpoint.

    Args:
      config: a YAML file, a run's folder, a dict or a Config; or its fields as keyword arguments.
      overrides: key=value strings, as on the command line.
      overwrite: start anew in an output folder that holds a run.
      only: names or patterns (as in a shell) of the students to distil; none: all.

    Raises:
      InputError: the input is wrong; one line that says what, where and what would be right. Nothing is half-written.
      DivergedError: no student is left to train: the gradients of all were not finite, many times in a row.
    """
    runtime.configure()
    config = select_students(load_config(config, overrides, **fields), only)
    runs = resolve_stages(config)
    if jax.process_count() > 1:
        raise InputError("several processes: not supported yet; one process drives all the devices of its machine")
    if runs[-1].config.training.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("training.wandb: wandb is not installed: pip install 'jaxdistill[wandb]'")
    last = runs[-1]
    goes_on = check_output(last.saved, overwrite=overwrite)
    lost: set[Path] = set()  # exports of students that diverged
    with hold_output(last.config):
        for run in runs[:-1]:
            # The whole run's folder first, so that it is one to go on with whatever stops the stage.
            prepare_text(run, newest_record(run.config) if goes_on else None)
            begin_output(last.saved, goes_on=goes_on)
            goes_on = True
            stage_goes_on = check_output(run.saved, overwrite=False)
            with hold_output(run.config):
                done = distill_stage(without_lost(run, lost), goes_on=stage_goes_on)
            lost |= {done.exports[name] for name in done.frozen}
        return distill_stage(without_lost(last, lost), goes_on=goes_on)


def without_lost(run: Run, lost: set[Path]) -> Run:
    """A stage without the students that diverged in an earlier one.

    Raises:
      DivergedError: its teacher is one of them, or nobody is left.
    """
    folders = lost | {folder / "mlm" for folder in lost}
    if run.teacher_folder in folders:
        raise DivergedError(f"stage {run.stage}: its teacher {run.config.teacher_name} has diverged; begin anew with a lower learning rate")
    gone = [name for name, folder in run.checkpoints.items() if folder in folders]
    if len(gone) == len(run.students):
        raise DivergedError(f"stage {run.stage}: every student of it has diverged in an earlier one; begin anew with a lower learning rate")
    warnings = tuple(f"{name} has diverged in an earlier stage and is left out of this one" for name in gone)
    students = tuple(student for student in run.students if student.name not in gone)
    checkpoints = {name: folder for name, folder in run.checkpoints.items() if name not in gone}
    return replace(run, students=students, checkpoints=checkpoints, warnings=run.warnings + warnings)


def distill_stage(run: Run, *, goes_on: bool) -> Distilled:
    """One run, in an output folder that is checked and held."""
    _, teacher_params = load_pretrained(run.teacher_folder)
    record = newest_record(run.config) if goes_on else None
    if record:
        check_teacher(run, record["identity"])
    store = prepare_text(run, record)
    begin_output(run.saved, goes_on=goes_on)
    mesh = create_mesh(run.config.mesh)
    title = f"Stage {run.stage}" if run.stage else "Distilling"
    with jax.set_mesh(mesh), choose_progress(run.config.training.steps, title, is_main=True) as progress:
        for line in describe(run, teacher_params, goes_on=record is not None):
            progress.say(line)
        state, frozen = train(run, store, mesh, teacher_params, progress)
    params = {name: jax.tree.map(np.asarray, jax.device_get(s.trained["params"])) for name, s in state.students.items()}
    complete = record is not None and record["step"] == run.config.training.steps
    exports = export_run(run, params, teacher_params, keep=complete)
    history = read_history(run.output)
    report_run(run, history, exports, frozen)
    return Distilled({s.name: (s.config, params[s.name]) for s in run.students}, history, exports, run.output, frozen)


def prepare_text(run: Run, record: dict | None) -> RowSource:
    """The run's rows: those that it began with, if `record` names them. A token store is made if it is not there."""
    expected, data = record and record["identity"]["data"], run.config.data
    if data.task:
        rows = open_task(data.task, tokenizer=run.tokenizer, family=run.teacher.family, sequence_length=data.sequence_length)
        if expected not in (None, rows.fingerprint):
            raise InputError(f"data.task: its rows or the tokenizer changed since the run in {run.output} began; --overwrite begins anew")
        return rows
    with preparing("Preparing text") as report:
        return prepare(run.config.data, tokenizer=run.tokenizer, store=run.store, progress=report, expected=expected)


def train(run: Run, store: RowSource, mesh: jax.sharding.Mesh, teacher_params: dict, progress: Progress) -> tuple[TrainState, dict]:
    """The loop: from the newest checkpoint, else from the students' first parameters, to the last step.

    Returns:
      The last state, and the frozen students with the steps at which they were found so.
    """
    training, identity = run.config.training, run_identity(run, store)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.output / "checkpoints", keep=training.keep_checkpoints))
        state, start, tokens = begin(run, checkpoints, mesh, teacher_params)
        if start == training.steps:
            progress.say(f"the run is complete: step {start}")
            return state, frozen_students(run, state, start)
        if start:
            progress.say(f"going on from step {start}")
        recorder = stack.enter_context(Recorder(run, start, tokens, progress, jax.process_index() == 0))
        teacher = place_teacher(run, teacher_params, mesh)
        evaluate = partial(evaluate_held_out, jax.jit(partial(evaluation_step, run.settings, run.students)), run, store, mesh, teacher)
        if not start:
            recorder.evaluated(0, evaluate(state, 0))
        step_fn = None
        for step, batch in enumerate(training_batches(run, store, mesh, start), start + 1):
            if step_fn is None:
                if len(run.students) > 1:
                    progress.say(f"compiling the step of {len(run.students)} students")  # grows with their number
                step_fn = compile_step(run, state, teacher, batch)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, teacher, batch)
            recorder.add(step, metrics)
            last, held_out = step == training.steps, None
            if step % training.evaluate_every == 0 or last:
                with recorder.paused():
                    held_out = evaluate(state, step)
            if held_out or step % training.log_every == 0 or last:
                recorder.log(step, held_out)
                if len(recorder.frozen) == len(run.students):
                    raise DivergedError(
                        f"step {step}: every student has diverged (no finite gradient for {training.freeze_after} steps); begin anew "
                        f"with a lower learning rate, --overwrite"
                    )
            # After the log: going on from a checkpoint drops the records that come after it.
            if step % training.checkpoint_every == 0 or last:
                with recorder.paused():
                    checkpoints.save(step, state, run_record(run, identity, step, recorder.tokens()))
    return state, recorder.frozen


def begin(run: Run, checkpoints: Checkpoints, mesh: jax.sharding.Mesh, teacher_params: dict) -> tuple[TrainState, int, int]:
    """State, step and tokens seen to start from."""
    like = abstract_state(run, teacher_params, mesh)
    step = checkpoints.latest()
    if step is None:
        shapes = {student.name: student.config for student in run.students}
        starts = {name: own_head(shapes[name], *load_pretrained(folder)) for name, folder in run.checkpoints.items()}
        init = jax.jit(partial(initial_state, run), out_shardings=jax.tree.map(lambda x: x.sharding, like))
        return init(teacher_params, starts), 0, 0
    return checkpoints.restore(step, like), step, checkpoints.record(step)["tokens"]


def frozen_students(run: Run, state: TrainState, step: int) -> dict[str, int]:
    """Students that have diverged, with the step at which they were frozen."""
    over = {name: int(jax.device_get(s.failures)) - run.config.training.freeze_after for name, s in state.students.items()}
    return {name: step - count for name, count in over.items() if count >= 0}


def evaluate_held_out(compiled, run: Run, store: RowSource, mesh: jax.sharding.Mesh, teacher: dict, state: TrainState, step: int):
    """(sum, count) of every part of every student's loss, a dict for each batch of held-out rows."""
    trained = {name: student.trained for name, student in state.students.items()}
    batches = enumerate(evaluation_batches(run, store, mesh))
    return [jax.device_get(compiled(trained, teacher, batch, np.int32(number), np.int32(step))) for number, batch in batches]


def describe(run: Run, teacher_params: dict, *, goes_on: bool) -> Iterator[str]:
    """What is about to be done, a line each."""
    if run.stage:
        yield f"stage {run.stage}"
    yield from (f"warning: {warning}" for warning in run.warnings)
    if run.task:
        yield f"task {run.task.title}: rows are its examples, held out is its split {next(iter(run.task.tests))}"
    teacher, passes = run.teacher, run.teacher_passes
    depth = ", ".join(f"{name} text to layer {deepest_layer(features)}" for name, features in passes.items() if features)
    reads = f"runs on {depth}" if depth else "is not read"
    yield f"teacher {run.config.teacher_name}: {teacher.num_layers} x {teacher.hidden_size}, {reads}"
    for student in run.students:
        kept = kept_share(run, student, teacher_params)
        start = describe_initialisation(run.config.students[student.name], run.copied[student.name], kept=kept)
        yield f"student {student.name}: {student.config.num_layers} x {student.config.hidden_size} from {start}; {student.input} text"
        for term in student.terms:
            yield f"  {term.description}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items())
    yield f"devices: {jax.device_count()} {jax.default_backend()} ({mesh}), {run.settings.dtype}"
    yield f"output: {run.output}{' (holds this run: going on with it)' if goes_on else ''}"


def kept_share(run: Run, student: Student, teacher_params: dict) -> float | None:
    """Of the teacher's embeddings, what a student that starts from their projection keeps."""
    how = run.config.students[student.name].embeddings
    if how == "random":
        return None
    return float(projected_embeddings(teacher_params["embeddings"], student.config.hidden_size, how)[1])


def report_run(run: Run, history: list[dict], exports: dict[str, Path], frozen: dict[str, int]) -> None:
    """The loss plot, and the summary table on stdout and as Markdown."""
    plot_losses(history, run.output / "loss.png", title=f"{run.output.name}: distilled from {run.config.teacher_name}")
    rows = []
    for student in run.students:
        held_out = [record[f"{student.name}/held_out"] for record in history if f"{student.name}/held_out" in record]
        row = summary_row(
            f"{student.name} (diverged, frozen at step {frozen[student.name]})" if student.name in frozen else student.name,
            num_layers=student.config.num_layers,
            hidden_size=student.config.hidden_size,
            num_parameters=num_parameters(student.config),
            num_teacher_parameters=num_parameters(run.teacher),
            held_out=(held_out[0], held_out[-1]) if held_out else (float("nan"), float("nan")),
            tokens=max((record.get("tokens", 0) for record in history), default=0),
            export_folder=exports[student.name],
        )
        rows.append(row)
    (run.output / "summary.md").write_text(markdown_table(rows, SUMMARY_COLUMNS), encoding="utf-8")
    print_table(summary_table(rows, SUMMARY_COLUMNS, title=f"Distilled from {run.config.teacher_name}"))
