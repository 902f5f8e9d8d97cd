"""Fine-tuning an encoder on a task: the step, and one training from the first batch to scores.

Texts are packed into rows, so that hardly any padding is computed; each text sees itself alone, and a batch is the same
examples as anywhere else. Of the word embeddings only those rows are trained that the task's texts use: the others have no
gradient, and AdamW moves them by weight decay alone, which is made up for at the end.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.config import Protocol
from jaxdistill.data import RowOrder
from jaxdistill.errors import DivergedError
from jaxdistill.features import Feature
from jaxdistill.models import EncoderConfig, forward, init_params, label_logits
from jaxdistill.optimizer import decay_mask
from jaxdistill.row_keys import RowKeys
from jaxdistill.sharding import rows_sharding, tree_shardings
from jaxdistill.tasks import Task, TaskTokens, packed_batch, score
from jaxdistill.train_step import precision

Batch = dict  # input_ids, token_type_ids, segment_ids [R, S]; row, slot, labels, weight [B]; with seeds a leading axis K
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
class Cell:
    """Hyperparameters of one training."""

    learning_rate: float
    batch_size: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """What the step's code depends on; hashable, so that equal models share one compilation."""

    model: EncoderConfig
    dtype: str
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float

    @classmethod
    def create(cls, model: EncoderConfig, dtype: str, protocol: Protocol) -> Settings:
        return cls(model, dtype, protocol.b1, protocol.b2, protocol.eps, protocol.weight_decay, protocol.clip_norm)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW without its learning rate, which is an argument of the step."""
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return optax.chain(clip, adam, optax.add_decayed_weights(self.weight_decay, mask=decay_mask))


def predict(settings: Settings, params: dict, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Logits [B, C] in float32; with a key, under dropout."""
    config = settings.model
    last = Feature("hidden", config.num_layers)
    segments = batch["segment_ids"]
    dropout = None if key is None else RowKeys.create(key, jnp.arange(segments.shape[0], dtype=jnp.uint32))
    hidden = forward(
        config, params, batch["input_ids"], (segments > 0).astype(jnp.int32), batch["token_type_ids"], segments,
        features=frozenset({last}), dropout=dropout, dtype=settings.dtype,
    )[last]  # fmt: skip
    first = hidden[batch["row"], batch["slot"]]
    if key is not None:
        dropout = RowKeys.create(jax.random.fold_in(key, 1), jnp.arange(first.shape[0], dtype=jnp.uint32))
    return label_logits(config, params, first, dropout=dropout, dtype=settings.dtype)


def example_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B]: cross entropy in nats of [B, C] logits, or the squared error of a regression (C = 1, float labels)."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return (logits[:, 0] - labels) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def finetune_step(settings: Settings, params: dict, optimizer: optax.OptState, batch: Batch, rate, seed, step):
    """One update; returns the parameters, the optimizer state and the mean loss over the batch's examples."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"dropout")), step)

    def loss(params):
        losses = example_losses(predict(settings, params, batch, key), batch["labels"])
        return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])

    value, gradients = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of int32 counters
        updates, optimizer = settings.optimizer.update(gradients, optimizer, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), optimizer, value


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _train(settings: Settings, params, optimizer, batch, rate, seed, step):
    with precision(settings.dtype):
        return finetune_step(settings, params, optimizer, batch, rate, seed, step)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _train_seeds(settings: Settings, params, optimizer, batch, rate, seed, step):
    with precision(settings.dtype):
        return jax.vmap(partial(finetune_step, settings), in_axes=(0, 0, 0, None, 0, None))(params, optimizer, batch, rate, seed, step)


@partial(jax.jit, static_argnums=0)
def _predict(settings: Settings, params, batch):
    with precision(settings.dtype):
        return predict(settings, params, batch)


@partial(jax.jit, static_argnums=0)
def _predict_seeds(settings: Settings, params, batch):
    with precision(settings.dtype):
        return jax.vmap(partial(predict, settings), in_axes=(0, None))(params, batch)


def start_params(config: EncoderConfig, params: dict, seed: int) -> dict:
    """The encoder with a new classification head for `config.labels`, and BERT's pooler where the model has none."""
    heads = jax.jit(partial(_heads, config))(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"classification head")))
    pooler = {"pooler": params.get("pooler", heads.get("pooler"))} if config.family == "bert" else {}
    return {"embeddings": params["embeddings"], "layers": params["layers"], "classifier": heads["classifier"]} | pooler


def _heads(config: EncoderConfig, key: jax.Array) -> dict:
    small = dataclasses.replace(config, num_layers=0, vocab_size=1)
    return {name: value for name, value in init_params(small, key, classifier=True).items() if name in ("pooler", "classifier")}


def with_words(params: dict, vocabulary: np.ndarray, divisor: int) -> dict:
    """The parameters with these rows of the word embeddings alone, and rows of zeros up to a multiple of `divisor`."""
    table = np.asarray(params["embeddings"]["word"]["embedding"])[vocabulary]
    table = np.pad(table, ((0, -len(table) % divisor), (0, 0)))
    return params | {"embeddings": params["embeddings"] | {"word": {"embedding": table}}}


def with_all_words(params: dict, before: dict, vocabulary: np.ndarray, decayed: float) -> dict:
    """The parameters with the whole table again. `decayed`: what weight decay left of the rows that were not trained."""
    table = np.asarray(before["embeddings"]["word"]["embedding"], np.float32) * np.float32(decayed)
    table[vocabulary] = np.asarray(params["embeddings"]["word"]["embedding"])[: len(vocabulary)]
    return params | {"embeddings": params["embeddings"] | {"word": {"embedding": table}}}


class Trainer:
    """Trains one model on one task, for one or more seeds at once."""

    def __init__(self, settings: Settings, data: TaskData, params: dict, protocol: Protocol, mesh: Mesh):
        """`params`: of the whole encoder, on the host."""
        self.settings, self.data, self.protocol, self.mesh = settings, data, protocol, mesh
        self._given = params
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def num_steps(self, cell: Cell) -> int:
        return -(-len(self.data.train) // cell.batch_size) * cell.epochs

    def rates(self, cell: Cell) -> np.ndarray:
        """Learning rate of every update: a linear warmup, then a linear decay that ends at 0 after the last one (transformers')."""
        steps, warmup = self.num_steps(cell), round(self.protocol.warmup * self.num_steps(cell))
        done = np.arange(steps)
        ramp = np.minimum(done / max(warmup, 1), 1.0) if warmup else np.ones(steps)
        return (cell.learning_rate * np.minimum(ramp, (steps - done) / max(steps - warmup, 1))).astype(np.float32)

    def train(self, cells: Sequence[Cell], each_epoch: Callable[[int, dict], None] | None, progress: Callable[[int, float], None]) -> dict:
        """Parameters after the last epoch, on the devices; with several cells, which differ by their seed alone, with a leading axis.

        Args:
          each_epoch: called with the number of epochs done and the parameters.
          progress: called with the number of steps done and the loss of the one before.
        """
        cell, together = cells[0], len(cells) > 1
        params, optimizer = self._start(cells)
        step_fn, rates, seeds = (_train_seeds if together else _train), self.rates(cell), np.array([cell.seed for cell in cells], np.int32)
        per_epoch, before = self.num_steps(cell) // cell.epochs, None
        for step, batch in enumerate(self._batches(cells)):
            arguments = (batch, rates[step], seeds if together else seeds[0], np.int32(step))
            params, optimizer, loss = step_fn(self.settings, params, optimizer, *arguments)
            if before is not None:  # the step before: one is always under way
                progress(step, float(np.mean(jax.device_get(before))))
            before = loss
            if each_epoch and (step + 1) % per_epoch == 0:
                each_epoch((step + 1) // per_epoch, params)
        if not np.isfinite(jax.device_get(before)).all():
            raise DivergedError(
                f"{self.data.task.name}: the training diverged at learning rate {cell.learning_rate:g}, seed "
                f"{', '.join(str(cell.seed) for cell in cells)}; take a lower protocol.learning_rates"
            )
        return params

    def _start(self, cells: Sequence[Cell]) -> tuple[dict, optax.OptState]:
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

    def _batches(self, cells: Sequence[Cell]) -> Iterator[Batch]:
        """Every epoch all examples, in an order that the seed alone decides; the last batch holds what is left."""
        train, size = self.data.train, cells[0].batch_size
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
        function = _predict_seeds if together else _predict
        found = []
        for start in range(0, len(tokens), PREDICTED_TOGETHER):
            chosen = np.arange(start, min(start + PREDICTED_TOGETHER, len(tokens)))
            batch = packed_batch(
                tokens, chosen, length=self.data.row_length, num_examples=PREDICTED_TOGETHER,
                row_step=self._row_step(tokens, PREDICTED_TOGETHER),
            )  # fmt: skip
            found.append((function(self.settings, params, self._place(batch)), len(chosen)))
        return np.concatenate([np.asarray(logits)[..., :count, :] for logits, count in found], axis=-2)

    def scores(self, params: dict, split: str, *, together: bool = False) -> list[dict[str, float]]:
        """Metric -> value on a test split, for each seed."""
        logits = self.logits(params, split, together=together)
        return [score(self.data.task, each, self.data.tests[split].labels) for each in (logits if together else [logits])]

    def whole(self, params: dict, cell: Cell) -> dict:
        """Parameters of one seed on the host, with the whole table of words."""
        decayed = float(np.prod(1.0 - self.rates(cell).astype(np.float64) * self.protocol.weight_decay))
        return with_all_words(jax.tree.map(np.asarray, jax.device_get(params)), self._given, self.data.vocabulary, decayed)
