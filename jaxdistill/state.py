"""What the step takes: the train state, before any array exists and at its first step, and the teacher; and its compilation."""

from __future__ import annotations

import zlib
from functools import partial

import jax
import jax.numpy as jnp

from jaxdistill.features import deepest_layer
from jaxdistill.models import in_int8, layer_name
from jaxdistill.objective import initial_projections
from jaxdistill.resolve import Run
from jaxdistill.sharding import placed, tree_shardings
from jaxdistill.students import initial_params, student_key
from jaxdistill.train_step import train_step
from jaxdistill.update import Student, StudentState, TrainState

# On a CPU with AVX-512 LLVM takes half of its width, out of regard for processors that slowed down under it.
COMPILER_OPTIONS = {"cpu": {"xla_cpu_prefer_vector_width": 512}}


def initial_state(run: Run, teacher_params: dict, checkpoints: dict[str, dict] | None = None) -> TrainState:
    """Every student's first parameters and optimizer state; pure, so that it runs under jit with shardings.

    Args:
      checkpoints: parameters of those students that start from a checkpoint.
    """
    states = {}
    for student in run.students:
        key = student_key(run.config.training.seed, student.name)
        params = initial_params(
            student.config,
            key,
            teacher_params,
            run.copied[student.name],
            mlm=student.has_mlm_head,
            classifier=student.has_classifier,
            embeddings=run.config.students[student.name].embeddings,
            checkpoint=(checkpoints or {}).get(student.name),
        )
        projections = initial_projections(student.terms, jax.random.fold_in(key, zlib.crc32(b"projections")))
        trained = {"params": params, "projections": projections}
        num_parts = sum(len(term.parts) for term in student.terms)
        losses = jnp.zeros((num_parts,), jnp.float32), jnp.zeros((num_parts,), jnp.int32)
        states[student.name] = StudentState(trained, student.optimizer.init(trained), _empty_memory(run, student), jnp.int32(0), *losses)
    return TrainState(jnp.int32(0), states)


def _empty_memory(run: Run, student: Student) -> dict:
    banks = {term.name: term.memory_bank[1] for term in student.terms if term.memory_bank}
    width = run.teacher.hidden_size
    return {name: {"vectors": jnp.zeros((size, width), jnp.float32), "mask": jnp.zeros((size,), jnp.int32)} for name, size in banks.items()}


def abstract_state(
    run: Run, teacher_params: dict, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, checkpoints: dict[str, dict] | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of the state on this mesh."""
    shapes = jax.eval_shape(partial(initial_state, run), teacher_params, checkpoints)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)


def read_of_teacher(run: Run, params: dict) -> dict:
    """The part of the teacher that the students read; its matrices in the dtype of the products or in int8. Pure."""
    layers = {layer_name(i): params["layers"][layer_name(i)] for i in range(1, deepest_layer(run.teacher_features) + 1)}
    needed = {"embeddings": params["embeddings"], "layers": layers}
    kinds = {feature.kind for feature in run.teacher_features}
    heads = {"logits": ("mlm",), "label_logits": ("pooler", "classifier")}  # BERT's classifier reads the pooler, others have none
    needed |= {head: params[head] for kind, names in heads.items() if kind in kinds for head in names if head in params}
    if run.config.training.teacher_weights == "int8":
        needed = in_int8(needed)
    dtype = jnp.dtype(run.settings.dtype)
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 and x.dtype != jnp.int8 else x, needed)


def place_teacher(run: Run, params: dict, mesh: jax.sharding.Mesh) -> dict:
    """What the students read of the teacher, on the devices."""
    return placed(read_of_teacher(run, params), mesh)


def compile_step(run: Run, state: TrainState, teacher: dict, batch: dict) -> jax.stages.Compiled:
    """The one compilation of the train step: what it returns takes these shapes and shardings and no others.

    Args: arrays, or ShapeDtypeStructs with shardings, also of devices that are not here.
    """
    out_shardings = (jax.tree.map(lambda x: x.sharding, state), None)
    step = jax.jit(partial(train_step, run.settings, run.students), donate_argnums=0, out_shardings=out_shardings)
    return step.lower(state, teacher, batch).compile(compiler_options=COMPILER_OPTIONS.get(run.settings.kernels.platform))
