"""Relation and attention MSE by Gram matrices and by blocks of queries, against the plain losses and numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import make_segments, make_vectors, places_of_texts, spoil_padding, squares_by_loops

from jaxdistill import kernels, losses
from jaxdistill.kernels import Kernels, gram

HEADS = 4


@partial(jax.jit, static_argnums=0)
def evaluate(mse, student, teacher, mask, segments):
    def total(student):
        return mse(*student, *teacher, mask, segments)

    (value, count), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return value, count, jnp.stack(gradient)


def self_form(module, **options):
    return lambda s, t, mask, segments: module.relation_mse(s, t, mask, num_relation_heads=HEADS, segment_ids=segments, **options)


def cross_form(module, **options):
    own = {"num_heads": HEADS} | options
    return lambda *vectors: module.attention_mse(*vectors[:5], segment_ids=vectors[5], **own)


def example(length, sizes, cross, close=None):
    sides = [make_vectors(3, length, *(HEADS * size for size in sizes), seed=n) for n in range(1 + cross)]
    if close:
        sides = [(teacher + close * student, teacher) for student, teacher in sides]
    segments = make_segments([[length], [length // 3, length // 3], [length // 2]], length)
    return *zip(*sides, strict=True), segments


@pytest.mark.parametrize("form", [self_form, cross_form])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "sizes"), [(40, (8, 16)), (33, (12, 12)), (9, (16, 16)), (150, (64, 64))])
def test_equal_to_the_formula(form, packed, length, sizes, monkeypatch):
    monkeypatch.setattr(gram, "_BLOCK_ELEMENTS", 3 * HEADS * length * 7)
    student, teacher, segments = example(length, sizes, form is cross_form)
    student, teacher = (tuple(spoil_padding(x, segments) for x in side) for side in (student, teacher))
    arrays = student, teacher, (segments > 0).astype(np.int32), segments if packed else None
    ours, plain = (evaluate(form(module), *arrays) for module in (kernels, losses))
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5)
    assert ours[1] == plain[1]
    np.testing.assert_allclose(ours[2], plain[2], rtol=1e-5, atol=1e-5 * float(jnp.abs(plain[2]).max()))


@pytest.mark.parametrize("close", [None, 1e-1, 1e-3])
def test_no_cancellation_when_the_student_is_close(close):
    """Value and gradient to 1e-5 of float64; the formula itself has lost half of its digits at 1e-3."""
    (student,), (teacher,), _ = example(64, (8, 8), False, close)
    segments = make_segments([[64], [40], [20]], 64)
    value, count, gradient = evaluate(self_form(kernels), (student,), (teacher,), (segments > 0).astype(np.int32), None)
    expected, pairs = squares_by_loops(student, teacher, segments, HEADS)
    assert count == pairs
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    reference = np.zeros(student.shape)
    for row, places in places_of_texts(segments):
        for head in range(HEADS):
            a, t = (x[row, places, head * 8 : (head + 1) * 8].astype(np.float64) for x in (student, teacher))
            reference[row, places, head * 8 : (head + 1) * 8] = 4 * (a @ a.T - t @ t.T) @ a
    np.testing.assert_allclose(gradient[0], reference, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("packed", [False, True])
def test_no_scores_of_the_whole_batch(packed):
    """Unpacked rows have none at all; packed ones a block of queries."""
    vectors, mask = jnp.ones((2, 700, 16)), jnp.ones((2, 700), jnp.int32)
    compute = partial(kernels.relation_mse, num_relation_heads=2, segment_ids=mask if packed else None)
    text = str(jax.make_jaxpr(jax.grad(lambda s: compute(s, vectors, mask)[0]))(vectors))
    assert ("700,700]" in text) == packed  # one block is enough for so few


def test_plain_when_forced():
    vectors, mask = jnp.ones((1, 40, 16)), jnp.ones((1, 40), jnp.int32)
    plain = partial(kernels.relation_mse, num_relation_heads=2, kernels=Kernels(relations="plain"))
    assert "40,40]" in str(jax.make_jaxpr(plain)(vectors, vectors, mask))
