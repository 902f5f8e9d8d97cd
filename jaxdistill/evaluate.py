"""Scores on tasks: every model fine-tuned under one protocol with several seeds, or scored with the head that it has.

A run that is interrupted goes on where it was: each finished training is in the model's file of results.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxdistill import results
from jaxdistill.compare.cells import Cell, read_cells
from jaxdistill.config import EvaluationConfig, Protocol
from jaxdistill.errors import InputError
from jaxdistill.finetune import (
    Evaluated,
    TaskData,
    TaskRows,
    Trainer,
    Training,
    cells_of,
    check_head,
    read_tasks,
    resolve_models,
    task_data,
    trainer_of,
    with_words,
)
from jaxdistill.models import EncoderConfig, load_pretrained
from jaxdistill.progress import Progress, choose_progress, duration
from jaxdistill.report import print_table, summary_table
from jaxdistill.tasks import TASKS, Task, find_tasks, shown_scores

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "scikit-learn", "scipy")


def evaluate(config: EvaluationConfig, *, overwrite: bool = False) -> list[Path]:
    """Score every model on every task; returns the files of results.

    Raises:
      InputError: before anything is trained or written: a model, task, folder or protocol that cannot be.
    """
    if config.output:
        raise InputError("output: is where finetune writes its model; evaluate writes results")
    models, tasks = resolve_models(config), find_tasks(config.tasks)
    there, missing = read_tasks(tasks, config)
    sections = {model.name: begin_scores(model, config, overwrite) for model in models}
    for model in models:
        if not config.train:
            check_head(model, [rows.task for rows in there])
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    files = []
    for model in models:
        files.append(score_model(model, there, missing, sections[model.name], config))
    print_scores(files, tasks, config)
    return files


def begin_scores(model: Evaluated, config: EvaluationConfig, overwrite: bool) -> dict[str, Any]:
    """The section of scores to add to: what is in the model's file already, or an empty one.

    Raises:
      InputError: the file is of another model, or of another protocol.
    """
    protocol = config.protocol.model_dump(mode="json") | {"train": config.train}
    fresh = {"protocol": protocol, "tasks": {}, "missing": {}, "versions": {name: version(name) for name in _PACKAGES}}
    path = results.result_file(Path(config.results), model.name)
    if not path.exists():
        return fresh
    known = results.read_result(path)
    results.check_same_model(known, model.description, path)
    if "scores" not in known or overwrite:
        return fresh
    for field, now in protocol.items():
        if field != "seeds" and known["scores"]["protocol"].get(field) != now:
            raise InputError(
                f"protocol.{field}: {path} holds scores with {known['scores']['protocol'].get(field)!r}, now it is {now!r}; give another "
                f"folder of results, or --overwrite"
            )
    seeds = {*known["scores"]["protocol"]["seeds"], *protocol["seeds"]}
    return known["scores"] | {"protocol": protocol | {"seeds": sorted(seeds)}}


def score_model(
    model: Evaluated, tasks: list[TaskRows], missing: dict[str, str], section: dict[str, Any], config: EvaluationConfig
) -> Path:
    """Do what is not done yet; the model's file is written after every training."""
    write = partial(results.write_section, Path(config.results), model.name, model.description, "scores")
    section["missing"] = {name: why for name, why in (section["missing"] | missing).items() if name not in section["tasks"]}
    path, loaded = write(section), None
    for rows in tasks:
        task = rows.task
        entry = section["tasks"].setdefault(task.name, {"examples": {}, "runs": [], "notes": []})
        done = {tuple(run[field] for field in ("learning_rate", "batch_size", "epochs", "seed")) for run in entry["runs"]}
        cells = [cell for cell in cells_of(config.protocol, task) if dataclasses.astuple(cell) not in done]
        if not config.train:
            cells = [] if entry["runs"] else [Training(0.0, 0, 0, 0)]
        section["missing"].pop(task.name, None)
        if not cells:
            print(f"{model.name}: {task.title} is done already")
            continue
        loaded = loaded or load_pretrained(model.folder)
        data = task_data(rows, model, config)
        counts = {"train": len(data.train), "train_available": data.available} if data.train else {}
        entry["examples"] = counts | {split: len(tokens) for split, tokens in data.tests.items()}
        entry["notes"] = list(data.notes)
        for runs in trained_cells(model, loaded, data, cells, config):
            entry["runs"] += runs
            path = write(section)
    return path


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
        params = jax.device_put(with_words(loaded[1], data.vocabulary, 256))
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
            except jax.errors.JaxRuntimeError as error:
                if len(group) == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                progress.say(f"{model.name}: {data.task.title}: {len(group)} seeds together do not fit; one after the other")
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
        found = {split: trainer.scores(params, split, together=together) for split in trainer.data.tests}
        for i, kept in enumerate(best):
            scores = {split: values[i] for split, values in found.items()}
            main = scores[trainer.data.dev][task.metrics[0]]
            if not kept or protocol.report == "last" or main > kept["scores"][trainer.data.dev][task.metrics[0]]:
                kept |= {"epoch": epoch, "scores": scores}

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
