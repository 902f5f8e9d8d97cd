"""Direct transfer: by hand, against other implementations, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import (
    PACKED,
    TEXTS,
    assert_close,
    finite_difference,
    make_segments,
    make_vectors,
    one_text_a_row,
    places_of_texts,
    spoil_padding,
)

from jaxdistill.config import MeshConfig
from jaxdistill.losses import direct_mse, relation_mse
from jaxdistill.sharding import create_mesh


# Most tests share 4 x 14 slots, 24 and 36 numbers wide, 6 heads, and the compiled program.
@jax.jit
def evaluate(student, teacher, projection, mask):
    """(value, count, gradients of the value with respect to student and projection)."""

    def value(student, projection):
        total, count = direct_mse(student, teacher, projection, mask.astype(jnp.int32))
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(student, projection)
    return value, count, gradients


def make_projection(heads: int = 6, student: int = 24, teacher: int = 36, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (heads, student // heads, teacher // heads)).astype(np.float32)


def by_loops(student, teacher, projection, mask) -> tuple[float, int]:
    student, teacher, projection = (np.asarray(x, np.float64) for x in (student, teacher, projection))
    total = 0.0
    for row, slot in np.argwhere(mask):
        for head, matrix in enumerate(projection):
            size, teacher_size = matrix.shape
            own = student[row, slot, head * size : (head + 1) * size]
            total += np.square(own @ matrix - teacher[row, slot, head * teacher_size : (head + 1) * teacher_size]).sum()
    return total, int(np.sum(mask)) * teacher.shape[-1]


@pytest.mark.parametrize(("mask", "expected"), [([1, 0], (5.0, 4.0)), ([1, 1], (55.0, 8.0)), ([0, 1], (50.0, 4.0)), ([0, 0], (0.0, 0.0))])
def test_two_heads_by_hand(mask, expected):
    """Heads of one number times [1 0] and [0 3]: (1, 2) gives (1, 0, 0, 6), against (1, 1, 0, 4): 0 + 1 + 0 + 4.

    The second token, (3, 0), gives (3, 0, 0, 0), against (0, 0, 4, 5): 9 + 0 + 16 + 25.
    """
    student, teacher = jnp.array([[[1.0, 2], [3, 0]]]), jnp.array([[[1.0, 1, 0, 4], [0, 0, 4, 5]]])
    total, count = direct_mse(student, teacher, jnp.array([[[1.0, 0]], [[0, 3]]]), jnp.array([mask]))
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert (float(total), float(count)) == expected


def test_matrix_from_the_right_by_hand():
    """(1, 2) [1 2; 0 1] = (1, 4): from the left it would be (5, 2)."""
    total, _ = direct_mse(jnp.array([[[1.0, 2]]]), jnp.array([[[1.0, 4]]]), jnp.array([[[1.0, 2], [0, 1]]]), jnp.ones((1, 1)))
    assert float(total) == 0.0


@pytest.mark.parametrize("first", [0, 5], ids=["padded right", "padded left"])
def test_padding_against_loops(first):
    """NaN and infinity under the padding do not show, and get no gradient."""
    student, teacher = make_vectors(4, 14, 24, 36)
    mask = make_segments(TEXTS, 14, first) > 0
    value, count, gradients = evaluate(spoil_padding(student, mask), spoil_padding(teacher, mask), make_projection(), mask)
    expected = by_loops(student, teacher, make_projection(), mask)
    assert_close(value, expected[0] / expected[1])
    assert count == expected[1] == 14 * 36
    for ours, clean in zip(gradients, evaluate(student, teacher, make_projection(), mask)[2], strict=True):
        np.testing.assert_array_equal(ours, clean)
    assert not np.any(np.asarray(gradients[0])[~mask])


@pytest.mark.parametrize("heads", [1, 2, 12])
def test_heads_against_loops(heads):
    student, teacher = make_vectors(2, 3, 24, 12)
    total, _ = direct_mse(*(jnp.asarray(x) for x in (student, teacher, make_projection(heads, 24, 12))), jnp.ones((2, 3)))
    assert_close(total, by_loops(student, teacher, make_projection(heads, 24, 12), np.ones((2, 3)))[0])


def test_packed_equals_separate():
    student, teacher = make_vectors(4, 14, 24, 36)
    segments = make_segments(PACKED, 14)
    packed = evaluate(student, teacher, make_projection(), segments > 0)
    apart = [one_text_a_row(x, segments) for x in (student, teacher, segments)]
    alone = evaluate(*apart[:2], make_projection(), apart[2] > 0)
    assert_close(packed[0], alone[0])
    assert packed[1] == alone[1]
    assert_close(packed[2][1], alone[2][1])
    for i, (row, own) in enumerate(places_of_texts(segments)):
        assert_close(np.asarray(packed[2][0])[row, own], np.asarray(alone[2][0])[i, : len(own)])


def test_micro_batches_sum_to_the_batch():
    """Of halves with 9 and 5 real tokens."""
    student, teacher = make_vectors(4, 14, 24, 36)
    mask = make_segments([[5], [4], [4], [1]], 14) > 0
    value, count, gradients = evaluate(student, teacher, make_projection(), mask)
    halves = [evaluate(student[rows], teacher[rows], make_projection(), mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert_close(sum(half[0] * half[1] for half in halves) / count, value)
    assert sum(half[1] for half in halves) == count
    assert_close(jnp.concatenate([half[2][0] * half[1] for half in halves]) / count, gradients[0])
    assert_close(sum(half[2][1] * half[1] for half in halves) / count, gradients[1])


def test_gradient_against_finite_differences():
    student, teacher = make_vectors(4, 14, 24, 36)
    projection, mask = make_projection(), make_segments(TEXTS, 14) > 0
    _, count, gradients = evaluate(student, teacher, projection, mask)
    arrays, rng = (student, projection), np.random.default_rng(2)
    for part, limits in enumerate([(1, 9, 24), (6, 4, 6)]):  # tokens of the first text; the whole projection

        def total(moved, part=part):
            return by_loops(*((moved, teacher, projection) if part == 0 else (student, teacher, moved)), mask)[0]

        gradient = np.asarray(gradients[part], np.float64)
        for _ in range(12):
            place = tuple(rng.integers(limits))
            reference = finite_difference(total, arrays[part], place) / float(count)
            assert gradient[place] == pytest.approx(reference, abs=1e-5 * np.abs(gradient).max())


def test_zero_at_equality():
    """Also of relations, where the matrices are rotations: Direct and relation MSE agree on what is perfect."""
    student, _ = make_vectors(4, 14, 24, 24)
    turns = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 4, 4)))[0].astype(np.float32)
    teacher = np.einsum("bsrh,rhk->bsrk", student.reshape(4, 14, 6, 4), turns).reshape(student.shape)
    value, _, gradients = evaluate(student, teacher, turns, make_segments(TEXTS, 14) > 0)
    assert float(value) < 1e-12 and all(np.abs(x).max() < 1e-6 for x in gradients)
    total, _ = relation_mse(jnp.asarray(student), jnp.asarray(teacher), jnp.ones((4, 14)), num_relation_heads=6)
    assert float(total) < 1e-8


def test_finite_at_extremes():
    student, teacher = (np.float32(1e8) * x for x in make_vectors(4, 14, 24, 36))
    mask = make_segments(TEXTS, 14) > 0
    value, _, gradients = evaluate(student, teacher, make_projection(), mask)
    assert_close(value, np.divide(*by_loops(student, teacher, make_projection(), mask)))
    assert all(np.isfinite(x).all() and np.any(x) for x in gradients)


def test_no_gradient_reaches_the_teacher():
    student, teacher = make_vectors(4, 14, 24, 36)
    assert not np.any(jax.jit(jax.grad(lambda t: evaluate(student, t, make_projection(), np.ones((4, 14)))[0]))(teacher))


def test_bfloat16_inputs_give_float32_sums():
    """A float32 projection is rounded to the student's dtype, and its gradient is float32; nothing after the inputs is rounded."""
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in make_vectors(4, 14, 24, 36))
    mask = make_segments(TEXTS, 14) > 0
    value, count, gradients = evaluate(student, teacher, make_projection(), mask)
    assert (value.dtype, count.dtype, gradients[0].dtype, gradients[1].dtype) == (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = np.asarray(jnp.asarray(make_projection(), jnp.bfloat16), np.float32)
    exact = evaluate(*(np.asarray(x, np.float32) for x in (student, teacher)), rounded, mask)
    assert_close(value, exact[0], 1e-6)
    for ours, reference in zip(gradients, exact[2], strict=True):
        assert_close(np.asarray(ours, np.float32), reference, 1e-2)


def test_nothing_to_count():
    value, count, gradients = evaluate(*make_vectors(4, 14, 24, 36), make_projection(), np.zeros((4, 14)))
    assert value == count == 0.0 and not any(np.any(x) for x in gradients)


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 6, 4), (3, 4, 6), (12, 2, 6)])
def test_projection_that_does_not_fit(shape):
    student, teacher = (jnp.asarray(x) for x in make_vectors(1, 3, 24, 36))
    with pytest.raises(ValueError, match=r"projection \(.*\) leads from .* does not fit student \(1, 3, 24\) and teacher \(1, 3, 36\)"):
        direct_mse(student, teacher, jnp.ones(shape), jnp.ones((1, 3)))


@pytest.mark.parametrize("config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_eight_devices_equal_one(config):
    student, teacher = make_vectors(8, 9, 48, 96, seed=3)
    projection, mask = make_projection(8, 48, 96), make_segments([[9], [5], [2], [1], [0], [3], [7], [8]], 9) > 0
    expected = evaluate(student, teacher, projection, mask)
    mesh = create_mesh(config)
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), *spec)))  # noqa: E731
    student, teacher = (place(x, None, "tensor") for x in (student, teacher))
    projection = jax.device_put(projection, jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        value, count, gradients = evaluate(student, teacher, projection, place(mask))
    assert_close(value, expected[0])
    assert count == expected[1]
    for ours, reference in zip(gradients, expected[2], strict=True):
        assert_close(ours, reference)


@pytest.mark.torch
def test_against_pytorch():
    """Text by text, without masks, a matrix product for each head, `mse_loss`, and autograd."""
    import torch

    student, teacher = make_vectors(4, 14, 24, 36, seed=5)
    segments = make_segments(PACKED, 14)
    ours = evaluate(student, teacher, make_projection(), segments > 0)
    theirs, matrices = (torch.tensor(x, requires_grad=True) for x in (student, make_projection()))
    total, count = torch.zeros(()), 0
    for row, own in places_of_texts(segments):
        places = torch.tensor(own)
        heads = [part @ matrix for part, matrix in zip(theirs[row, places].chunk(6, dim=-1), matrices, strict=True)]
        total = total + torch.nn.functional.mse_loss(torch.cat(heads, dim=-1), torch.tensor(teacher)[row, places], reduction="sum")
        count += 36 * len(own)
    (total / count).backward()
    assert ours[1] == count
    assert_close(ours[0], (total / count).detach().numpy(), 1e-6)
    for gradient, reference in zip(ours[2], (theirs, matrices), strict=True):
        assert_close(gradient, reference.grad.numpy(), 1e-6)
