"""The MSE of relations before scaling and softmax: by hand, against other implementations, and what it must not depend on."""

from functools import partial

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
    squares_by_loops,
)

from jaxdistill.config import MeshConfig
from jaxdistill.losses import relation_mse
from jaxdistill.sharding import create_mesh


# A side is (vectors,) or (queries, keys). Most tests share 4 x 14 slots, 24 and 36 numbers wide, 6 heads, and the program.
@partial(jax.jit, static_argnames="num_relation_heads")
def evaluate(student, teacher, segments, *, num_relation_heads=6):
    """(value, count, gradients of the value with respect to the student's arrays)."""

    def value(student):
        keys = {"student_keys": student[1], "teacher_keys": teacher[1]} if len(student) == 2 else {}
        mask = (segments > 0).astype(jnp.int32)
        total, count = relation_mse(student[0], teacher[0], mask, num_relation_heads=num_relation_heads, segment_ids=segments, **keys)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(value, has_aux=True)(student)
    return value, count, gradients


def make_sides(form: str, seed: int = 0, shape=(4, 14, 24, 36)):
    """Sides of the student and of the teacher."""
    own, keys = make_vectors(*shape, seed=seed), make_vectors(*shape, seed=seed + 100)
    return tuple(zip(own, keys, strict=True)) if form == "cross" else tuple((x,) for x in own)


def by_loops(student, teacher, segments, num_heads=6):
    return squares_by_loops(*((x[0], x[-1]) for x in (student, teacher)), segments, num_heads)


@pytest.fixture(params=["self", "cross"])
def form(request):
    return request.param


@pytest.mark.parametrize("width", [1, 4], ids=["equal widths", "wider teacher"])
@pytest.mark.parametrize(
    ("mask", "segments", "expected"),
    [
        ([1, 1, 1], None, (123.0, 9.0)),
        ([1, 1, 0], None, (24.0, 4.0)),
        ([0, 1, 1], None, (97.0, 4.0)),
        ([1, 1, 1], [1, 2, 2], (97.0, 5.0)),
        ([1, 1, 0], [1, 1, 1], (24.0, 4.0)),
        ([0, 0, 0], None, (0.0, 0.0)),
    ],
)
def test_three_tokens_by_hand(width, mask, segments, expected):
    """Numbers (1, 2, 0) and (1, 0, 3): products [1 2 0; 2 4 0; 0 0 0] and [1 0 3; 0 0 0; 3 0 9].

    Squares of their difference: [0 4 9; 4 16 0; 9 0 81]. All 123; the first two tokens 24, the last two 97; with the first
    token a text of its own 0 + 97. A head of four numbers has the same products, undivided.
    """
    student, teacher = jnp.array([[[1.0], [2], [0]]]), jnp.zeros((1, 3, width)).at[0, :, 0].set(jnp.array([1.0, 0, 3]))
    segments = None if segments is None else jnp.array([segments])
    total, count = relation_mse(student, teacher, jnp.array([mask]), num_relation_heads=1, segment_ids=segments)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert (float(total), float(count)) == expected


def test_two_heads_by_hand():
    """Side by side: (1, 0) and (0, 2) have products [1 0; 0 0] and [0 0; 0 4], so 1 + 16 against zeros; mixed it would be otherwise."""
    student = jnp.array([[[1.0, 0], [0, 2]]])
    total, count = relation_mse(student, jnp.zeros((1, 2, 2)), jnp.ones((1, 2)), num_relation_heads=2)
    assert (float(total), float(count)) == (17.0, 8.0)
    # As one head the products are the same here; of (1, 1) and (0, 2) they are [2 2; 2 4] instead of [1 0; 0 0] and [1 2; 2 4].
    student = jnp.array([[[1.0, 1], [0, 2]]])
    assert float(relation_mse(student, jnp.zeros((1, 2, 2)), jnp.ones((1, 2)), num_relation_heads=2)[0]) == 1 + (1 + 4 + 4 + 16)
    assert float(relation_mse(student, jnp.zeros((1, 2, 2)), jnp.ones((1, 2)), num_relation_heads=1)[0]) == 4 + 4 + 4 + 16


def test_cross_by_hand():
    """Queries (1, 2) times keys (0, 3) against zeros: [0 3; 0 6], 45; exchanged under a mask on the first, 9 would be 0."""
    queries, keys, zeros = jnp.array([[[1.0], [2]]]), jnp.array([[[0.0], [3]]]), jnp.zeros((1, 2, 1))
    cross = partial(relation_mse, queries, zeros, num_relation_heads=1, student_keys=keys, teacher_keys=zeros)
    assert [float(x) for x in cross(jnp.array([[1, 1]]))] == [45.0, 4.0]
    assert [float(x) for x in cross(jnp.array([[0, 1]]))] == [36.0, 1.0]
    assert [float(x) for x in cross(jnp.array([[1, 0]]))] == [0.0, 1.0]


@pytest.mark.parametrize("num_relation_heads", [1, 3, 12])
def test_gram_identity(num_relation_heads):
    """|A_S A_S^T - A_T A_T^T|^2 = |A_S^T A_S|^2 - 2 |A_S^T A_T|^2 + |A_T^T A_T|^2, of d x d matrices."""
    student, teacher = make_vectors(1, 7, 24, 36)
    total, _ = relation_mse(jnp.asarray(student), jnp.asarray(teacher), jnp.ones((1, 7)), num_relation_heads=num_relation_heads)
    expected = 0.0
    for a, t in zip(*(np.split(x[0].astype(np.float64), num_relation_heads, axis=-1) for x in (student, teacher)), strict=True):
        expected += (np.square(a.T @ a).sum() - 2 * np.square(a.T @ t).sum()) + np.square(t.T @ t).sum()
    assert_close(total, expected)


@pytest.mark.parametrize("first", [0, 5], ids=["padded right", "padded left"])
def test_padding_against_loops(form, first):
    """NaN and infinity under the padding do not show, and get no gradient; zeros there give the same gradient."""
    student, teacher = make_sides(form)
    segments = make_segments(TEXTS, 14, first)
    spoilt = [tuple(spoil_padding(x, segments) for x in side) for side in (student, teacher)]
    value, count, gradients = evaluate(*spoilt, segments)
    expected = by_loops(student, teacher, segments)
    assert_close(value, expected[0] / expected[1])
    assert count == expected[1] == (81 + 16 + 1) * 6
    for ours, clean in zip(gradients, evaluate(student, teacher, segments)[2], strict=True):
        np.testing.assert_array_equal(ours, clean)
        assert not np.any(np.asarray(ours)[segments == 0])


def test_packed_equals_separate(form):
    student, teacher = make_sides(form)
    segments = make_segments(PACKED, 14)
    packed = evaluate(student, teacher, segments)
    assert_close(packed[0], np.divide(*by_loops(student, teacher, segments)))
    alone = evaluate(
        *(tuple(one_text_a_row(x, segments) for x in side) for side in (student, teacher)),
        one_text_a_row(segments, segments),
    )
    assert_close(packed[0], alone[0])
    assert packed[1] == alone[1]
    for ours, reference in zip(packed[2], alone[2], strict=True):
        for i, (row, own) in enumerate(places_of_texts(segments)):
            assert_close(np.asarray(ours)[row, own], np.asarray(reference)[i, : len(own)])


def test_micro_batches_sum_to_the_batch(form):
    student, teacher = make_sides(form)
    segments = make_segments([[5], [4], [4], [1]], 14)
    value, count, gradients = evaluate(student, teacher, segments)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        halves.append(evaluate(*(tuple(x[rows] for x in side) for side in (student, teacher)), segments[rows]))
    assert_close(sum(half[0] * half[1] for half in halves) / count, value)
    assert sum(half[1] for half in halves) == count
    for part, gradient in enumerate(gradients):
        assert_close(jnp.concatenate([half[2][part] * half[1] for half in halves]) / count, gradient)


def test_gradient_against_finite_differences(form):
    student, teacher = make_sides(form)
    segments = make_segments(PACKED, 14)
    _, count, gradients = evaluate(student, teacher, segments)
    rng = np.random.default_rng(2)
    for part, gradient in enumerate(np.asarray(x, np.float64) for x in gradients):

        def total(moved, part=part):
            return by_loops((*student[:part], moved, *student[part + 1 :]), teacher, segments)[0]

        for row in (0, 1, 2) * 4:
            place = (row, rng.integers(13), rng.integers(24))
            reference = finite_difference(total, student[part], place) / float(count)
            assert gradient[place] == pytest.approx(reference, abs=1e-5 * np.abs(gradient).max())


def test_zero_at_equality(form):
    student, _ = make_sides(form)
    value, _, gradients = evaluate(student, student, make_segments(TEXTS, 14))
    assert value == 0.0 and not any(np.any(x) for x in gradients)


def test_rotated_heads_are_equal():
    """Relations see angles and lengths only: each head turned by its own rotation, nothing is lost."""
    student, _ = make_vectors(4, 14, 24, 24)
    turns = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 4, 4)))[0]
    teacher = np.einsum("bsrh,rhk->bsrk", student.reshape(4, 14, 6, 4), turns).reshape(student.shape).astype(np.float32)
    value, _, _ = evaluate((student,), (teacher,), make_segments(TEXTS, 14))
    assert float(value) < 1e-10


def test_finite_at_extremes(form):
    """Products of 1e8, and a row without tokens."""
    student, teacher = (tuple(1e4 * x for x in side) for side in make_sides(form))
    segments = make_segments(TEXTS, 14)
    value, _, gradients = evaluate(student, teacher, segments)
    assert_close(value, np.divide(*by_loops(student, teacher, segments)))
    assert all(np.isfinite(x).all() and np.any(x) for x in gradients)


def test_no_gradient_reaches_the_teacher(form):
    student, teacher = make_sides(form)
    gradients = jax.jit(jax.grad(lambda teacher: evaluate(student, teacher, jnp.ones((4, 14), jnp.int32))[0]))(teacher)
    assert not any(np.any(x) for x in gradients)


def test_bfloat16_inputs_give_float32_sums(form):
    sides = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_sides(form))
    segments = make_segments(TEXTS, 14)
    value, count, gradients = evaluate(*sides, segments)
    assert (value.dtype, count.dtype) == (jnp.float32, jnp.float32)
    exact = evaluate(*jax.tree.map(lambda x: np.asarray(x, np.float32), sides), segments)
    assert_close(value, exact[0], 1e-6)
    for ours, reference in zip(gradients, exact[2], strict=True):
        assert ours.dtype == jnp.bfloat16
        assert_close(np.asarray(ours, np.float32), reference, 1e-2)


def test_nothing_to_count(form):
    value, count, gradients = evaluate(*make_sides(form), np.zeros((4, 14), np.int32))
    assert value == count == 0.0 and not any(np.any(x) for x in gradients)


@pytest.mark.parametrize(("heads", "width"), [(5, 24), (8, 36)])
def test_heads_that_do_not_divide(heads, width):
    with pytest.raises(ValueError, match=f"{heads} relation heads do not divide the hidden size {width}"):
        relation_mse(jnp.ones((1, 3, 24)), jnp.ones((1, 3, 36)), jnp.ones((1, 3)), num_relation_heads=heads)


@pytest.mark.parametrize("missing", ["student_keys", "teacher_keys"])
def test_keys_of_one_side_only(missing):
    vectors = jnp.ones((1, 3, 4))
    keys = {"student_keys": vectors, "teacher_keys": vectors} | {missing: None}
    with pytest.raises(ValueError, match="one of them is missing"):
        relation_mse(vectors, vectors, jnp.ones((1, 3)), num_relation_heads=2, **keys)


@pytest.mark.parametrize("config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_eight_devices_equal_one(form, config):
    student, teacher = make_sides(form, seed=3, shape=(8, 9, 48, 96))
    segments = make_segments([[9], [4, 5], [2, 2], [1], [0], [3, 3, 3], [7], [8, 1]], 9)
    expected = evaluate(student, teacher, segments, num_relation_heads=8)
    mesh = create_mesh(config)
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), *spec)))  # noqa: E731
    student, teacher = jax.tree.map(lambda x: place(x, None, "tensor"), (student, teacher))
    with jax.set_mesh(mesh):
        value, count, gradients = evaluate(student, teacher, place(segments), num_relation_heads=8)
    assert_close(value, expected[0])
    assert count == expected[1]
    for ours, reference in zip(gradients, expected[2], strict=True):
        assert_close(ours, reference)


@pytest.mark.torch
@pytest.mark.parametrize("texts", [TEXTS, PACKED], ids=["one text a row", "packed"])
def test_against_pytorch(form, texts):
    """Text by text, without masks, `mse_loss`, and autograd."""
    import torch

    student, teacher = make_sides(form, seed=5)
    segments = make_segments(texts, 14)
    ours = evaluate(student, teacher, segments)
    theirs = [torch.tensor(x, requires_grad=True) for x in student]
    total, count = torch.zeros(()), 0
    for row, own in places_of_texts(segments):
        products = []
        for side in (theirs, [torch.tensor(x) for x in teacher]):
            queries, keys = (torch.stack(x[row, torch.tensor(own)].chunk(6, dim=-1)) for x in (side[0], side[-1]))
            products.append(queries @ keys.mT)
        total = total + torch.nn.functional.mse_loss(*products, reduction="sum")
        count += products[0].numel()
    (total / count).backward()
    assert ours[1] == count
    assert_close(ours[0], (total / count).detach().numpy(), 1e-6)
    for gradient, reference in zip(ours[2], theirs, strict=True):
        assert_close(gradient, reference.grad.numpy(), 1e-6)
