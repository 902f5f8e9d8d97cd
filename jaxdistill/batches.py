"""Batches on the devices: rows of the token store or of a task, placed by the mesh, each process reading only its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from jaxdistill.data import RowOrder, RowSource, TextStream, batches, held_out_rows, language_numbers, row_order
from jaxdistill.resolve import Run
from jaxdistill.sharding import batch_sharding

_FIELDS = ("input_ids", "segment_ids", "token_type_ids", "labels", "languages")  # the mask follows from the segments: 0 is padding


def run_order(run: Run, store: RowSource) -> RowOrder:
    """Which row every sample of the run is."""
    return row_order(run.config.data, store.source_rows("train"), run.config.training.seed)


def training_batches(
    run: Run, store: RowSource, mesh: jax.sharding.Mesh, start_step: int, offset: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Batches [A, B, S] from `start_step` to the last: pure functions of (seed, step + offset), equal on any number of processes."""
    training = run.config.training
    numbers = partial(language_numbers, run.config.data, store.source_rows("train")) if run.settings.languages else None
    rows = _own_rows(mesh, training.micro_batches, training.batch_size // training.micro_batches)
    read = store.batches if isinstance(store, TextStream) else partial(batches, store)
    span = {"start_step": start_step + offset, "num_steps": training.steps - start_step}
    steps = read(run_order(run, store), batch_size=training.batch_size, **span, rows=rows, languages=numbers)
    for batch in steps:
        yield _place(mesh, {name: batch[name] for name in _FIELDS if name in batch}, training.micro_batches, training.batch_size)


def evaluation_batches(run: Run, store: RowSource, mesh: jax.sharding.Mesh) -> Iterator[dict[str, jax.Array]]:
    """The same held-out rows every time, in batches of the training's shape; what is missing in the last is padding."""
    training = run.config.training
    chosen = held_out_rows(store, training.evaluate_rows)
    own = _own_rows(mesh, training.micro_batches, training.batch_size // training.micro_batches)
    for start in range(0, len(chosen), training.batch_size):
        numbers = chosen[start : start + training.batch_size]
        there = own < len(numbers)
        batch = store.read_batch("held_out", numbers[own[there]])
        fields = {name: _padded(batch[name], there) for name in _FIELDS if name in batch}
        yield _place(mesh, fields, training.micro_batches, training.batch_size)


def _padded(rows: np.ndarray, there: np.ndarray) -> np.ndarray:
    padded = np.zeros((len(there), *rows.shape[1:]), rows.dtype)
    padded[there] = rows
    return padded


def _own_columns(mesh: jax.sharding.Mesh, num_micro: int, num_rows: int) -> np.ndarray:
    """Rows of each micro-batch whose shards lie on this process' devices, in ascending order; they need not lie side by side."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((num_micro, num_rows))
    columns = sorted({index[1].indices(num_rows)[:2] for index in indices.values()})
    return np.concatenate([np.arange(start, stop) for start, stop in columns])


def _own_rows(mesh: jax.sharding.Mesh, num_micro: int, num_rows: int) -> np.ndarray:
    """Numbers, within the global batch, of the rows that this process reads."""
    return (np.arange(num_micro)[:, None] * num_rows + _own_columns(mesh, num_micro, num_rows)).ravel()


def _place(mesh: jax.sharding.Mesh, fields: dict[str, np.ndarray], num_micro: int, batch_size: int) -> dict[str, jax.Array]:
    num_rows = batch_size // num_micro
    own = _own_columns(mesh, num_micro, num_rows)

    def place(rows: np.ndarray) -> jax.Array:
        local = rows.reshape(num_micro, -1, *rows.shape[1:])

        def shard(index) -> np.ndarray:
            start, stop, _ = index[1].indices(num_rows)
            first = int(np.searchsorted(own, start))
            return local[:, first : first + stop - start]

        return jax.make_array_from_callback((num_micro, num_rows, *rows.shape[1:]), batch_sharding(mesh), shard)

    return {name: place(rows) for name, rows in fields.items()}
