"""Scores on tasks: every model fine-tuned under one protocol with several seeds, or scored with the head that it has.

A run that is interrupted goes on where it was: each finished training is in the model's file of results.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxdistill import results
from jaxdistill.compare.cells import Cell, read_cells
from jaxdistill.config import EvaluationConfig, Protocol
from jaxdistill.errors import DivergedError, InputError
from jaxdistill.finetune import (
    Evaluated,
    TaskData,
    TaskRows,
    Trainer,
    Training,
    cells_of,
    dtype_of,
    head_order,
    read_tasks,
    resolve_models,
    task_data,
    trainer_of,
    with_ordered_head,
    with_words,
)
from jaxdistill.models import EncoderConfig, load_pretrained
from jaxdistill.progress import Progress, choose_progress, duration
from jaxdistill.report import print_table, summary_table
from jaxdistill.tasks import TASKS, Task, find_tasks, shown_scores

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "scikit-learn", "scipy")


def evaluate(config: EvaluationConfig, *, overwrite: bool = False) -> list[Path]:
    """Score every model on every task; returns the files of results.

    Args:
      overwrite: scores of these tasks that are there are replaced, all scores where the protocol or the model is another.

    Raises:
      InputError: before anything is trained or written: a model, task, folder or protocol that cannot be.
    """
    if config.output:
        raise InputError("output: is where finetune writes its model; evaluate writes results")
    models, tasks = resolve_models(config), find_tasks(config.tasks)
    there, missing = read_tasks(tasks, config)
    known = {model.name: begin_scores(model, there, config, overwrite) for model in models}
    if not config.train:
        for model, rows in itertools.product(models, there):
            head_order(model, rows.task)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    files = [score_model(model, there, missing, known[model.name], config) for model in models]
    print_scores(files, tasks, config)
    return files


def protocol_of(config: EvaluationConfig) -> dict[str, Any]:
    """What scores depend on; two that differ in more than their seeds do not stand in one file."""
    more = {"train": config.train, "precision": dtype_of(config)}
    if not config.train:
        return {"name": "none", "max_length": config.protocol.max_length, "seeds": []} | more
    return config.protocol.model_dump(mode="json") | more


def begin_scores(model: Evaluated, tasks: list[TaskRows], config: EvaluationConfig, overwrite: bool) -> dict[str, Any] | None:
    """The scores that are in the model's file and go on; None: they begin anew.

    Raises:
      InputError: the file is of another model, another protocol or other data.
    """
    path, protocol = results.result_file(Path(config.results), model.name), protocol_of(config)
    if not path.exists():
        return None
    found = results.read_result(path)
    if not (overwrite and not results.is_same_model(found, model.description)):
        results.check_same_model(found, model.description, path)
    scores = found.get("scores")
    if scores is None:
        return None
    before = scores["protocol"]
    for field in ("train", *protocol):
        if field != "seeds" and field in before and before[field] != protocol.get(field):
            if overwrite:
                return None
            raise InputError(
                f"{'train' if field == 'train' else f'protocol.{field}'}: {path} holds scores with {before[field]!r}, now it is "
                f"{protocol.get(field)!r}; give another folder of results, or --overwrite"
            )
    if overwrite:
        named = {rows.task.name for rows in tasks}
        return scores | {"tasks": {name: entry for name, entry in scores["tasks"].items() if name not in named}}
    for rows in tasks:
        hashes = scores["tasks"].get(rows.task.name, {}).get("data", {})
        for split in sorted(hashes.keys() & rows.fingerprints.keys()):
            if hashes[split] != rows.fingerprints[split]:
                raise InputError(
                    f"data: {split} of {rows.task.name} is not what the scores in {path} are of; give another folder of results"
                )
    return scores


def score_model(
    model: Evaluated, tasks: list[TaskRows], missing: dict[str, str], known: dict[str, Any] | None, config: EvaluationConfig
) -> Path:
    """Do what is not done yet; every training that ends is added to the model's file as it then is.

    Args:
      known: the scores that go on.
    """
    path, loaded = None, None
    for rows in tasks:
        before = ((known or {}).get("tasks", {}).get(rows.task.name) or {"runs": []})["runs"]
        cells = [cell for cell in cells_of(config.protocol, rows.task) if not any(_is_run_of(run, cell, rows) for run in before)]
        if not config.train:
            cells = [] if before else [Training(0.0, 0, 0, 0)]
        if not cells:
            print(f"{model.name}: {rows.task.title} is done already")
            continue
        loaded = loaded or load_pretrained(model.folder)
        data = task_data(rows, model, config)
        counts = {"train": len(data.train), "train_available": data.available} if data.train else {}
        about = {"examples": counts | {split: len(tokens) for split, tokens in data.tests.items()}}
        about |= {"notes": list(data.notes), "data": rows.fingerprints}
        for runs in trained_cells(model, loaded, data, cells, config):
            path = save_runs(model, config, missing, {rows.task.name: about | {"runs": runs}}, keep=before)
            before = [*before, *runs]
    return path or save_runs(model, config, missing, {})


def _is_run_of(run: dict[str, Any], cell: Training, rows: TaskRows) -> bool:
    """Whether this training is done: with a score for every test that is there, or diverged."""
    same = all(run.get(field) == value for field, value in dataclasses.asdict(cell).items())
    return same and (run.get("diverged", False) or rows.tests.keys() <= run["scores"].keys())


def save_runs(
    model: Evaluated, config: EvaluationConfig, missing: dict[str, str], entries: dict[str, dict[str, Any]], keep: Sequence[dict] = ()
) -> Path:
    """Add runs of a task to the scores in the model's file, which another command may have changed meanwhile.

    Args:
      entries: task -> what is new. Its runs are those of `keep` and the new ones; other tasks stay as they are.
    """
    protocol, fields = protocol_of(config), [field.name for field in dataclasses.fields(Training)]

    def key(run: dict[str, Any]) -> tuple:
        return tuple(run.get(field) for field in fields)

    def add(before: dict[str, Any] | None) -> dict[str, Any]:
        goes_on = before and all(before["protocol"].get(field, value) == value for field, value in protocol.items() if field != "seeds")
        tasks = dict(before["tasks"]) if goes_on else {}
        for name, entry in entries.items():
            runs = {key(run): run for run in [*keep, *entry["runs"]]}
            tasks[name] = entry | {"runs": list(runs.values())}
        seeds = {run["seed"] for entry in tasks.values() for run in entry["runs"] if run["seed"] is not None} | {*protocol["seeds"]}
        why = {name: reason for name, reason in ((before or {}).get("missing", {}) | missing).items() if name not in tasks}
        versions = {name: version(name) for name in _PACKAGES}
        return {"protocol": protocol | {"seeds": sorted(seeds)}, "tasks": tasks, "missing": why, "versions": versions}

    return results.update_section(Path(config.results), model.name, model.description, "scores", add, replace=True)


def seed_groups(cells: list[Training], together: bool) -> list[list[Training]]:
    """Cells that are trained at once: those that differ by their seed alone."""
    if not together:
        return [[cell] for cell in cells]
    by_rest = itertools.groupby(cells, key=lambda cell: (cell.learning_rate, cell.batch_size, cell.epochs))
    return [list(group) for _, group in by_rest]


def trained_cells(
    model: Evaluated, loaded: tuple[EncoderConfig, dict], data: TaskData, cells: list[Training], config: EvaluationConfig
) -> Iterator[list[dict[str, Any]]]:
    """The runs of results, as they are finished."""
    trainer = trainer_of(model, loaded, data, config)
    if not config.train:
        params = with_ordered_head(with_words(loaded[1], data.vocabulary, 256), head_order(model, data.task))
        params = jax.device_put(params)
        yield [{"seed": None, "scores": {split: trainer.scores(params, split)[0] for split in data.tests}}]
        return
    # Measured on a CPU: three seeds of one step take longer than three steps (docs/log.md); an accelerator is left idle by one.
    together = jax.default_backend() != "cpu" if config.seeds_together == "auto" else config.seeds_together
    groups = seed_groups(cells, together)
    total = sum(trainer.num_steps(group[0]) for group in groups)
    with choose_progress(total, f"{model.name}: {data.task.title}", jax.process_index() == 0) as progress:
        done = 0
        while groups:
            group = groups.pop(0)
            try:
                runs = run_group(trainer, group, config.protocol, progress, done)
            except (jax.errors.JaxRuntimeError, DivergedError) as error:
                diverged = isinstance(error, DivergedError)
                if diverged and len(group) == 1:
                    progress.say(str(error))
                    done += trainer.num_steps(group[0])
                    yield [dataclasses.asdict(group[0]) | {"diverged": True, "scores": {}}]
                    continue
                if not diverged and (len(group) == 1 or "RESOURCE_EXHAUSTED" not in str(error)):
                    raise
                why = "not all seeds converge" if diverged else f"{len(group)} seeds together do not fit"
                progress.say(f"{model.name}: {data.task.title}: {why}; one after the other")
                groups = seed_groups([cell for each in [group, *groups] for cell in each], together=False)
                progress.total = done + sum(trainer.num_steps(each[0]) for each in groups)
                continue
            done += trainer.num_steps(group[0])
            yield runs
            for run in runs:
                took = duration(run["seconds"])
                progress.say(f"{model.name}: {data.task.title}, seed {run['seed']}: {shown_scores(run['scores'])} ({took})")


def run_group(trainer: Trainer, group: list[Training], protocol: Protocol, progress: Progress, done: int) -> list[dict[str, Any]]:
    """Train and score the seeds of a group; under `report: best` after every epoch, and the best on the dev set counts."""
    together, start, task = len(group) > 1, time.monotonic(), trainer.data.task
    best: list[dict[str, Any]] = [{} for _ in group]

    def each_epoch(epoch: int, params: dict) -> None:
        dev = trainer.scores(params, trainer.data.dev, together=together)
        main = task.metrics[0]
        better = [
            i
            for i, kept in enumerate(best)
            if not kept or protocol.report == "last" or dev[i][main] > kept["scores"][trainer.data.dev][main]
        ]
        others = [split for split in trainer.data.tests if split != trainer.data.dev] if better else []
        found = {trainer.data.dev: dev} | {split: trainer.scores(params, split, together=together) for split in others}
        for i in better:
            best[i] |= {"epoch": epoch, "scores": {split: values[i] for split, values in found.items()}}

    every = each_epoch if protocol.report == "best" else None
    params = trainer.train(group, every, progress.from_step(done))
    if every is None:
        each_epoch(group[0].epochs, params)
    seconds = (time.monotonic() - start) / len(group)
    return [dataclasses.asdict(cell) | kept | {"seconds": round(seconds, 2)} for cell, kept in zip(group, best, strict=True)]


def print_scores(files: list[Path], tasks: tuple[Task, ...], config: EvaluationConfig) -> None:
    """The main metric of each task and split: mean and standard deviation over the seeds, in percent."""
    found = [results.read_result(path) for path in files]
    scored = [read_cells(value["scores"], str(path))[0] for value, path in zip(found, files, strict=True)]
    keys = [(task.name, split, task.metrics[0]) for task in tasks for split in task.tests]
    keys = [key for key in keys if any(key in cells for cells in scored)]
    rows = [[value["name"], *(shown(cells.get(key)) for key in keys)] for value, cells in zip(found, scored, strict=True)]
    several = {task for task, _, _ in keys if sum(other == task for other, _, _ in keys) > 1}
    titles = [" ".join([TASKS[task].title, *([split] if task in several else []), metric]) for task, split, metric in keys]
    print_table(summary_table(rows, ["model", *titles], f"Scores, protocol {config.protocol.name} ({config.results})"))


def shown(cell: Cell | None) -> str:
    """Mean and deviation in percent."""
    if cell is None:
        return "-"
    return f"{cell.mean:.1f}" + ("" if cell.deviation is None else f" ± {cell.deviation:.1f}")
