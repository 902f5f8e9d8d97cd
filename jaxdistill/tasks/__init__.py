"""Tasks of fine-tuning: what they are, how their rows are read, and how predictions are scored."""

from jaxdistill.tasks.catalogue import GLUE, TASKS, Split, Task, find_tasks
from jaxdistill.tasks.read import MissingSplit, Rows, read_split
from jaxdistill.tasks.scores import score, shown_scores
from jaxdistill.tasks.store import TaskStore, find_task, num_training_rows, open_task
from jaxdistill.tasks.tokens import TaskTokens, encode_rows, packed_batch, row_length

__all__ = [
    "GLUE",
    "TASKS",
    "MissingSplit",
    "Rows",
    "Split",
    "Task",
    "TaskStore",
    "TaskTokens",
    "encode_rows",
    "find_task",
    "find_tasks",
    "num_training_rows",
    "open_task",
    "packed_batch",
    "read_split",
    "row_length",
    "score",
    "shown_scores",
]
