"""The train state of a run before any array exists, and at its first step."""

from __future__ import annotations

import zlib
from functools import partial

import jax
import jax.numpy as jnp

from jaxdistill.objective import initial_projections
from jaxdistill.resolve import Run
from jaxdistill.sharding import tree_shardings
from jaxdistill.students import initial_params, student_key
from jaxdistill.train_step import Student, StudentState, TrainState


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
        states[student.name] = StudentState(trained, student.optimizer.init(trained), _empty_memory(run, student), jnp.int32(0))
    return TrainState(jnp.int32(0), states)


def _empty_memory(run: Run, student: Student) -> dict:
    banks = {term.name: term.memory_bank[1] for term in student.terms if term.memory_bank}
    width = run.teacher.hidden_size
    return {name: {"vectors": jnp.zeros((size, width), jnp.float32), "mask": jnp.zeros((size,), jnp.int32)} for name, size in banks.items()}


def abstract_state(run: Run, teacher_params: dict, mesh: jax.sharding.Mesh, checkpoints: dict[str, dict] | None = None) -> TrainState:
    """Shapes, dtypes and shardings of the state on this mesh."""
    shapes = jax.eval_shape(partial(initial_state, run), teacher_params, checkpoints)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)
