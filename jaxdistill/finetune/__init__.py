"""Fine-tuning an encoder on a task."""

from jaxdistill.finetune.inputs import (
    Evaluated,
    TaskRows,
    cells_of,
    dtype_of,
    head_order,
    read_task,
    read_tasks,
    resolve_models,
    task_data,
    trainer_of,
    with_ordered_head,
)
from jaxdistill.finetune.model import finetune
from jaxdistill.finetune.step import Settings, finetune_step, start_params, with_all_words, with_words
from jaxdistill.finetune.trainer import TaskData, Trainer, Training

__all__ = [
    "Evaluated",
    "Settings",
    "TaskData",
    "TaskRows",
    "Trainer",
    "Training",
    "cells_of",
    "dtype_of",
    "finetune",
    "finetune_step",
    "head_order",
    "read_task",
    "read_tasks",
    "resolve_models",
    "start_params",
    "task_data",
    "trainer_of",
    "with_all_words",
    "with_ordered_head",
    "with_words",
]
