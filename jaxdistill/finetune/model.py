"""A fine-tuned model as a folder: one model, one task, the best training of the protocol's grid."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxdistill.config import EvaluationConfig
from jaxdistill.errors import DivergedError, InputError
from jaxdistill.export import export_student
from jaxdistill.finetune.inputs import Evaluated, cells_of, read_task, resolve_models, task_data, trainer_of
from jaxdistill.finetune.trainer import TaskData, Trainer, Training
from jaxdistill.models import EncoderConfig, load_pretrained
from jaxdistill.progress import choose_progress
from jaxdistill.tasks import find_tasks, shown_scores


@dataclass
class _Best:
    """The best parameters on the dev set so far, whole and on the host."""

    cell: Training
    epoch: int
    scores: dict[str, dict[str, float]]
    params: dict


def finetune(config: EvaluationConfig, *, overwrite: bool = False) -> Path:
    """Fine-tune one model on one task with the first seed of the protocol, and write it as a folder for transformers.

    Of a grid the training that is best on the dev set counts, under `report: best` at its best epoch.

    Raises:
      InputError: before anything is trained or written: not one model and one task, no output, or one that is there.
    """
    if not config.output:
        raise InputError("output: which folder is the model to be written to? give output=FOLDER")
    output, tasks = Path(os.path.expanduser(config.output)).absolute(), find_tasks(config.tasks)
    if not config.train:
        raise InputError("train: finetune trains; scores of a model as it is come from evaluate with train=false")
    if len(tasks) != 1:
        raise InputError(f"tasks: finetune makes one model for one task, got {len(tasks)}; give one, as in tasks=rte")
    models = resolve_models(config)
    if len(models) != 1:
        raise InputError(f"models: finetune takes one, got {', '.join(model.name for model in models)}")
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; give another folder, or --overwrite")
    if output.exists() and not (output / "config.json").is_file():
        raise InputError(f"output: {output} exists and is not a model folder; give another one")
    if output.resolve() == models[0].folder.resolve():
        raise InputError(f"output: {output} is the model that is fine-tuned; give another folder")
    data, loaded = task_data(read_task(tasks[0], config), models[0], config), load_pretrained(models[0].folder)
    for note in data.notes:
        print(note)
    best = train_grid(trainer_of(models[0], loaded, data, config), config, models[0].name)
    shape = dataclasses.replace(loaded[0], labels=data.task.outputs)
    card = model_card(models[0], data, best, shape)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_student(output, shape, best.params, tokenizer=models[0].folder, dtype="float32", card=card)
    print(f"{data.task.title}: {shown_scores(best.scores)}\n{output}")
    return output


def train_grid(trainer: Trainer, config: EvaluationConfig, name: str) -> _Best:
    """Every training of the grid with the first seed; the best."""
    protocol, data = config.protocol, trainer.data
    cells = [cell for cell in cells_of(protocol, data.task) if cell.seed == protocol.seeds[0]]
    best: list[_Best] = []

    def keep(cell: Training) -> Callable[[int, dict], None]:
        def each_epoch(epoch: int, params: dict) -> None:
            dev, main = trainer.scores(params, data.dev)[0], data.task.metrics[0]
            if not best or dev[main] > best[0].scores[data.dev][main]:
                scores = {split: dev if split == data.dev else trainer.scores(params, split)[0] for split in data.tests}
                best[:] = [_Best(cell, epoch, scores, trainer.whole(params, cell, epoch))]

        return each_epoch

    with choose_progress(sum(map(trainer.num_steps, cells)), f"{name}: {data.task.title}", jax.process_index() == 0) as progress:
        done = 0
        for cell in cells:
            every = keep(cell) if protocol.report == "best" else None
            try:
                params = trainer.train([cell], every, progress.from_step(done))
            except DivergedError as error:
                if cell == cells[-1] and not best:
                    raise
                progress.say(str(error))
            else:
                if every is None:
                    keep(cell)(cell.epochs, params)
            done += trainer.num_steps(cell)
    return best[0]


def model_card(model: Evaluated, data: TaskData, best: _Best, shape: EncoderConfig) -> str:
    task, cell = data.task, best.cell
    limited = f" of {data.available:,}" if len(data.train) < data.available else ""
    labels = ", ".join(f"{i} {label}" for i, label in enumerate(shape.labels)) if task.labels else "a number"
    scores = "".join(
        f"| {split} {metric} | {100 * value:.1f} |\n" for split, values in best.scores.items() for metric, value in values.items()
    )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [jaxdistill, {task.name}]
---
# {model.name} on {task.title}

`{model.name}`, fine-tuned with jaxdistill on {len(data.train):,}{limited} examples of {task.title}: {" and ".join(task.columns)}
-> {labels}.

| | |
|---|---|
| training | AdamW, learning rate {cell.learning_rate:g}, batch {cell.batch_size}, epoch {best.epoch} of {cell.epochs}, seed {cell.seed} |
{scores}
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
