"""What is fine-tuned and scored, checked before anything is trained: models with their tokenizers, tasks with their rows."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import results
from jaxdistill.config import EvaluationConfig, Protocol
from jaxdistill.data import TextTokenizer, check_tokenizer, load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.finetune.step import Settings
from jaxdistill.finetune.trainer import TaskData, Trainer, Training
from jaxdistill.models import EncoderConfig, find_model, label_order, load_config
from jaxdistill.sharding import create_mesh
from jaxdistill.tasks import MissingSplit, Rows, Task, encode_rows, read_split, row_length


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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of each split's texts and labels."""
        splits = ({"train": self.train} if self.train else {}) | self.tests
        return {name: rows.fingerprint for name, rows in splits.items()}


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


def head_order(model: Evaluated, task: Task) -> list[int]:
    """For each label of the task, which output of the model's classification head it is; outputs without names count as they stand.

    Raises:
      InputError: no classification head, or one for other labels.
    """
    order = label_order(task.outputs, model.config.labels)
    if order is not None:
        return order
    has = f"a head for {', '.join(model.config.labels)}" if model.config.labels else "no classification head"
    raise InputError(f"{model.source}: has {has}, {task.name} needs {', '.join(task.outputs)}; leave train=false out to fine-tune it")


def with_ordered_head(params: dict, order: list[int]) -> dict:
    """The parameters with the outputs of the classification head in this order."""
    output = {name: np.asarray(leaf)[..., order] for name, leaf in params["classifier"]["output"].items()}
    return params | {"classifier": params["classifier"] | {"output": output}}


def cells_of(protocol: Protocol, task: Task) -> list[Training]:
    """Every training of a task: the grid, each with every seed."""
    grid = itertools.product(protocol.learning_rates, protocol.batch_sizes)
    return [Training(rate, size, protocol.epochs_for(task.name), seed) for rate, size in grid for seed in protocol.seeds]


def dtype_of(config: EvaluationConfig) -> str:
    """Of the matrix products."""
    if config.precision == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.precision


def trainer_of(model: Evaluated, loaded: tuple[EncoderConfig, dict], data: TaskData, config: EvaluationConfig) -> Trainer:
    shape = dataclasses.replace(loaded[0], labels=data.task.outputs)
    mesh = create_mesh(config.mesh, jax.local_devices())  # of several processes one fine-tunes
    return Trainer(Settings.create(shape, dtype_of(config), config.protocol), data, loaded[1], config.protocol, mesh)
