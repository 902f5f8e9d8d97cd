"""Batches on the devices: rows of the token store or of a task, placed by the mesh, each process reading only its own."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from jaxdistill.data import RowOrder, RowSource, batches, held_out_rows
from jaxdistill.resolve import Run
from jaxdistill.sharding import batch_sharding

_FIELDS = ("input_ids", "segment_ids", "token_type_ids", "labels")  # the attention mask follows from the segments: 0 is padding


def training_batches(run: Run, store: RowSource, mesh: jax.sharding.Mesh, start_step: int) -> Iterator[dict[str, jax.Array]]:
    """Batches [A, B, S] from `start_step` to the last: pure functions of (seed, step), equal on any number of processes."""
    training = run.config.training
    weights = [source.weight for source in run.config.data.sources or ()]
    order = RowOrder(store.source_rows("train"), weights if weights and None not in weights else None, training.seed)
    rows = _own_rows(mesh, training.micro_batches, training.batch_size // training.micro_batches)
    steps = batches(store, order, batch_size=training.batch_size, start_step=start_step, num_steps=training.steps - start_step, rows=rows)
    for batch in steps:
        yield _place(mesh, {name: batch[name] for name in _FIELDS if name in batch}, training.micro_batches, training.batch_size)


def evaluation_batches(run: Run, store: RowSource, mesh: jax.sharding.Mesh) -> Iterator[dict[str, jax.Array]]:
    """The same held-out rows every time, in batches of the training's shape; what is missing in the last is padding."""
    training = run.config.training
    chosen = held_out_rows(store, training.evaluate_rows)
    own = _own_rows(mesh, training.micro_batches, training.batch_size // training.micro_batches)
    for start in range(0, len(chosen), training.batch_size):
        numbers = chosen[start : start + training.batch_size]
        batch = store.read_batch("held_out", numbers)
        missing = training.batch_size - len(numbers)
        fields = {name: np.pad(batch[name], [(0, missing)] + [(0, 0)] * (batch[name].ndim - 1))[own] for name in _FIELDS if name in batch}
        yield _place(mesh, fields, training.micro_batches, training.batch_size)


def _own_rows(mesh: jax.sharding.Mesh, num_micro: int, num_rows: int) -> np.ndarray:
    """Numbers, within the global batch, of the rows whose shards lie on this process' devices, in the order of the shards."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((num_micro, num_rows))
    columns = sorted({(index[1].start or 0, num_rows if index[1].stop is None else index[1].stop) for index in indices.values()})
    own = np.concatenate([np.arange(start, stop) for start, stop in columns])
    return (np.arange(num_micro)[:, None] * num_rows + own).ravel()


def _place(mesh: jax.sharding.Mesh, fields: dict[str, np.ndarray], num_micro: int, batch_size: int) -> dict[str, jax.Array]:
    def place(rows: np.ndarray) -> jax.Array:
        local = rows.reshape(num_micro, -1, *rows.shape[1:])
        shape = (num_micro, batch_size // num_micro, *rows.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh), local, shape)

    return {name: place(rows) for name, rows in fields.items()}
