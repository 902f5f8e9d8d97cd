"""The whole run on one page: read this file first.

text -> batch -> teacher features -> every student's losses -> one update each -> checkpoint -> export
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import processes, runtime
from jaxdistill.batches import evaluation_batches, training_batches
from jaxdistill.checkpoint import Checkpoints, Position, check_teacher, newest_record, position_of, run_identity, run_record
from jaxdistill.config import Config, load_config, select_students
from jaxdistill.data import RowSource
from jaxdistill.diverged import roll_back
from jaxdistill.errors import DivergedError, InputError
from jaxdistill.export import export_run
from jaxdistill.faults.disk import writing
from jaxdistill.faults.preemption import between_steps, stoppable, stopped
from jaxdistill.features import deepest_layer
from jaxdistill.hosts import check_same, check_same_teacher, held, open_output
from jaxdistill.metrics import read_history
from jaxdistill.models import EncoderConfig, load_pretrained, num_parameters
from jaxdistill.output import check_output
from jaxdistill.processes import is_main
from jaxdistill.progress import Progress, choose_progress
from jaxdistill.recorder import Recorder
from jaxdistill.report import SUMMARY_COLUMNS, markdown_table, plot_losses, print_table, summary_row, summary_table
from jaxdistill.resolve import Run, resolve_stages
from jaxdistill.revisions import as_begun
from jaxdistill.sharding import create_mesh, on_host
from jaxdistill.state import abstract_state, compile_step, initial_state, place_teacher
from jaxdistill.students import describe_initialisation, own_head, projected_embeddings
from jaxdistill.text import prepare_text
from jaxdistill.train_step import evaluation_step
from jaxdistill.update import Student, TrainState


@dataclass(frozen=True)
class Distilled:
    """What a run leaves: each student's encoder config and parameters, the logged records, the folders; the same in every process."""

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
      DivergedError: no student is left to train, and going back to a good checkpoint did not help.
      PreemptedError: SIGTERM; the same call goes on. Ctrl-C too stops between two steps, after a checkpoint.
    """
    runtime.configure()
    processes.check_joined()  # it may wait for the others: not where one may have failed already
    with processes.together():
        config = select_students(load_config(config, overrides, **fields), only)
        if not overwrite:
            config = as_begun(config)
        runs = resolve_stages(config)
        if runs[-1].config.training.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError("training.wandb: wandb is not installed: pip install 'jaxdistill[wandb]'")
    check_same(runs)
    last, goes_on = runs[-1], False
    with processes.together():
        if processes.is_main():
            goes_on = check_output(last.saved, overwrite=overwrite)
    goes_on = processes.from_main(goes_on)
    lost: set[Path] = set()  # exports of students that diverged
    with stoppable(), held(last.config):
        processes.check_shared(last.output)
        for run in runs[:-1]:
            # The whole run's folder first, so that it is one to go on with whatever stops the stage.
            prepare_text(run, newest_record(run.config) if goes_on else None)
            open_output(last, goes_on=goes_on)
            goes_on, stage_goes_on = True, False
            with processes.together():
                if processes.is_main():
                    stage_goes_on = check_output(run.saved, overwrite=False)
            with held(run.config):
                done = distill_stage(without_lost(run, lost), goes_on=processes.from_main(stage_goes_on))
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
    with processes.together():
        _, teacher_params = load_pretrained(run.teacher_folder)
    check_same_teacher(run)
    record = newest_record(run.config) if goes_on else None
    if record:
        check_teacher(run, record["identity"])
    store = prepare_text(run, record)
    open_output(run, goes_on=goes_on)
    mesh = create_mesh(run.config.mesh)
    title = f"Stage {run.stage}" if run.stage else "Distilling"
    with jax.set_mesh(mesh), choose_progress(run.config.training.steps, title, is_main=processes.is_main()) as progress:
        for line in describe(run, teacher_params, goes_on=record is not None):
            progress.say(line)
        state, frozen = train(run, store, mesh, teacher_params, progress)
        params = {name: on_host(student.trained["params"], mesh) for name, student in state.students.items()}
    complete = record is not None and record["step"] == run.config.training.steps
    exports = {student.name: run.output / "export" / student.name for student in run.students}
    with processes.together():
        if processes.is_main():
            export_run(run, store, params, teacher_params, keep=complete)
            with writing("output", run.output):
                report_run(run, read_history(run.output), exports, frozen)
    return Distilled({s.name: (s.config, params[s.name]) for s in run.students}, read_history(run.output), exports, run.output, frozen)


def train(run: Run, store: RowSource, mesh: jax.sharding.Mesh, teacher_params: dict, progress: Progress) -> tuple[TrainState, dict]:
    """The loop: from the newest checkpoint, else from the students' first parameters, to the last step.

    Returns:
      The last state, and the frozen students with the steps at which they were found so.
    """
    training, identity = run.config.training, run_identity(run, store)
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.output / "checkpoints", keep=training.keep_checkpoints))
        restart = partial(begin, run, checkpoints, mesh, teacher_params, progress.say)
        state, at = restart()
        step, due = at.step, False
        if step == training.steps:
            progress.say(f"the run is complete: step {step}")
            return state, frozen_students(run, state, step)
        if step:
            progress.say(f"going on from step {step}")
        recorder = stack.enter_context(Recorder(run, at, progress, is_main()))
        teacher = place_teacher(run, teacher_params, mesh)
        evaluate = partial(evaluate_held_out, jax.jit(partial(evaluation_step, run.settings, run.students)), run, store, mesh, teacher)
        if not step:
            recorder.evaluated(0, evaluate(state, 0))
        step_fn, batches = compile_first(run, state, teacher, training_batches(run, store, mesh, step, at.offset), progress)
        asked_to_stop = stack.enter_context(between_steps())
        while step < training.steps:
            step, batch = step + 1, next(batches)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, teacher, batch)
            recorder.add(step, metrics)
            last, held_out = step == training.steps, None
            if recorder.diverged(wait=last):
                state = None  # makes room for the one that is read
                state, at = roll_back(run, store, checkpoints, recorder, step, restart, progress)
                step, batches = at.step, training_batches(run, store, mesh, at.step, at.offset)
                if not step:
                    recorder.evaluated(0, evaluate(state, 0))
                continue
            stopping = asked_to_stop(step)
            save = partial(save_checkpoint, run, checkpoints, recorder, identity)
            if stopping:  # first of all: little time may be left
                save(step, state)
            if step % training.evaluate_every == 0 or last:
                with recorder.paused():
                    held_out = evaluate(state, step)
            if held_out or step % training.log_every == 0 or last or stopping:
                recorder.log(step, held_out)
            # After the log: going on from a checkpoint drops the records that come after it.
            due = due or step % training.checkpoint_every == 0
            if due or last:
                due = not save(step, state, always=last)
            if stopping:
                checkpoints.wait()
                raise stopped(f"stopped at step {step}; the same command goes on from step {checkpoints.latest() or 0}")
    return state, recorder.frozen


def begin(
    run: Run, checkpoints: Checkpoints, mesh: jax.sharding.Mesh, teacher_params: dict, say: Callable[[str], None]
) -> tuple[TrainState, Position]:
    """The state to start from, and where in the run it is."""
    like = abstract_state(run, teacher_params, mesh)
    found = checkpoints.newest_whole(lambda step: (checkpoints.restore(step, like), position_of(checkpoints.record(step))), say)
    if found:
        return found[1]
    shapes = {student.name: student.config for student in run.students}
    starts = {name: own_head(shapes[name], *load_pretrained(folder)) for name, folder in run.checkpoints.items()}
    init = jax.jit(partial(initial_state, run), out_shardings=jax.tree.map(lambda x: x.sharding, like))
    return init(teacher_params, starts), Position()


def compile_first(
    run: Run, state: TrainState, teacher: dict, batches: Iterator, progress: Progress
) -> tuple[jax.stages.Compiled, Iterator]:
    """The compiled step, and the batches with the first one, whose shape it has."""
    if len(run.students) > 1:
        progress.say(f"compiling the step of {len(run.students)} students")  # grows with their number
    first = next(batches)
    return compile_step(run, state, teacher, first), itertools.chain([first], batches)


def save_checkpoint(
    run: Run, checkpoints: Checkpoints, recorder: Recorder, identity: dict, step: int, state: TrainState, *, always: bool = False
) -> bool:
    """Saves unless a student is in a stretch of failures: what a run goes back to is good. Returns whether it did."""
    if not (always or recorder.is_sound()):
        return False
    with recorder.paused():
        checkpoints.save(step, state, run_record(run, identity, recorder.position(step)))
    return True


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
    hosts = len(set(processes.hosts()))
    where = f" of {processes.count()} processes on {hosts} host{'s' * (hosts > 1)}" if hosts else ""
    yield f"devices: {jax.device_count()} {jax.default_backend()}{where} ({mesh}), {run.settings.dtype}"
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
