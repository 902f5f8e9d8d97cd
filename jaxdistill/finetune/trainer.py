"""Training one model on one task, from the first batch to scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.config import Protocol
from jaxdistill.data import RowOrder
from jaxdistill.errors import DivergedError
from jaxdistill.finetune import step as steps
from jaxdistill.finetune.step import Batch, Settings, start_params, with_all_words, with_words
from jaxdistill.sharding import rows_sharding, tree_shardings
from jaxdistill.tasks import Task, TaskTokens, packed_batch, score

PREDICTED_TOGETHER = 64  # examples


@dataclass(frozen=True)
class TaskData:
    """A task's examples in a model's tokens. Ids count within `vocabulary`, the ids of the model that the texts use."""

    task: Task
    train: TaskTokens | None
    tests: dict[str, TaskTokens]
    vocabulary: np.ndarray
    row_length: int
    available: int  # rows of the train split before a limit
    notes: tuple[str, ...] = ()

    @property
    def dev(self) -> str:
        return next(iter(self.tests))


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one training."""

    learning_rate: float
    batch_size: int
    epochs: int
    seed: int


class Trainer:
    """Trains one model on one task, for one or more seeds at once."""

    def __init__(self, settings: Settings, data: TaskData, params: dict, protocol: Protocol, mesh: Mesh):
        """`params`: of the whole encoder, on the host."""
        self.settings, self.data, self.protocol, self.mesh = settings, data, protocol, mesh
        self._given = params
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def num_steps(self, cell: Training) -> int:
        return -(-len(self.data.train) // cell.batch_size) * cell.epochs

    def rates(self, cell: Training) -> np.ndarray:
        """Learning rate of every update: a linear warmup, then a linear decay that ends at 0 after the last one (transformers')."""
        steps, warmup = self.num_steps(cell), math.ceil(self.protocol.warmup * self.num_steps(cell))
        done = np.arange(steps)
        ramp = np.minimum(done / max(warmup, 1), 1.0) if warmup else np.ones(steps)
        return (cell.learning_rate * np.minimum(ramp, (steps - done) / max(steps - warmup, 1))).astype(np.float32)

    def train(
        self, cells: Sequence[Training], each_epoch: Callable[[int, dict], None] | None, progress: Callable[[int, float], None]
    ) -> dict:
        """Parameters after the last epoch, on the devices; with several cells, which differ by their seed alone, with a leading axis.

        Args:
          each_epoch: called with the number of epochs done and the parameters.
          progress: called with the number of steps done and the loss of the one before.

        Raises:
          DivergedError: a loss that is not finite.
        """
        cell, together = cells[0], len(cells) > 1
        params, optimizer = self._start(cells)
        step_fn, rates = steps.train_seeds if together else steps.train, self.rates(cell)
        seeds = np.array([cell.seed for cell in cells], np.int32)
        per_epoch, before = self.num_steps(cell) // cell.epochs, None
        for step, batch in enumerate(self._batches(cells)):
            arguments = (batch, rates[step], seeds if together else seeds[0], np.int32(step))
            params, optimizer, loss = step_fn(self.settings, params, optimizer, *arguments)
            if before is not None:  # the step before: one is always under way
                progress(step, self._checked(before, cells))
            before = loss
            if each_epoch and (step + 1) % per_epoch == 0:
                self._checked(before, cells)
                each_epoch((step + 1) // per_epoch, params)
        self._checked(before, cells)
        return params

    def _checked(self, loss: jax.Array, cells: Sequence[Training]) -> float:
        """The mean loss of the seeds; raises DivergedError when one is not finite."""
        value = float(np.mean(jax.device_get(loss)))
        if not math.isfinite(value):
            seeds = ", ".join(str(cell.seed) for cell in cells)
            raise DivergedError(
                f"{self.data.task.name}: the training diverged at learning rate {cells[0].learning_rate:g}, seed {seeds}; take a lower "
                f"protocol.learning_rates"
            )
        return value

    def _start(self, cells: Sequence[Training]) -> tuple[dict, optax.OptState]:
        given = with_words(self._given, self.data.vocabulary, 256)
        starts = [start_params(self.settings.model, given, cell.seed) for cell in cells]
        together = len(cells) > 1
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *starts) if together else starts[0]
        init = jax.vmap(self.settings.optimizer.init) if together else self.settings.optimizer.init
        shapes = jax.eval_shape(lambda x: x, starts[0])
        placed = [tree_shardings(tree, self.mesh) for tree in (shapes, jax.eval_shape(self.settings.optimizer.init, shapes))]
        if together:
            placed = [jax.tree.map(lambda s: NamedSharding(self.mesh, PartitionSpec(None, *s.spec)), tree) for tree in placed]
        params = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), params), placed[0])
        return params, jax.jit(init, out_shardings=placed[1])(params)

    def _batches(self, cells: Sequence[Training]) -> Iterator[Batch]:
        """Every epoch all examples, in an order that the seed alone decides; the last batch holds what is left."""
        train, size = self.data.train, min(cells[0].batch_size, len(self.data.train))
        orders = [RowOrder((len(train),), None, cell.seed) for cell in cells]
        make = partial(packed_batch, train, length=self.data.row_length, num_examples=size, row_step=self._row_step(train, size))
        for epoch in range(cells[0].epochs):
            for start in range(0, len(train), size):
                numbers = epoch * len(train) + np.arange(start, min(start + size, len(train)))
                batches = [make(order.rows(numbers)) for order in orders]
                if len(batches) > 1:
                    most = max(len(batch["input_ids"]) for batch in batches)
                    batches = [make(order.rows(numbers), num_rows=most) for order in orders]
                    yield self._place({name: np.stack([batch[name] for batch in batches]) for name in batches[0]}, leading=1)
                else:
                    yield self._place(batches[0])

    def _row_step(self, tokens: TaskTokens, num_examples: int) -> int:
        """Rows come in about this many: a batch needs some fewer or more than the mean, in a handful of shapes."""
        expected = float(np.mean(tokens.lengths)) * num_examples / self.data.row_length
        return max(round(expected / 5 / self._devices), 1) * self._devices

    def _place(self, batch: Batch, leading: int = 0) -> Batch:
        rows, whole = rows_sharding(self.mesh, leading), NamedSharding(self.mesh, PartitionSpec())
        return {name: jax.device_put(value, rows if value.ndim == 2 + leading else whole) for name, value in batch.items()}

    def logits(self, params: dict, split: str, *, together: bool = False) -> np.ndarray:
        """Of every example of a test split in its order: [n, C], or [K, n, C] with the parameters of several seeds."""
        tokens = self.data.tests[split]
        row_step = self._row_step(tokens, PREDICTED_TOGETHER)
        function = steps.predict_seeds if together else steps.predict_one
        found = []
        for start in range(0, len(tokens), PREDICTED_TOGETHER):
            chosen = np.arange(start, min(start + PREDICTED_TOGETHER, len(tokens)))
            batch = packed_batch(
                tokens, chosen, length=self.data.row_length, num_examples=PREDICTED_TOGETHER,
                row_step=row_step,
            )  # fmt: skip
            found.append((function(self.settings, params, self._place(batch)), len(chosen)))
        return np.concatenate([np.asarray(logits)[..., :count, :] for logits, count in found], axis=-2)

    def scores(self, params: dict, split: str, *, together: bool = False) -> list[dict[str, float]]:
        """Metric -> value on a test split, for each seed."""
        logits = self.logits(params, split, together=together)
        return [score(self.data.task, each, self.data.tests[split].labels) for each in (logits if together else [logits])]

    def whole(self, params: dict, cell: Training, epochs: int | None = None) -> dict:
        """Parameters of one seed after so many epochs (default: all) on the host, with the whole table of words."""
        rates = self.rates(cell)[: self.num_steps(cell) * (epochs or cell.epochs) // cell.epochs]
        decayed = float(np.prod(1.0 - rates.astype(np.float64) * self.protocol.weight_decay))
        return with_all_words(jax.tree.map(np.asarray, jax.device_get(params)), self._given, self.data.vocabulary, decayed)
