"""Tasks of fine-tuning: what they are, how their rows are read, and how predictions are scored."""

from jaxdistill.tasks.catalogue import GLUE, TASKS, Split, Task, find_tasks

__all__ = ["GLUE", "TASKS", "Split", "Task", "find_tasks"]
