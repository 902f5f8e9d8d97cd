"""The train state of a run before any array exists, and at its first step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxdistill.resolve import Run
from jaxdistill.sharding import tree_shardings
from jaxdistill.students import initial_params, student_key
from jaxdistill.train_step import StudentState, TrainState


def initial_state(run: Run, teacher_params: dict) -> TrainState:
    """Every student's first parameters and optimizer state; pure, so that it runs under jit with shardings."""
    states = {}
    for student in run.students:
        key = student_key(run.config.training.seed, student.name)
        trained = {"params": initial_params(student.config, key, teacher_params, run.copied[student.name]), "projections": {}}
        states[student.name] = StudentState(trained, student.optimizer.init(trained))
    return TrainState(jnp.int32(0), states)


def abstract_state(run: Run, teacher_params: dict, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on this mesh."""
    shapes = jax.eval_shape(partial(initial_state, run), teacher_params)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)
