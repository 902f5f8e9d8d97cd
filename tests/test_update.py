"""One step's change of a student: skipped where the loss is a spike or the gradient not finite; the running mean by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_config

from jaxdistill.config import load_config
from jaxdistill.objective import bind_objective
from jaxdistill.optimizer import create_optimizer
from jaxdistill.update import WARM_UP, Student, StudentState, TrainState, update

FACTOR = 10.0
# The second term comes on at step 200: with its weight its share of the loss jumps from nothing to a hundred times the first.
TERMS = [
    {"kind": "hidden_mse", "layer_map": "last"},
    {"kind": "hidden_cosine", "layer_map": "last", "weight": {"schedule": "linear", "values": [0, 100], "steps": [200, 201]}},
]


@pytest.fixture(scope="module")
def student() -> Student:
    fields = {"teacher": "t", "data": {"sources": ["x"]}, "students": {"a": {"num_layers": 1}}, "output": "o", "objective": TERMS}
    config = load_config(fields)
    shape = tiny_config(num_layers=1)
    terms = bind_objective(config.objective, shape, tiny_config(num_layers=2), "objective", steps=1000)
    return Student("a", shape, terms, create_optimizer(config.optimizer, 1000))


def state_of(student: Student, *, step: int = 150, means=(2.0, 1.0), seen: int = WARM_UP, failures: int = 0) -> TrainState:
    trained = {"params": {"dense": {"kernel": jnp.ones((2, 2), jnp.float32)}}, "projections": {}}
    losses = jnp.array(means, jnp.float32), jnp.full(2, seen, jnp.int32)
    own = StudentState(trained, student.optimizer.init(trained), {}, jnp.int32(failures), *losses)
    return TrainState(jnp.int32(step), {"a": own})


@pytest.fixture(scope="module")
def after(student):
    """(state, metrics) after a step with these values of the two parts, over 4 tokens."""

    @partial(jax.jit, static_argnames="factor")
    def step(state, values, gradient, factor):
        own = {"params": {"dense": {"kernel": jnp.full((2, 2), gradient)}}, "projections": {}}
        names = [part.name for term in student.terms for part in term.parts]
        parts = {name: (values[i] * 4, jnp.float32(4)) for i, name in enumerate(names)}
        state, metrics = update([student], state, {"a": own}, {"a": parts}, {}, freeze_after=3, spike_factor=factor)
        return state.students["a"], metrics["a"]

    def run(state, *values, gradient=1.0, factor=FACTOR):
        return step(state, jnp.array(values, jnp.float32), jnp.float32(gradient), factor)

    return run


def is_updated(own: StudentState) -> bool:
    return bool(jnp.any(own.trained["params"]["dense"]["kernel"] != 1))


def test_a_loss_over_the_factor_times_the_mean_is_skipped_and_counted(student, after):
    for value, spiked in ((19.9, 0), (20.1, 1)):  # of a mean of 2, and a second term without weight at step 150
        own, metrics = after(state_of(student, failures=1), value, 1.0)
        assert (int(metrics["spiked"]), int(metrics["skipped"]), int(own.failures)) == (spiked, spiked, 2 * spiked)
        assert is_updated(own) is not bool(spiked)
    own, _ = after(state_of(student), 20.1, 1.0, factor=0.0)
    assert is_updated(own)


def test_nothing_is_a_spike_before_the_mean_is_known(student, after):
    own, metrics = after(state_of(student, seen=WARM_UP - 1), 1e6, 1.0)
    assert is_updated(own) and int(metrics["spiked"]) == 0
    own, metrics = after(state_of(student, means=(0.0, 1.0)), 1e6, 1.0)  # ten times nothing is nothing
    assert is_updated(own)


def test_a_weight_on_a_schedule_is_no_spike(student, after):
    own, metrics = after(state_of(student, step=250), 2.0, 1.5)  # 2 + 100 x 1.5 against 2 + 100 x 1
    assert int(metrics["spiked"]) == 0 and is_updated(own)
    own, metrics = after(state_of(student, step=250), 2.0, 11.0)
    assert int(metrics["spiked"]) == 1


def test_the_mean_by_hand(student, after):
    own, _ = after(state_of(student, seen=0, means=(0, 0)), 3.0, 5.0)
    np.testing.assert_allclose(own.loss_means, [3, 5])
    assert own.losses_seen.tolist() == [1, 1]
    own, _ = after(state_of(student, seen=3, means=(1, 1)), 3.0, 5.0)
    np.testing.assert_allclose(own.loss_means, [1.5, 2])
    own, _ = after(state_of(student), 3.0, np.nan)
    np.testing.assert_allclose(own.loss_means, [2 + 1 / (WARM_UP + 1), 1], rtol=1e-6)
    assert own.losses_seen.tolist() == [WARM_UP, WARM_UP]


def test_a_spike_enters_clipped_so_that_a_new_scale_is_taken_for_the_usual(student, after):
    state, skipped = state_of(student), 0
    for _ in range(60):
        own, metrics = after(state, 100.0, 1.0)  # 50 times the mean
        skipped += int(metrics["spiked"])
        state = replace(state, students={"a": replace(own, failures=jnp.int32(0))})
    assert skipped == 19  # 2 x (1 + 9/101)^19 > 100 / 10
    assert is_updated(state.students["a"])


def test_a_gradient_that_is_not_finite_and_a_frozen_student(student, after):
    own, metrics = after(state_of(student), 2.0, 1.0, gradient=np.inf)
    assert (int(metrics["skipped"]), int(metrics["spiked"]), int(own.failures)) == (1, 0, 1) and not is_updated(own)
    own, metrics = after(state_of(student, failures=3), 2.0, 1.0)
    assert (int(metrics["skipped"]), int(own.failures)) == (1, 4) and not is_updated(own)
