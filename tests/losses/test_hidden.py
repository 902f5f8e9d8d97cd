"""Losses on hidden states: by hand, against loops and PyTorch, and what they must not depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import make_segments, make_vectors

from jaxdistill import losses
from jaxdistill.config import MeshConfig
from jaxdistill.sharding import create_mesh

LOSSES = {"hidden_mse": losses.hidden_mse, "hidden_cosine": losses.hidden_cosine}


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


hidden_mse, hidden_cosine, first_tokens = map(jax.jit, (losses.hidden_mse, losses.hidden_cosine, losses.first_tokens))


# Most tests share the shapes 4 x 14, 24 wide with a projection to 36 or 24 wide without, and with them the compiled program.
@partial(jax.jit, static_argnums=0)
def evaluate(loss, student, teacher, mask, projection=None):
    """(value, count, gradients of the value with respect to the student and the projection)."""

    def value(student, projection):
        total, count = loss(student, teacher, mask.astype(jnp.int32), projection)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(student, projection)
    return value, count, gradients


def by_loops(name, student, teacher, mask, projection=None) -> tuple[float, int]:
    """(sum, count) in float64, token by token."""
    total = 0.0
    for place in zip(*np.nonzero(mask), strict=True):
        own, other = np.asarray(student, np.float64)[place], np.asarray(teacher, np.float64)[place]
        own = own if projection is None else own @ np.asarray(projection, np.float64)
        if name == "hidden_mse":
            total += ((own - other) ** 2).sum()
        else:
            total += 1 - own @ other / np.linalg.norm(own) / np.linalg.norm(other)
    return total, int(np.count_nonzero(mask)) * (teacher.shape[-1] if name == "hidden_mse" else 1)


def make_projection(student: int = 24, teacher: int = 36, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, student**-0.5, (student, teacher)).astype(np.float32)


def assert_close(ours, reference, tolerance=1e-5):
    reference = np.asarray(reference)
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance * max(np.abs(reference).max(), 1e-12), equal_nan=False)


TEXTS = [[9], [4], [0], [1]]
PACKED = [[7, 5, 2], [3, 1, 9], [14], [0]]


def test_mse_by_hand():
    """(1, 2) W = (1, 2, 3) against (0, 2, 5): 1 + 0 + 4 = 5; the second token is 1 off in one place; 2 x 3 numbers."""
    student = jnp.array([[[1.0, 2.0], [0.0, 0.0]]])
    teacher = jnp.array([[[0.0, 2.0, 5.0], [0.0, 1.0, 0.0]]])
    projection = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    total, count = hidden_mse(student, teacher, jnp.ones((1, 2)), projection)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(6.0) and float(count) == 6.0
    total, count = hidden_mse(student, teacher, jnp.array([[1, 0]]), projection)
    assert float(total) == pytest.approx(5.0) and float(count) == 3.0


def test_mse_of_equal_widths_by_hand():
    """(1, 2) against (3, 1): 4 + 1."""
    total, count = hidden_mse(jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 1.0]]]), jnp.ones((1, 1)))
    assert float(total) == pytest.approx(5.0) and float(count) == 2.0


# (3, 4) and (4, 3): 1 - 24/25; right angles; opposite; the same direction.
STUDENT_ANGLES = jnp.array([[[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [2.0, 1.0]]])
TEACHER_ANGLES = jnp.array([[[4.0, 3.0], [0.0, 5.0], [-2.0, -2.0], [4.0, 2.0]]])


def test_cosine_by_hand():
    """0.04 + 1 + 2 + 0."""
    total, count = hidden_cosine(STUDENT_ANGLES, TEACHER_ANGLES, jnp.ones((1, 4)))
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(3.04, abs=1e-6) and float(count) == 4.0
    total, count = hidden_cosine(STUDENT_ANGLES, TEACHER_ANGLES, jnp.array([[1, 0, 1, 0]]))
    assert float(total) == pytest.approx(2.04, abs=1e-6) and float(count) == 2.0


def test_cosine_through_a_projection_by_hand():
    """W exchanges the two numbers: (3, 4) and (4, 3) agree, (1, 0) and (0, 5) too."""
    total, _ = hidden_cosine(STUDENT_ANGLES[:, :2], TEACHER_ANGLES[:, :2], jnp.ones((1, 2)), jnp.array([[0.0, 1.0], [1.0, 0.0]]))
    assert float(total) == pytest.approx(0.0, abs=1e-6)


def test_first_tokens():
    """Whatever the side of the padding; a hole in a text starts no other; with segments, one a text, none in the padding."""
    mask = jnp.array([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    first = first_tokens(mask)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(first_tokens(mask, mask), expected)


@pytest.mark.parametrize("all_ones", [False, True], ids=["masked", "segments only"])
def test_first_tokens_of_packed_texts(all_ones):
    segments = jnp.array([[1, 1, 2, 2, 2, 3], [2, 1, 1, 1, 0, 0], [0, 0, 5, 5, 4, 0], [0, 0, 0, 0, 0, 0]])
    mask = jnp.ones_like(segments) if all_ones else segments.clip(0, 1)
    expected = [[1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(first_tokens(mask, segments), expected)


def test_first_token_of_a_text_whose_first_slots_are_masked():
    np.testing.assert_array_equal(first_tokens(jnp.array([[0, 1, 1, 0, 1]]), jnp.array([[1, 1, 2, 2, 2]])), [[0, 1, 1, 0, 0]])


def test_cls_of_packed_texts_equals_separate(name):
    """The first tokens of packed rows, and of the same texts one a row and padded left."""
    student, teacher = make_vectors(4, 14, 24, 36)
    segments, projection = make_segments(PACKED, 14), make_projection()
    first = first_tokens(segments.clip(0, 1), segments)
    packed = evaluate(LOSSES[name], student, teacher, first > 0, projection)
    places = [(row, np.nonzero(segments[row] == n)[0]) for row in range(3) for n in range(1, segments[row].max() + 1)]

    def separate(vectors):
        return np.stack([np.pad(vectors[row, own], ((14 - len(own), 0), (0, 0))) for row, own in places])

    mask = np.stack([np.arange(14) >= 14 - len(own) for _, own in places]).astype(np.int32)
    alone = evaluate(LOSSES[name], separate(student), separate(teacher), first_tokens(mask), projection)
    assert_close(packed[0], alone[0])
    assert packed[1] == alone[1] == 7 * (36 if name == "hidden_mse" else 1)
    assert_close(packed[2][1], alone[2][1])


@pytest.mark.parametrize("first", [0, 5], ids=["padded right", "padded left"])
@pytest.mark.parametrize("noise", [np.nan, np.inf, 1e30, 0.0])
@pytest.mark.parametrize("projected", [True, False])
def test_padding_against_loops(name, first, noise, projected):
    """Noise under the padding does not show, and gets no gradient; the projection's gradient does not see it either."""
    arrays = make_vectors(4, 14, 24, 36 if projected else 24, seed=first)
    projection = make_projection() if projected else None
    mask = make_segments(TEXTS, 14, first) > 0
    total, count = by_loops(name, *arrays, mask, projection)
    expected = evaluate(LOSSES[name], *arrays, mask, projection)
    # New arrays: a computation that is still under way may read the old ones.
    noisy = [np.where(mask[..., None], vectors, np.float32(noise)) for vectors in arrays]
    value, own_count, gradients = evaluate(LOSSES[name], *noisy, mask, projection)
    assert_close(value, total / count)
    assert own_count == count
    assert not np.any(np.asarray(gradients[0])[~mask])
    jax.tree.map(assert_close, gradients, expected[2])


def test_padding_does_not_matter(name):
    """The same texts in rows of 9, and in rows of 14 on either side: value and gradients."""
    tight, projection = make_vectors(4, 9, 24, 36), make_projection()
    expected = evaluate(LOSSES[name], *tight, make_segments(TEXTS, 9) > 0, projection)
    for first in (0, 5):
        padded = make_vectors(4, 14, 24, 36, seed=1)
        for own, text in zip(padded, tight, strict=True):
            own[:, first : first + 9] = text
        value, count, gradients = evaluate(LOSSES[name], *padded, make_segments(TEXTS, 14, first) > 0, projection)
        assert_close(value, expected[0])
        assert count == expected[1]
        assert_close(gradients[0][:, first : first + 9], expected[2][0])
        assert_close(gradients[1], expected[2][1])


def test_zero_at_equality(name):
    vectors, _ = make_vectors(4, 14, 24, 24)
    value, _, gradients = evaluate(LOSSES[name], vectors, vectors, make_segments(TEXTS, 14) > 0)
    assert abs(float(value)) < 1e-6
    assert np.abs(gradients[0]).max() < 1e-6


def test_zero_at_equality_through_a_projection(name):
    student, _ = make_vectors(4, 14, 24, 36)
    projection = make_projection()
    value, _, gradients = evaluate(LOSSES[name], student, student @ projection, make_segments(TEXTS, 14) > 0, projection)
    assert abs(float(value)) < 1e-6
    assert max(np.abs(gradient).max() for gradient in gradients) < 1e-6


def test_micro_batches_sum_to_the_batch(name):
    """Of halves with 9 and 5 real tokens: the mean of their means would be another number."""
    arrays = *make_vectors(4, 14, 24, 36), make_segments([[5], [4], [4], [1]], 14) > 0
    projection = make_projection()
    value, count, gradients = evaluate(LOSSES[name], *arrays, projection)
    halves = [evaluate(LOSSES[name], *(x[rows] for x in arrays), projection) for rows in (slice(0, 2), slice(2, 4))]
    assert_close(sum(half[0] * half[1] for half in halves) / count, value)
    assert sum(half[1] for half in halves) == count
    assert_close(jnp.concatenate([half[2][0] * half[1] for half in halves]) / count, gradients[0])
    assert_close(sum(half[2][1] * half[1] for half in halves) / count, gradients[1])


def test_gradients_against_finite_differences(name):
    student, teacher = make_vectors(4, 14, 24, 36)
    projection = make_projection()
    mask = make_segments(TEXTS, 14) > 0
    _, count, gradients = evaluate(LOSSES[name], student, teacher, mask, projection)
    rng, step = np.random.default_rng(2), 1e-5
    for row in (0, 1, 3) * 8:
        for i, place in enumerate([(row, rng.integers(mask[row].sum()), rng.integers(24)), (rng.integers(24), rng.integers(36))]):
            ends = []
            for sign in (1, -1):
                moved = [student.astype(np.float64), projection.astype(np.float64)]
                moved[i][place] += sign * step
                ends.append(by_loops(name, moved[0], teacher, mask, moved[1])[0])
            gradient = np.asarray(gradients[i], np.float64)
            assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step) / float(count), abs=1e-5 * np.abs(gradient).max())


def test_no_gradient_reaches_the_teacher(name):
    student, teacher = make_vectors(4, 14, 24, 24)
    gradient = jax.jit(jax.grad(lambda t: LOSSES[name](jnp.asarray(student), t, jnp.ones((4, 14)))[0]))(teacher)
    assert gradient.shape == teacher.shape and not np.any(gradient)


@pytest.mark.parametrize("projected", [True, False])
def test_bfloat16_inputs_give_float32_sums(name, projected):
    """The projection stays float32 and gets a float32 gradient; the product is of bfloat16 numbers, its sums are not rounded."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make_vectors(4, 14, 24, 36 if projected else 24)]
    projection = make_projection() if projected else None
    mask = make_segments(TEXTS, 14) > 0
    value, count, gradients = evaluate(LOSSES[name], *arrays, mask, projection)
    assert (value.dtype, count.dtype, gradients[0].dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    rounded = jnp.asarray(projection, jnp.bfloat16) if projected else None
    exact = evaluate(LOSSES[name], *jax.tree.map(lambda x: np.asarray(x, np.float32), (*arrays, mask, rounded)))
    assert_close(value, exact[0], 1e-6)
    assert_close(np.asarray(gradients[0], np.float32), exact[2][0], 1e-2)
    if projected:
        assert gradients[1].dtype == jnp.float32
        assert_close(gradients[1], exact[2][1], 1e-2)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_cosine_of_zero_vectors(side):
    """Cosine 0, so 1; no direction, no gradient; the other tokens keep theirs."""
    student, teacher = make_vectors(4, 14, 24, 24)
    mask = make_segments(TEXTS, 14) > 0
    expected = evaluate(losses.hidden_cosine, student, teacher, mask)
    skipped = by_loops("hidden_cosine", student[:1, :1], teacher[:1, :1], mask[:1, :1])[0]
    kept = mask[..., None] & (np.indices(mask.shape).sum(axis=0) > 0)[..., None]
    sides = [
        np.where(kept, vectors, np.float32(0.0)) if side in (name, "both") else vectors
        for name, vectors in (("student", student), ("teacher", teacher))
    ]
    value, count, gradients = evaluate(losses.hidden_cosine, *sides, mask)
    assert_close(value, expected[0] + (1.0 - skipped) / count)
    gradient, reference = np.asarray(gradients[0]), np.array(expected[2][0])
    assert not np.any(gradient[0, 0])
    reference[0, 0] = 0.0
    assert_close(gradient, reference)


@pytest.mark.parametrize("exponents", [(100, 100), (100, -90), (-90, 0), (60, 0), (0, 120)], ids=str)
def test_cosine_at_any_length(exponents):
    """Vectors of 1e30 or 1e-27: the value does not change, and the gradient shrinks as the vectors grow."""
    student, teacher = make_vectors(4, 14, 24, 24)
    mask = make_segments(TEXTS, 14) > 0
    expected = evaluate(losses.hidden_cosine, student, teacher, mask)
    scaled = (x * np.float32(2.0**exponent) for x, exponent in zip((student, teacher), exponents, strict=True))
    value, _, gradients = evaluate(losses.hidden_cosine, *scaled, mask)
    assert_close(value, expected[0])
    assert_close(np.asarray(gradients[0]).astype(np.float64) * 2.0 ** exponents[0], expected[2][0])


def test_mse_of_large_vectors():
    """Differences of 1e18: their squares still fit."""
    student, teacher = (x * np.float32(1e17) for x in make_vectors(4, 14, 24, 24))
    mask = make_segments(TEXTS, 14) > 0
    value, _, gradients = evaluate(losses.hidden_mse, student, teacher, mask)
    assert_close(value, np.divide(*by_loops("hidden_mse", student, teacher, mask)))
    assert np.isfinite(gradients[0]).all()


def test_nothing_to_count(name):
    value, count, gradients = evaluate(LOSSES[name], *make_vectors(4, 14, 24, 36), np.zeros((4, 14), bool), make_projection())
    assert value == count == 0.0 and not np.any(gradients[0]) and not np.any(gradients[1])


def test_widths_that_do_not_fit(name):
    student, teacher = (jnp.asarray(x) for x in make_vectors(1, 3, 24, 36))
    with pytest.raises(ValueError, match=r"24 \(student\) and 36 \(teacher\) differ"):
        LOSSES[name](student, teacher, jnp.ones((1, 3)))
    for shape in ((36, 24), (24, 24), (36, 36), (1, 36)):
        with pytest.raises(ValueError, match=rf"24 \(student\) and 36 \(teacher\) with a projection of shape \({shape[0]}, {shape[1]}\)"):
            LOSSES[name](student, teacher, jnp.ones((1, 3)), jnp.ones(shape))


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


# Hidden states as the encoder leaves them, with a projection split both ways; and split in the width. Not both: XLA (jaxlib
# 0.10.2 and 0.12.0.1) then takes the rows of the product with the transposed projection, a gradient, from the wrong devices.
LAYOUTS = {"whole": (None, "fsdp"), "split": ("tensor", None)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(name, axes, layout):
    width, rows = LAYOUTS[layout]
    arrays, projection = make_vectors(8, 9, 48, 96, seed=3), make_projection(48, 96)
    mask = make_segments([[9], [4], [2], [1], [0], [3], [7], [8]], 9).clip(0, 1)
    expected = evaluate(LOSSES[name], *arrays, mask, projection)
    mesh = create_mesh(MESHES[axes])
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    batch = ("data", "fsdp")
    student, teacher = (jax.device_put(x, place(batch, None, width)) for x in arrays)
    mask, projection = jax.device_put(mask, place(batch)), jax.device_put(projection, place(rows, "tensor"))
    with jax.set_mesh(mesh):
        value, count, gradients = evaluate(LOSSES[name], student, teacher, mask, projection)
    assert_close(value, expected[0])
    jax.tree.map(assert_close, gradients, expected[2])
    assert count == expected[1]
    assert gradients[0].sharding.is_equivalent_to(student.sharding, 3)


@pytest.mark.torch
@pytest.mark.parametrize("projected", [True, False])
def test_against_pytorch(name, projected):
    """As a PyTorch user would write it: the real tokens picked out, a linear layer without bias, and autograd."""
    import torch
    from torch.nn import functional

    student, teacher = make_vectors(4, 14, 24, 36 if projected else 24, seed=5)
    mask = make_segments(TEXTS, 14) > 0
    projection = make_projection() if projected else None
    ours = evaluate(LOSSES[name], student, teacher, mask, projection)
    theirs = torch.tensor(student, requires_grad=True)
    linear = torch.nn.Linear(24, 36, bias=False) if projected else torch.nn.Identity()
    if projected:
        linear.weight.data = torch.tensor(projection.T.copy())
    mine, other = linear(theirs[torch.tensor(mask)]), torch.tensor(teacher[mask])
    value = functional.mse_loss(mine, other) if name == "hidden_mse" else (1 - functional.cosine_similarity(mine, other, dim=-1)).mean()
    value.backward()
    assert_close(ours[0], value.detach().numpy(), 1e-6)
    assert_close(ours[2][0], theirs.grad.numpy(), 1e-6)
    if projected:
        assert_close(ours[2][1], linear.weight.grad.numpy().T, 1e-6)
