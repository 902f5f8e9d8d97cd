"""Scores on tasks: every model fine-tuned under one protocol with several seeds, or scored with the head that it has.

A run that is interrupted goes on where it was: each finished training is in the model's file of results.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
import numpy as np

from jaxdistill import results
from jaxdistill.config import EvaluationConfig, Protocol
from jaxdistill.data import TextTokenizer, check_tokenizer, load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.finetune import Cell, Settings, TaskData, Trainer, with_words
from jaxdistill.models import EncoderConfig, find_model, load_config, load_pretrained
from jaxdistill.progress import Progress, choose_progress, duration
from jaxdistill.report import print_table, summary_table
from jaxdistill.sharding import create_mesh
from jaxdistill.tasks import MissingSplit, Rows, Task, encode_rows, find_tasks, read_split, row_length

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Evaluated:
    """A model that is to be scored; nothing of its weights is read yet."""

    name: str
    source: str
    folder: Path
    config: EncoderConfig
    tokenizer: TextTokenizer
    description: dict[str, Any]


def resolve_models(config: EvaluationConfig) -> list[Evaluated]:
    """The models of a config, each checked with its tokenizer.

    Raises:
      InputError: none given, no such model, no tokenizer or another model's.
    """
    if not config.models:
        raise InputError("models: which? give the folder of a model or a run, or a Hub id")
    found = []
    for name, source in results.find_models(config.models).items():
        folder = find_model(source)
        model, tokenizer = load_config(folder), load_tokenizer(folder)
        pad_token_id = model.pad_token_id if model.positions_from_padding else None
        check_tokenizer(tokenizer, vocab_size=model.vocab_size, pad_token_id=pad_token_id, where=str(source))
        if config.protocol.max_length > model.max_sequence_length:
            raise InputError(
                f"protocol.max_length: {config.protocol.max_length} is over the {model.max_sequence_length} positions of {source}"
            )
        found.append(Evaluated(name, source, folder, model, tokenizer, results.describe_model(source)))
    return found


@dataclass(frozen=True)
class TaskRows:
    """What there is of a task."""

    task: Task
    train: Rows | None
    tests: dict[str, Rows]
    notes: tuple[str, ...]  # what is not there or left out


def read_task(task: Task, config: EvaluationConfig) -> TaskRows:
    """Rows to train on and to be scored on.

    Raises:
      MissingSplit: without a train split (if it is read) or any split to be scored on.
      InputError: what is there is not the task.
    """
    train = read_split(task, task.train, config.data) if config.train else None
    tests, missing = {}, []
    for name, split in task.tests.items():
        try:
            tests[name] = read_split(task, split, config.data)
        except MissingSplit as error:
            missing.append((name, error))
    if not tests:
        raise missing[0][1]
    notes = [f"{task.title} is not scored on {', '.join(split for split, _ in missing)}: not in the data"] if missing else []
    for split, rows in [("train", train), *tests.items()]:
        if rows is not None and rows.unlabelled:
            notes.append(f"{task.title}: {rows.unlabelled} rows of {split} have no gold label and are left out")
    if config.protocol.report == "best" and missing and missing[0][0] == next(iter(task.tests)):
        raise missing[0][1]  # what the best is chosen on
    return TaskRows(task, train, tests, tuple(notes))


def task_data(rows: TaskRows, model: Evaluated, config: EvaluationConfig) -> TaskData:
    """A task in a model's tokens."""
    task, train = rows.task, rows.train
    available = len(train) if train else 0
    if train and config.protocol.train_limit:  # the same rows for every model and seed
        train = train.sample(config.protocol.train_limit)
    encode = partial(encode_rows, tokenizer=model.tokenizer, family=model.config.family, max_length=config.protocol.max_length)
    tokens = {split: encode(test) for split, test in rows.tests.items()}
    trained = encode(train) if train else None
    everything = [*tokens.values(), *([trained] if trained else [])]
    vocabulary = np.unique(np.concatenate([ids for each in everything for ids in each.ids]))

    def within(each):
        return dataclasses.replace(each, ids=[np.searchsorted(vocabulary, ids).astype(np.int32) for ids in each.ids])

    longest = max(int(each.lengths.max()) for each in everything)
    length = row_length(longest, model.config.max_sequence_length)
    return TaskData(
        task, within(trained) if trained else None, {split: within(each) for split, each in tokens.items()}, vocabulary, length,
        available, rows.notes,
    )  # fmt: skip


def cells_of(protocol: Protocol, task: Task) -> list[Cell]:
    """Every training of a task: the grid, each with every seed."""
    grid = itertools.product(protocol.learning_rates, protocol.batch_sizes)
    return [Cell(rate, size, protocol.epochs_for(task.name), seed) for rate, size in grid for seed in protocol.seeds]


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


def read_tasks(tasks: tuple[Task, ...], config: EvaluationConfig) -> tuple[list[TaskRows], dict[str, str]]:
    """The tasks that are there, all read, so that what is wrong is said before hours of training; and why the others are not.

    Raises:
      InputError: data that is not the task's, or none of the tasks there.
    """
    there, missing = [], {}
    for task in tasks:
        try:
            there.append(read_task(task, config))
        except MissingSplit as error:
            missing[task.name] = str(error)
    if not there:
        raise InputError(f"tasks: none of them is there. {next(iter(missing.values()))}")
    return there, missing


def check_head(model: Evaluated, tasks: list[Task]) -> None:
    """Raises InputError when a model that is scored as it is has no classification head for a task."""
    for task in tasks:
        if len(model.config.labels) != task.num_labels:
            has = f"a head of {len(model.config.labels)}" if model.config.labels else "no classification head"
            raise InputError(
                f"{model.source}: has {has}, {task.name} needs {task.num_labels} labels; leave train=false out to fine-tune it"
            )


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
            cells = [] if entry["runs"] else [Cell(0.0, 0, 0, 0)]
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


def seed_groups(cells: list[Cell], together: bool) -> list[list[Cell]]:
    """Cells that are trained at once: those that differ by their seed alone."""
    if not together:
        return [[cell] for cell in cells]
    by_rest = itertools.groupby(cells, key=lambda cell: (cell.learning_rate, cell.batch_size, cell.epochs))
    return [list(group) for _, group in by_rest]


def trainer_of(model: Evaluated, loaded: tuple[EncoderConfig, dict], data: TaskData, config: EvaluationConfig) -> Trainer:
    shape = loaded[0] if not config.train else dataclasses.replace(loaded[0], labels=data.task.labels or ("score",))
    precision = config.precision
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Trainer(Settings.create(shape, precision, config.protocol), data, loaded[1], config.protocol, create_mesh(config.mesh))


def trained_cells(
    model: Evaluated, loaded: tuple[EncoderConfig, dict], data: TaskData, cells: list[Cell], config: EvaluationConfig
) -> Iterator[list[dict[str, Any]]]:
    """The runs of results, as they are finished."""
    trainer = trainer_of(model, loaded, data, config)
    if not config.train:
        params = jax.device_put(with_words(loaded[1], data.vocabulary, 256))
        yield [{"seed": None, "scores": {split: trainer.scores(params, split)[0] for split in data.tests}}]
        return
    # Measured on a CPU: three seeds of one step take longer than three steps (docs/log.md); an accelerator is left idle by one.
    together = config.seeds_together == "yes" or (config.seeds_together == "auto" and jax.default_backend() != "cpu")
    groups = seed_groups(cells, together)
    total = sum(trainer.num_steps(group[0]) for group in groups)
    with choose_progress(total, f"{model.name}: {data.task.title}", jax.process_index() == 0) as progress:
        done = 0
        for group in groups:
            runs = run_group(trainer, group, config.protocol, progress, done)
            done += trainer.num_steps(group[0])
            yield runs
            for run in runs:
                took = duration(run["seconds"])
                progress.say(f"{model.name}: {data.task.title}, seed {run['seed']}: {shown_scores(run['scores'])} ({took})")


def run_group(trainer: Trainer, group: list[Cell], protocol: Protocol, progress: Progress, done: int) -> list[dict[str, Any]]:
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
    params = trainer.train(group, every, lambda step, loss: progress.update(done + step, {"step": done + step, "loss": loss}))
    if every is None:
        each_epoch(group[0].epochs, params)
    seconds = (time.monotonic() - start) / len(group)
    return [dataclasses.asdict(cell) | kept | {"seconds": round(seconds, 2)} for cell, kept in zip(group, best, strict=True)]


def shown_scores(scores: dict[str, dict[str, float]]) -> str:
    several = len(scores) > 1
    return ", ".join(
        (f"{split} " if several else "") + " ".join(f"{metric} {100 * value:.1f}" for metric, value in values.items())
        for split, values in scores.items()
    )


def reported(entry: dict[str, Any], task: Task, split: str, metric: str, report: str) -> list[float]:
    """One value for each seed: its only run's, or of a grid that of the run that is best on the dev set."""
    by_seed: dict[Any, list[dict]] = {}
    for run in entry["runs"]:
        if split in run["scores"]:
            by_seed.setdefault(run["seed"], []).append(run)
    dev = next((name for name in task.tests if all(name in run["scores"] for runs in by_seed.values() for run in runs)), split)
    chosen = [max(runs, key=lambda run: run["scores"][dev][task.metrics[0]]) for runs in by_seed.values()]
    return [run["scores"][split][metric] for run in chosen]


def print_scores(files: list[Path], tasks: tuple[Task, ...], config: EvaluationConfig) -> None:
    """The main metric of each task and split: mean and standard deviation over the seeds, in percent."""
    found = [results.read_result(path) for path in files]
    columns = [
        (task, split)
        for task in tasks
        for split in task.tests
        if any(reported_or_none(value, task, split, config.protocol.report) for value in found)
    ]
    rows = []
    for value in found:
        row = [value["name"]]
        for task, split in columns:
            values = reported_or_none(value, task, split, config.protocol.report)
            deviation = f" ± {100 * stdev(values):.1f}" if values and len(values) > 1 else ""
            row.append(f"{100 * mean(values):.1f}{deviation}" if values else "-")
        rows.append(row)
    several = {task.name for task, _ in columns if sum(other is task for other, _ in columns) > 1}
    titles = [" ".join([task.title, *([split] if task.name in several else []), task.metrics[0]]) for task, split in columns]
    print_table(summary_table(rows, ["model", *titles], f"Scores, protocol {config.protocol.name} ({config.results})"))


def reported_or_none(value: dict[str, Any], task: Task, split: str, report: str) -> list[float]:
    entry = value["scores"]["tasks"].get(task.name)
    return reported(entry, task, split, task.metrics[0], report) if entry else []
