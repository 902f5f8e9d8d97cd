"""Compilation ahead of time: the step that `distill` runs, for a TPU topology or a GPU of which no device is here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdistill.models import init_params
from jaxdistill.plan.chips import Chip, target_config
from jaxdistill.plan.topology import Topology
from jaxdistill.resolve import Run
from jaxdistill.sharding import batch_sharding, create_mesh, tree_shardings
from jaxdistill.state import abstract_state, compile_step, read_of_teacher
from jaxdistill.update import TrainState


def stay_on_the_host(chip: Chip) -> None:
    """Before jax's first use: nothing is computed on an accelerator that may be here, and none is needed."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", None)  # a program for absent devices is written there and cannot be read back
    if chip.platform == "gpu":  # autotuning would run kernels
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()


def topology_devices(topology: str, target: Path | str | None = None, **options) -> Sequence:
    """The devices of a TPU topology (v5e:4x4) or, with the description of a GPU (text or a file), of so many of it (1x1x8)."""
    from jax.experimental import topologies

    if target is not None:
        described = target.read_text(encoding="utf-8") if isinstance(target, Path) else target
        return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=described).devices
    # libtpu asks the machine for what only a TPU's host can answer, and locks itself against a second process.
    host = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in (host | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def devices_of(topology: Topology) -> Sequence:
    """Devices to compile for; the compiler for them must be installed (`missing_compiler`)."""
    if topology.chip.platform == "gpu":
        return topology_devices(f"1x1x{topology.num_devices}", target_config(topology.chip))
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.shape[:2] == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topology_devices(topology.name, **options)


def abstract_arguments(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> tuple:
    """State, teacher and batch of the step: shapes, dtypes and shardings."""
    return abstract_students(run, mesh), abstract_teacher(run, mesh), abstract_batch(run, mesh)


def _teacher_params(run: Run) -> dict:
    heads = {"mlm": any(f.kind == "logits" for f in run.teacher_features), "classifier": bool(run.teacher.labels)}
    return jax.eval_shape(partial(init_params, run.teacher, **heads), jax.random.key(0))


def abstract_students(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> TrainState:
    return abstract_state(run, _teacher_params(run), mesh)


def abstract_teacher(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict:
    read = jax.eval_shape(partial(read_of_teacher, run), _teacher_params(run))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, read, tree_shardings(read, mesh))


def abstract_batch(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict:
    training, rows = run.config.training, batch_sharding(mesh)
    shape = (training.micro_batches, training.batch_size // training.micro_batches, run.config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in ("input_ids", "segment_ids")}
    if run.task:
        batch["token_type_ids"] = batch["input_ids"]
        batch["labels"] = jax.ShapeDtypeStruct(shape[:2], jnp.float32 if len(run.task.outputs) == 1 else jnp.int32, sharding=rows)
    if run.settings.languages:
        batch["languages"] = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=rows)
    return batch


@contextlib.contextmanager
def _cudnn_unprobed(device: jax.Device) -> Iterator[None]:
    """JAX asks the GPU here for its cuDNN and capability before it lowers to it; answers for `device` as `target_config` does."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    capability = float(device.compute_capability)
    probes = {"check_cudnn_version": lambda: 91200, "check_compute_capability": lambda wanted: capability >= float(wanted)}
    before = {name: getattr(cudnn, name) for name in probes}
    for name, answer in probes.items():
        setattr(cudnn, name, answer)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(cudnn, name, own)


def compile_ahead(run: Run, devices: Sequence) -> jax.stages.Compiled:
    """The step of a run that was resolved for as many devices of this platform."""
    mesh = create_mesh(run.config.mesh, devices)
    arguments = abstract_arguments(run, mesh)  # outside of the mesh, on which nothing can be run
    away = _cudnn_unprobed(devices[0]) if devices[0].platform == "gpu" else contextlib.nullcontext()
    with jax.set_mesh(mesh), away:
        return compile_step(run, *arguments)
