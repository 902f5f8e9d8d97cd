"""The relation KL, plain and blockwise: by hand, against other implementations, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import divergence_by_loops, make_segments, make_vectors

from jaxdistill import kernels, losses
from jaxdistill.config import MeshConfig
from jaxdistill.sharding import create_mesh

IMPLEMENTATIONS = {"plain": losses.relation_kl, "blockwise": kernels.relation_kl}


@pytest.fixture(params=IMPLEMENTATIONS)
def relation_kl(request):
    return IMPLEMENTATIONS[request.param]


def evaluate(relation_kl, student, teacher, mask, *, num_relation_heads, segment_ids=None):
    """(value, count, gradient of the value with respect to the student), jitted."""

    @jax.jit
    def run(student, teacher, mask, segment_ids):
        def value(student):
            total, count = relation_kl(student, teacher, mask, num_relation_heads=num_relation_heads, segment_ids=segment_ids)
            return total / jnp.maximum(count, 1.0), count

        (value, count), gradient = jax.value_and_grad(value, has_aux=True)(student)
        return value, count, gradient

    return run(student, teacher, mask, segment_ids)


def assert_close(ours, reference, tolerance=1e-5):
    reference = np.asarray(reference)
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance * max(np.abs(reference).max(), 1e-12))


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
    total, count = relation_kl(jnp.asarray(UNIFORM), jnp.asarray(teacher), jnp.ones((1, 3)), num_relation_heads=1)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(0.148342, abs=1e-6) == pytest.approx(MIDDLE_QUERY, abs=1e-6)
    assert float(count) == 3.0


def test_direction_by_hand(relation_kl):
    """KL(teacher || student) is not symmetric: with the sides exchanged, 1/3 (2 ln(5/3) + ln(5/9)) = 0.144621."""
    total, _ = relation_kl(jnp.asarray(PEAKED), jnp.asarray(UNIFORM), jnp.ones((1, 3)), num_relation_heads=1)
    assert float(total) == pytest.approx(0.144621, abs=1e-6)


def test_masked_by_hand(relation_kl):
    """Without the third token the middle query has (1/4, 3/4) against (1/2, 1/2): 3/4 ln 3 - ln 2 = 0.130812."""
    total, count = relation_kl(jnp.asarray(UNIFORM), jnp.asarray(PEAKED), jnp.array([[1, 1, 0]]), num_relation_heads=1)
    assert float(total) == pytest.approx(0.130812, abs=1e-6)
    assert float(count) == 2.0


def test_packed_by_hand(relation_kl):
    """The first token alone costs nothing; the other two are again (3/4, 1/4) against halves."""
    segments = jnp.array([[1, 2, 2]])
    total, count = relation_kl(jnp.asarray(UNIFORM), jnp.asarray(PEAKED), jnp.ones((1, 3)), num_relation_heads=1, segment_ids=segments)
    assert float(total) == pytest.approx(0.130812, abs=1e-6)
    assert float(count) == 3.0


def test_two_heads_by_hand(relation_kl):
    """Heads lie side by side in the width: number 0 belongs to the first head, number 1 to the second."""
    student = jnp.zeros((1, 3, 2))
    first = jnp.asarray(np.concatenate([PEAKED, UNIFORM], axis=-1))
    both = jnp.asarray(np.concatenate([PEAKED, PEAKED], axis=-1))
    total, count = relation_kl(student, first, jnp.ones((1, 3)), num_relation_heads=2)
    assert float(total) == pytest.approx(MIDDLE_QUERY, abs=1e-6) and float(count) == 6.0
    assert float(relation_kl(student, both, jnp.ones((1, 3)), num_relation_heads=2)[0]) == pytest.approx(2 * MIDDLE_QUERY, abs=1e-6)


TEXTS = [[9], [4], [0], [1]]


@pytest.mark.parametrize(("first", "length"), [(0, 9), (0, 14), (5, 14)], ids=["tight", "padded right", "padded left"])
def test_padding_against_loops(relation_kl, first, length):
    """One truth for three layouts; noise under the padding must not show, and gets no gradient."""
    student, teacher = make_vectors(4, length, 24, 36, seed=length + first)
    tight = make_vectors(4, 9, 24, 36, seed=1)
    student[:, first : first + 9], teacher[:, first : first + 9] = tight
    segments = make_segments(TEXTS, length, first)
    value, count, gradient = evaluate(relation_kl, student, teacher, segments > 0, num_relation_heads=6)
    expected = divergence_by_loops(*tight, make_segments(TEXTS, 9), 6)
    assert_close(value, expected[0] / expected[1])
    assert count == expected[1] == 14 * 6
    assert not np.any(np.asarray(gradient)[segments == 0])


@pytest.mark.parametrize("num_relation_heads", [1, 2, 6, 12])
def test_heads_and_widths_against_loops(relation_kl, num_relation_heads):
    """R need not know either side's native heads; widths may differ."""
    student, teacher = make_vectors(2, 7, 12, 36)
    segments = make_segments([[3, 4], [5]], 7)
    value, _, _ = evaluate(
        relation_kl, student, teacher, segments > 0, num_relation_heads=num_relation_heads, segment_ids=segments
    )
    assert_close(value, np.divide(*divergence_by_loops(student, teacher, segments, num_relation_heads)))


def test_zero_at_equality(relation_kl):
    vectors, _ = make_vectors(2, 9, 24, 24)
    segments = make_segments([[9], [5]], 9)
    value, _, gradient = evaluate(relation_kl, vectors, vectors, segments > 0, num_relation_heads=4)
    assert abs(float(value)) < 1e-6
    assert np.abs(gradient).max() < 1e-6


def test_never_negative(relation_kl):
    student, _ = make_vectors(1, 16, 24, 24)
    teacher = student + 1e-3 * make_vectors(1, 16, 24, 24, seed=1)[0]
    value, _, _ = evaluate(relation_kl, student, teacher, np.ones((1, 16)), num_relation_heads=4)
    assert -1e-7 < float(value) < 1e-5


def test_micro_batches_sum_to_the_batch(relation_kl):
    student, teacher = make_vectors(4, 9, 24, 36)
    mask = make_segments(TEXTS, 9) > 0
    whole = relation_kl(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask), num_relation_heads=6)
    parts = [
        relation_kl(*(jnp.asarray(x[rows]) for x in (student, teacher, mask)), num_relation_heads=6)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert_close(sum(part[0] for part in parts), whole[0])
    assert sum(part[1] for part in parts) == whole[1]


def test_packed_equals_separate(relation_kl):
    lengths = [[7, 5, 2], [3, 1, 9]]
    student, teacher = make_vectors(2, 16, 24, 36)
    segments = make_segments(lengths, 16)
    packed = evaluate(relation_kl, student, teacher, segments > 0, num_relation_heads=6, segment_ids=segments)
    places = [(row, np.nonzero(segments[row] == n)[0]) for row in range(2) for n in (1, 2, 3)]

    def separate(vectors):
        return np.stack([np.pad(vectors[row, own], ((0, 16 - len(own)), (0, 0))) for row, own in places])

    mask = np.stack([np.arange(16) < len(own) for _, own in places])
    alone = evaluate(relation_kl, separate(student), separate(teacher), mask, num_relation_heads=6)
    assert_close(packed[0], alone[0])
    assert packed[1] == alone[1]
    for i, (row, own) in enumerate(places):
        assert_close(np.asarray(packed[2])[row, own], np.asarray(alone[2])[i, : len(own)])


def test_gradient_against_finite_differences(relation_kl):
    student, teacher = make_vectors(2, 7, 24, 36)
    segments = make_segments([[4, 3], [5]], 7)
    _, count, gradient = evaluate(relation_kl, student, teacher, segments > 0, num_relation_heads=6, segment_ids=segments)
    gradient = np.asarray(gradient, np.float64)
    rng, step = np.random.default_rng(2), 1e-5
    for _ in range(24):
        place = (rng.integers(2), rng.integers(5), rng.integers(24))
        ends = []
        for sign in (1, -1):
            moved = student.astype(np.float64)
            moved[place] += sign * step
            ends.append(divergence_by_loops(moved, teacher, segments, 6)[0])
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step) / float(count), abs=1e-5 * np.abs(gradient).max())


def test_no_gradient_reaches_the_teacher(relation_kl):
    student, teacher = (jnp.asarray(x) for x in make_vectors(2, 7, 24, 36))
    gradient = jax.grad(lambda t: relation_kl(student, t, jnp.ones((2, 7)), num_relation_heads=6)[0])(teacher)
    assert gradient.shape == teacher.shape and not np.any(gradient)


def test_bfloat16_inputs_give_float32_sums(relation_kl):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in make_vectors(2, 9, 24, 36))
    mask = make_segments([[9], [5]], 9) > 0
    value, count, gradient = evaluate(relation_kl, student, teacher, mask, num_relation_heads=6)
    assert (value.dtype, count.dtype, gradient.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    # The sums are those of the rounded inputs: nothing after them is rounded.
    exact = evaluate(relation_kl, *(x.astype(jnp.float32) for x in (student, teacher)), mask, num_relation_heads=6)
    assert_close(value, exact[0], 1e-6)
    assert_close(gradient.astype(jnp.float32), exact[2], 1e-2)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "scores of 10 thousand"])
def test_finite_with_a_padded_row_and_large_scores(relation_kl, scale):
    """Scores of +-1e4 and a row that sees nothing: finite, and the value still that of float64."""
    student, teacher = make_vectors(3, 9, 24, 36)
    student, teacher = np.clip(student, -2, 2) * np.float32(scale), np.clip(teacher, -2, 2) * np.float32(scale)
    segments = make_segments([[0], [9], [4]], 9)
    value, count, gradient = evaluate(relation_kl, student, teacher, segments > 0, num_relation_heads=6)
    assert np.isfinite(value) and np.isfinite(gradient).all() and count == 13 * 6
    assert_close(value, np.divide(*divergence_by_loops(student, teacher, segments, 6)))
    assert not np.any(np.asarray(gradient)[0])
    assert np.abs(np.asarray(gradient)[1]).max() > 1e-4


def test_large_scores_of_a_near_teacher_keep_their_digits(relation_kl):
    """KL of 1e-3 between scores of 1e4: the large numbers must cancel before they are summed."""
    rng = np.random.default_rng(0)
    student = np.concatenate([np.full((1, 8, 1), 100.0), rng.normal(0, 1, (1, 8, 3))], axis=-1).astype(np.float32)
    teacher = student + np.concatenate([np.zeros((1, 8, 1)), rng.normal(0, 0.05, (1, 8, 3))], axis=-1).astype(np.float32)
    segments = np.ones((1, 8), np.int32)
    value, _, _ = evaluate(relation_kl, student, teacher, segments > 0, num_relation_heads=1)
    exact = np.divide(*divergence_by_loops(student, teacher, segments, 1))
    assert float(value) == pytest.approx(exact, rel=0.1)


def test_nothing_to_count(relation_kl):
    student, teacher = make_vectors(1, 5, 24, 36)
    value, count, gradient = evaluate(relation_kl, student, teacher, np.zeros((1, 5)), num_relation_heads=6)
    assert value == count == 0.0 and not np.any(gradient)


@pytest.mark.parametrize(("heads", "width"), [(5, 24), (8, 36), (48, 24)])
def test_heads_that_do_not_divide(relation_kl, heads, width):
    student, teacher = (jnp.asarray(x) for x in make_vectors(1, 3, 24, 36))
    with pytest.raises(ValueError, match=f"{heads} relation heads do not divide the hidden size {width}"):
        relation_kl(student, teacher, jnp.ones((1, 3)), num_relation_heads=heads)


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

    heads = 6
    student, teacher = make_vectors(3, 11, 24, 36, seed=5)
    segments = make_segments([[6, 5], [3, 1, 4], [2, 6]] if packed else [[11], [8], [1]], 11)
    ours = evaluate(relation_kl, student, teacher, segments > 0, num_relation_heads=heads, segment_ids=segments)
    theirs = torch.tensor(student, requires_grad=True)
    total, count = torch.zeros(()), 0
    for row in range(3):
        for text in range(1, segments[row].max() + 1):
            places = torch.tensor(np.nonzero(segments[row] == text)[0])
            probabilities = []
            for vectors in (theirs, torch.tensor(teacher)):
                parts = torch.stack(vectors[row, places].chunk(heads, dim=-1))
                probabilities.append(torch.log_softmax(parts @ parts.mT / parts.shape[-1] ** 0.5, dim=-1))
            total = total + torch.nn.functional.kl_div(*probabilities, reduction="sum", log_target=True)
            count += heads * len(places)
    (total / count).backward()
    assert_close(ours[0], (total / count).detach().numpy(), 1e-6)
    assert_close(ours[2], theirs.grad.numpy(), 1e-6)
