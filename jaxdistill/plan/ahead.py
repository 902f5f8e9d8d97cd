"""Compilation ahead of time: the step that `distill` runs, for a TPU topology or a GPU of which no device is here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdistill.models import init_params
from jaxdistill.resolve import Run
from jaxdistill.sharding import batch_sharding, create_mesh, tree_shardings
from jaxdistill.state import abstract_state, compile_step, read_of_teacher


def topology_devices(topology: str, target_config: Path | None = None) -> Sequence:
    """The devices of a TPU topology (v5e:4x4) or, with the description of a GPU, of so many of it (1x1x8)."""
    from jax.experimental import topologies

    if target_config is not None:
        described = target_config.read_text(encoding="utf-8")
        return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=described).devices
    # libtpu asks the machine for what only a TPU's host can answer.
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def abstract_arguments(run: Run, mesh: jax.sharding.Mesh) -> tuple:
    """State, teacher and batch of the step: shapes, dtypes and shardings."""
    heads = {"mlm": any(f.kind == "logits" for f in run.teacher_features), "classifier": bool(run.teacher.labels)}
    params = jax.eval_shape(partial(init_params, run.teacher, **heads), jax.random.key(0))
    read = jax.eval_shape(partial(read_of_teacher, run), params)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    teacher = jax.tree.map(place, read, tree_shardings(read, mesh))
    training, rows = run.config.training, batch_sharding(mesh)
    shape = (training.micro_batches, training.batch_size // training.micro_batches, run.config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in ("input_ids", "segment_ids")}
    if run.task:
        batch["token_type_ids"] = batch["input_ids"]
        batch["labels"] = jax.ShapeDtypeStruct(shape[:2], jnp.float32 if len(run.task.outputs) == 1 else jnp.int32, sharding=rows)
    return abstract_state(run, params, mesh), teacher, batch


def compile_ahead(run: Run, devices: Sequence) -> jax.stages.Compiled:
    """The step of a run that was resolved for as many devices of this platform."""
    mesh = create_mesh(run.config.mesh, devices)
    arguments = abstract_arguments(run, mesh)  # outside of the mesh, on which nothing can be run
    with jax.set_mesh(mesh):
        return compile_step(run, *arguments)
