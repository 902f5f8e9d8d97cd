"""The relation KL, plain and blockwise: by hand, against other implementations, and what it must not depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import (
    PACKED,
    TEXTS,
    assert_close,
    divergence_by_loops,
    finite_difference,
    make_segments,
    make_vectors,
    one_text_a_row,
    places_of_texts,
    spoil_padding,
)

from jaxdistill import kernels, losses
from jaxdistill.config import MeshConfig
from jaxdistill.sharding import create_mesh

IMPLEMENTATIONS = {"plain": losses.relation_kl, "blockwise": kernels.relation_kl}


@pytest.fixture(params=IMPLEMENTATIONS)
def relation_kl(request):
    return IMPLEMENTATIONS[request.param]


@partial(jax.jit, static_argnums=0, static_argnames="num_relation_heads")
def sums(relation_kl, *arrays, num_relation_heads, segment_ids=None):
    return relation_kl(*arrays, num_relation_heads=num_relation_heads, segment_ids=segment_ids)


# Most tests share the shapes 4 x 14, 24 and 36 or 24 and 24 numbers wide, 6 heads, and with them the compiled program.
@partial(jax.jit, static_argnums=0, static_argnames="num_relation_heads")
def evaluate(relation_kl, student, teacher, mask, *, num_relation_heads=6, segment_ids=None):
    """(value, count, gradient of the value with respect to the student)."""

    def value(student):
        total, count = relation_kl(student, teacher, mask.astype(jnp.int32), num_relation_heads=num_relation_heads, segment_ids=segment_ids)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradient = jax.value_and_grad(value, has_aux=True)(student)
    return value, count, gradient


# The same of a cross relation, (queries, keys) of each side: the gradient has two parts.
@partial(jax.jit, static_argnums=0, static_argnames="num_relation_heads")
def evaluate_cross(relation_kl, student, teacher, mask, *, num_relation_heads=6, segment_ids=None):
    def value(student):
        options = {"segment_ids": segment_ids, "student_keys": student[1], "teacher_keys": teacher[1]}
        total, count = relation_kl(student[0], teacher[0], mask.astype(jnp.int32), num_relation_heads=num_relation_heads, **options)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(value, has_aux=True)(student)
    return value, count, gradients


def make_pairs(seed: int = 0):
    """(queries, keys) of a student 24 wide and of a teacher 36 wide, 4 x 14."""
    return tuple(zip(make_vectors(4, 14, 24, 36, seed=seed), make_vectors(4, 14, 24, 36, seed=seed + 1), strict=True))


# One relation head of one number, so that a score is the product of two numbers; then a wider teacher, whose products are
# divided by sqrt(4). The student's zeros see every key alike: 1/3 each. Two queries of the teacher do the same and cost
# nothing; the middle one has scores (0, ln 3, 0), so probabilities (1/5, 3/5, 1/5).
UNIFORM = np.zeros((1, 3, 1), np.float32)
PEAKED = np.array([[[0], [np.log(3) ** 0.5], [0]]], np.float32)
WIDE = np.zeros((1, 3, 4), np.float32)
WIDE[0, 1, 2] = (2 * np.log(3)) ** 0.5
MIDDLE_QUERY = 0.4 * np.log(3 / 5) + 0.6 * np.log(9 / 5)  # 0.148342


@pytest.mark.parametrize("teacher", [PEAKED, WIDE], ids=["equal widths", "wider teacher"])
def test_three_tokens_by_hand(relation_kl, teacher):
    total, count = sums(relation_kl, jnp.asarray(UNIFORM), jnp.asarray(teacher), jnp.ones((1, 3)), num_relation_heads=1)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(0.148342, abs=1e-6) == pytest.approx(MIDDLE_QUERY, abs=1e-6)
    assert float(count) == 3.0


def test_direction_by_hand(relation_kl):
    """KL(teacher || student) is not symmetric: with the sides exchanged, 1/3 (2 ln(5/3) + ln(5/9)) = 0.144621."""
    total, _ = sums(relation_kl, jnp.asarray(PEAKED), jnp.asarray(UNIFORM), jnp.ones((1, 3)), num_relation_heads=1)
    assert float(total) == pytest.approx(0.144621, abs=1e-6)


def test_masked_by_hand(relation_kl):
    """Without the third token the middle query has (1/4, 3/4) against (1/2, 1/2): 3/4 ln 3 - ln 2 = 0.130812."""
    total, count = sums(relation_kl, jnp.asarray(UNIFORM), jnp.asarray(PEAKED), jnp.array([[1, 1, 0]]), num_relation_heads=1)
    assert float(total) == pytest.approx(0.130812, abs=1e-6)
    assert float(count) == 2.0


def test_packed_by_hand(relation_kl):
    """The first token alone costs nothing; the other two are again (3/4, 1/4) against halves."""
    segments = jnp.array([[1, 2, 2]])
    arrays = jnp.asarray(UNIFORM), jnp.asarray(PEAKED), jnp.ones((1, 3))
    total, count = sums(relation_kl, *arrays, num_relation_heads=1, segment_ids=segments)
    assert float(total) == pytest.approx(0.130812, abs=1e-6)
    assert float(count) == 3.0


def test_two_heads_by_hand(relation_kl):
    """Heads lie side by side in the width: number 0 belongs to the first head, number 1 to the second."""
    student = jnp.zeros((1, 3, 2))
    first = jnp.asarray(np.concatenate([PEAKED, UNIFORM], axis=-1))
    both = jnp.asarray(np.concatenate([PEAKED, PEAKED], axis=-1))
    total, count = sums(relation_kl, student, first, jnp.ones((1, 3)), num_relation_heads=2)
    assert float(total) == pytest.approx(MIDDLE_QUERY, abs=1e-6) and float(count) == 6.0
    assert float(sums(relation_kl, student, both, jnp.ones((1, 3)), num_relation_heads=2)[0]) == pytest.approx(2 * MIDDLE_QUERY, abs=1e-6)


def test_mask_holds_within_a_segment(relation_kl):
    """A padded slot is padding also where the segments do not say so."""
    arrays = jnp.asarray(UNIFORM), jnp.asarray(PEAKED), jnp.array([[1, 1, 0]])
    total, count = sums(relation_kl, *arrays, num_relation_heads=1, segment_ids=jnp.ones((1, 3), jnp.int32))
    assert float(total) == pytest.approx(0.130812, abs=1e-6) and float(count) == 2.0


@pytest.mark.parametrize("first", [0, 5], ids=["padded right", "padded left"])
def test_padding_against_loops(relation_kl, first):
    """Noise under the padding does not show, and gets no gradient."""
    student, teacher = make_vectors(4, 14, 24, 36, seed=first)
    segments = make_segments(TEXTS, 14, first)
    value, count, gradient = evaluate(relation_kl, student, teacher, segments > 0)
    expected = divergence_by_loops(student, teacher, segments, 6)
    assert_close(value, expected[0] / expected[1])
    assert count == expected[1] == 14 * 6
    assert not np.any(np.asarray(gradient)[segments == 0])


def test_padding_does_not_matter(relation_kl):
    """The same texts in rows of 9, and in rows of 14 on either side: value and gradient."""
    tight = make_vectors(4, 9, 24, 36)
    expected = evaluate(relation_kl, *tight, make_segments(TEXTS, 9) > 0)
    for first in (0, 5):
        padded = make_vectors(4, 14, 24, 36, seed=1)
        for own, text in zip(padded, tight, strict=True):
            own[:, first : first + 9] = text
        value, count, gradient = evaluate(relation_kl, *padded, make_segments(TEXTS, 14, first) > 0)
        assert_close(value, expected[0])
        assert count == expected[1]
        assert_close(gradient[:, first : first + 9], expected[2])


@pytest.mark.parametrize("num_relation_heads", [1, 2, 12])
def test_heads_and_widths_against_loops(relation_kl, num_relation_heads):
    """R need not know either side's native heads; widths may differ."""
    student, teacher = make_vectors(2, 7, 12, 36)
    segments = make_segments([[3, 4], [5]], 7)
    total, count = sums(relation_kl, student, teacher, segments.clip(0, 1), num_relation_heads=num_relation_heads, segment_ids=segments)
    expected = divergence_by_loops(student, teacher, segments, num_relation_heads)
    assert_close(total, expected[0])
    assert count == expected[1]


def test_zero_at_equality(relation_kl):
    vectors, _ = make_vectors(4, 14, 24, 24)
    value, _, gradient = evaluate(relation_kl, vectors, vectors, make_segments(TEXTS, 14) > 0)
    assert abs(float(value)) < 1e-6
    assert np.abs(gradient).max() < 1e-6


def test_never_negative(relation_kl):
    student, noise = make_vectors(4, 14, 24, 24)
    value, _, _ = evaluate(relation_kl, student, student + 1e-3 * noise, make_segments(TEXTS, 14) > 0)
    assert -1e-7 < float(value) < 1e-5


def test_micro_batches_sum_to_the_batch(relation_kl):
    """Of halves with 9 and 5 real tokens: the mean of their means would be another number."""
    student, teacher = make_vectors(4, 14, 24, 36)
    mask = make_segments([[5], [4], [4], [1]], 14) > 0
    value, count, gradient = evaluate(relation_kl, student, teacher, mask)
    halves = [evaluate(relation_kl, student[rows], teacher[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert_close(sum(half[0] * half[1] for half in halves) / count, value)
    assert sum(half[1] for half in halves) == count
    assert_close(jnp.concatenate([half[2] * half[1] for half in halves]) / count, gradient)


def test_packed_equals_separate(relation_kl):
    student, teacher = make_vectors(4, 14, 24, 36)
    segments = make_segments(PACKED, 14)
    packed = evaluate(relation_kl, student, teacher, segments > 0, segment_ids=segments)
    alone = evaluate(relation_kl, *(one_text_a_row(x, segments) for x in (student, teacher, segments)))
    assert_close(packed[0], alone[0])
    assert packed[1] == alone[1]
    for i, (row, own) in enumerate(places_of_texts(segments)):
        assert_close(np.asarray(packed[2])[row, own], np.asarray(alone[2])[i, : len(own)])


def test_gradient_against_finite_differences(relation_kl):
    student, teacher = make_vectors(4, 14, 24, 36)
    segments = make_segments(PACKED, 14)
    _, count, gradient = evaluate(relation_kl, student, teacher, segments > 0, segment_ids=segments)
    gradient = np.asarray(gradient, np.float64)
    rng = np.random.default_rng(2)
    for row in (0, 1, 2) * 8:
        place = (row, rng.integers(13), rng.integers(24))
        reference = finite_difference(lambda moved: divergence_by_loops(moved, teacher, segments, 6)[0], student, place)
        assert gradient[place] == pytest.approx(reference / float(count), abs=1e-5 * np.abs(gradient).max())


def test_no_gradient_reaches_the_teacher(relation_kl):
    student, teacher = make_vectors(4, 14, 24, 36)
    gradient = jax.jit(jax.grad(lambda t: relation_kl(jnp.asarray(student), t, jnp.ones((4, 14)), num_relation_heads=6)[0]))(teacher)
    assert gradient.shape == teacher.shape and not np.any(gradient)


def test_noise_under_the_padding(relation_kl):
    """Not even a NaN there shows, on either side, in the value or in the gradient."""
    segments = make_segments(TEXTS, 14, 3)
    arrays = make_vectors(4, 14, 24, 36)
    clean = evaluate(relation_kl, *arrays, segments > 0)
    spoilt = evaluate(relation_kl, *(spoil_padding(x, segments) for x in arrays), segments > 0)
    for ours, reference in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(ours, reference)


def test_bfloat16_inputs_give_float32_sums(relation_kl):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in make_vectors(4, 14, 24, 36))
    mask = make_segments(TEXTS, 14) > 0
    value, count, gradient = evaluate(relation_kl, student, teacher, mask)
    assert (value.dtype, count.dtype, gradient.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    # The sums are those of the rounded inputs: nothing after them is rounded.
    exact = evaluate(relation_kl, *(np.asarray(x, np.float32) for x in (student, teacher)), mask)
    assert_close(value, exact[0], 1e-6)
    assert_close(np.asarray(gradient, np.float32), exact[2], 1e-2)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "scores of 10 thousand"])
def test_finite_with_a_padded_row_and_large_scores(relation_kl, scale):
    """Scores of +-1e4 and a row that sees nothing: finite, and the value still that of float64."""
    student, teacher = (np.clip(x, -2, 2) * np.float32(scale) for x in make_vectors(4, 14, 24, 36))
    segments = make_segments(TEXTS, 14)
    value, count, gradient = evaluate(relation_kl, student, teacher, segments > 0)
    assert np.isfinite(value) and np.isfinite(gradient).all() and count == 14 * 6
    assert_close(value, np.divide(*divergence_by_loops(student, teacher, segments, 6)))
    assert not np.any(np.asarray(gradient)[2])
    assert np.abs(np.asarray(gradient)[0]).max() > 1e-4


def test_large_scores_of_a_near_teacher_keep_their_digits(relation_kl):
    """A KL of 1e-3 between scores of 5000: the large numbers must cancel before they are summed."""
    student, noise = make_vectors(4, 14, 24, 24)
    student[..., ::4] = 100.0  # in every head
    noise[..., ::4] = 0.0
    teacher = student + np.float32(0.05) * noise
    segments = make_segments(TEXTS, 14)
    value, _, _ = evaluate(relation_kl, student, teacher, segments > 0)
    assert float(value) == pytest.approx(np.divide(*divergence_by_loops(student, teacher, segments, 6)), rel=0.01)


def test_nothing_to_count(relation_kl):
    value, count, gradient = evaluate(relation_kl, *make_vectors(4, 14, 24, 36), np.zeros((4, 14)))
    assert value == count == 0.0 and not np.any(gradient)


@pytest.mark.parametrize(("heads", "width"), [(5, 24), (8, 36), (48, 24)])
def test_heads_that_do_not_divide(relation_kl, heads, width):
    student, teacher = (jnp.asarray(x) for x in make_vectors(1, 3, 24, 36))
    with pytest.raises(ValueError, match=f"{heads} relation heads do not divide the hidden size {width}"):
        relation_kl(student, teacher, jnp.ones((1, 3)), num_relation_heads=heads)


def test_cross_by_hand(relation_kl):
    """Queries (0, 1, 2) over keys (0, 0, ln 3): the middle query has (1/5, 1/5, 3/5), the last (1/11, 1/11, 9/11), against thirds.

    3/5 ln(9/5) + 2/5 ln(3/5) = 0.148342 and 9/11 ln(27/11) + 2/11 ln(3/11) = 0.498446; with queries and keys exchanged the
    last query alone would differ from thirds.
    """
    queries, keys = jnp.array([[[0.0], [1.0], [2.0]]]), jnp.array([[[0.0], [0.0], [np.log(3)]]], jnp.float32)
    cross = partial(relation_kl, jnp.zeros((1, 3, 1)), num_relation_heads=1, student_keys=jnp.ones((1, 3, 1)))
    total, count = cross(queries, jnp.ones((1, 3)), teacher_keys=keys)
    assert float(total) == pytest.approx(0.148342 + 0.498446, abs=2e-6) and float(count) == 3.0
    # Four numbers a head: divided by sqrt(4).
    wide = jnp.pad(2 * queries, ((0, 0), (0, 0), (0, 3)))
    total, _ = cross(wide, jnp.ones((1, 3)), teacher_keys=jnp.pad(keys, ((0, 0), (0, 0), (0, 3))))
    assert float(total) == pytest.approx(0.148342 + 0.498446, abs=2e-6)


@pytest.mark.parametrize("texts", [TEXTS, PACKED], ids=["one text a row", "packed"])
def test_cross_against_loops(relation_kl, texts):
    """Value, and the gradients of queries and of keys by finite differences."""
    student, teacher = make_pairs()
    segments = make_segments(texts, 14)
    spoilt = (tuple(spoil_padding(x, segments) for x in side) for side in (student, teacher))
    value, count, gradients = evaluate_cross(relation_kl, *spoilt, segments > 0, segment_ids=segments)
    expected = divergence_by_loops(student, teacher, segments, 6)
    assert_close(value, expected[0] / expected[1])
    assert count == expected[1]
    rng = np.random.default_rng(3)
    for part, gradient in enumerate(np.asarray(x, np.float64) for x in gradients):
        assert not np.any(gradient[segments == 0])

        def total(moved, part=part):
            return divergence_by_loops((moved, student[1]) if part == 0 else (student[0], moved), teacher, segments, 6)[0]

        for row in (0, 1, 3) * 4:
            place = (row, rng.integers(9), rng.integers(24))
            reference = finite_difference(total, student[part], place) / expected[1]
            assert gradient[place] == pytest.approx(reference, abs=1e-5 * np.abs(gradient).max())


def test_cross_with_itself_is_the_self_relation(relation_kl):
    """The gradient of the vectors is then what reaches them as queries and what reaches them as keys."""
    student, teacher = make_vectors(4, 14, 24, 36)
    mask = make_segments(TEXTS, 14) > 0
    value, count, gradient = evaluate(relation_kl, student, teacher, mask)
    cross = evaluate_cross(relation_kl, (student, student), (teacher, teacher), mask)
    assert_close(cross[0], value)
    assert cross[1] == count
    assert_close(cross[2][0] + cross[2][1], gradient)


def test_cross_in_bfloat16(relation_kl):
    pairs = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_pairs())
    mask = make_segments(TEXTS, 14) > 0
    value, count, gradients = evaluate_cross(relation_kl, *pairs, mask)
    assert (value.dtype, count.dtype, gradients[0].dtype, gradients[1].dtype) == (jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact = evaluate_cross(relation_kl, *jax.tree.map(lambda x: np.asarray(x, np.float32), pairs), mask)
    assert_close(value, exact[0], 1e-6)
    for ours, reference in zip(gradients, exact[2], strict=True):
        assert_close(np.asarray(ours, np.float32), reference, 1e-2)


def test_value_relation_is_that_of_the_native_heads(relation_kl):
    """MiniLM: values, as many relation heads as attention heads (3), here also 3 x 8 and 3 x 12 arrays of heads by numbers."""
    student, teacher = make_vectors(2, 7, 24, 36)
    total, count = sums(relation_kl, student, teacher, np.ones((2, 7), np.int32), num_relation_heads=3)
    expected = 0.0
    for row in range(2):
        for head in range(3):
            probabilities = []
            for vectors in (student, teacher):
                values = np.asarray(vectors[row], np.float64).reshape(7, 3, -1)[:, head]
                weights = np.exp(values @ values.T / np.sqrt(values.shape[1]))
                probabilities.append(weights / weights.sum(axis=-1, keepdims=True))
            expected += (probabilities[1] * np.log(probabilities[1] / probabilities[0])).sum()
    assert_close(total, expected)
    assert count == 2 * 7 * 3


@pytest.mark.parametrize("missing", ["student_keys", "teacher_keys"])
def test_keys_of_one_side_only(relation_kl, missing):
    vectors = jnp.ones((1, 3, 4))
    keys = {"student_keys": vectors, "teacher_keys": vectors} | {missing: None}
    with pytest.raises(ValueError, match="one of them is missing"):
        relation_kl(vectors, vectors, jnp.ones((1, 3)), num_relation_heads=2, **keys)


def test_heads_that_do_not_divide_a_cross_relation(relation_kl):
    student, teacher = jnp.ones((1, 3, 24)), jnp.ones((1, 3, 36))
    with pytest.raises(ValueError, match="8 relation heads do not divide the hidden size 36"):
        relation_kl(student, teacher, jnp.ones((1, 3)), num_relation_heads=8, student_keys=student, teacher_keys=teacher)


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def one_device():
    student, teacher = make_vectors(8, 9, 48, 96, seed=3)
    segments = make_segments([[9], [4, 5], [2, 2], [1], [0], [3, 3, 3], [7], [8, 1]], 9)
    arrays = student, teacher, (segments > 0).astype(np.int32), segments
    return arrays, evaluate(losses.relation_kl, *arrays[:3], num_relation_heads=8, segment_ids=arrays[3])


@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(relation_kl, axes, one_device):
    (student, teacher, mask, segments), expected = one_device
    mesh = create_mesh(MESHES[axes])
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    batch = ("data", "fsdp")
    student, teacher = (jax.device_put(x, place(batch, None, "tensor")) for x in (student, teacher))
    mask, segments = (jax.device_put(x, place(batch)) for x in (mask, segments))
    with jax.set_mesh(mesh):
        value, count, gradient = evaluate(relation_kl, student, teacher, mask, num_relation_heads=8, segment_ids=segments)
    assert_close(value, expected[0])
    assert_close(gradient, expected[2])
    assert count == expected[1]
    assert gradient.sharding.is_equivalent_to(student.sharding, 3)


@pytest.mark.torch
@pytest.mark.parametrize("packed", [False, True], ids=["one text a row", "packed"])
def test_against_pytorch(relation_kl, packed):
    """As a PyTorch user would write it: text by text, without masks, `kl_div`, and autograd."""
    import torch

    student, teacher = make_vectors(4, 14, 24, 36, seed=5)
    segments = make_segments(PACKED if packed else TEXTS, 14)
    ours = evaluate(relation_kl, student, teacher, segments > 0, segment_ids=segments if packed else None)
    theirs = torch.tensor(student, requires_grad=True)
    total, count = torch.zeros(()), 0
    for row in range(4):
        for text in range(1, segments[row].max() + 1):
            places = torch.tensor(np.nonzero(segments[row] == text)[0])
            probabilities = []
            for vectors in (theirs, torch.tensor(teacher)):
                parts = torch.stack(vectors[row, places].chunk(6, dim=-1))
                probabilities.append(torch.log_softmax(parts @ parts.mT / parts.shape[-1] ** 0.5, dim=-1))
            total = total + torch.nn.functional.kl_div(*probabilities, reduction="sum", log_target=True)
            count += 6 * len(places)
    (total / count).backward()
    assert_close(ours[0], (total / count).detach().numpy(), 1e-6)
    assert_close(ours[2], theirs.grad.numpy(), 1e-6)
