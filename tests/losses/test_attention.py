"""Attention transfer, KL (plain and blockwise) and MSE: by hand, against other implementations, and what it must not depend on."""

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
    squares_by_loops,
)

from jaxdistill import kernels, losses
from jaxdistill.config import MeshConfig
from jaxdistill.sharding import create_mesh

DIVERGENCES = {"kl plain": losses.attention_kl, "kl blockwise": kernels.attention_kl}
FORMS = DIVERGENCES | {"mse": losses.attention_mse}
HEADS = 6


@pytest.fixture(params=FORMS)
def attention(request):
    return FORMS[request.param]


@pytest.fixture(params=DIVERGENCES)
def attention_kl(request):
    return DIVERGENCES[request.param]


# Sides are (query, key). Most tests share 4 x 14 slots, 24 and 36 numbers wide, 6 heads, and the compiled program.
@partial(jax.jit, static_argnums=0, static_argnames="num_heads")
def evaluate(attention, student, teacher, segments, *, num_heads=HEADS):
    """(value, count, gradients of the value with respect to the student's query and key)."""

    def value(student):
        mask = (segments > 0).astype(jnp.int32)
        total, count = attention(*student, *teacher, mask, num_heads=num_heads, segment_ids=segments)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(value, has_aux=True)(student)
    return value, count, gradients


def make_sides(seed: int = 0, shape=(4, 14, 24, 36)):
    return tuple(zip(make_vectors(*shape, seed=seed), make_vectors(*shape, seed=seed + 100), strict=True))


def by_loops(attention, student, teacher, segments):
    if attention is losses.attention_mse:
        return squares_by_loops(student, teacher, segments, HEADS, scaled=True)
    return divergence_by_loops(student, teacher, segments, HEADS)


# Queries (0, 1, 2) times keys (0, 0, ln 3): scores of nothing, of (0, 0, ln 3) and of (0, 0, ln 9), against a student that
# sees every key alike. Wide: two in a head of four numbers make sqrt(4).
QUERY, KEY = np.array([[[0.0], [1], [2]]], np.float32), np.array([[[0.0], [0], [np.log(3)]]], np.float32)
WIDE_QUERY, WIDE_KEY = 2 * np.pad(QUERY, ((0, 0), (0, 0), (0, 3))), np.pad(KEY, ((0, 0), (0, 0), (0, 3)))
ZEROS, WIDE_ZEROS = np.zeros((1, 3, 1), np.float32), np.zeros((1, 3, 4), np.float32)
WIDTHS = pytest.mark.parametrize(
    ("query", "key", "zeros"),
    [(QUERY, KEY, ZEROS), (WIDE_QUERY, WIDE_KEY, ZEROS), (QUERY, KEY, WIDE_ZEROS)],
    ids=["equal widths", "wider teacher", "wider student"],
)
MASKS = pytest.mark.parametrize(
    ("mask", "segments", "part"),
    [
        ([1, 1, 1], None, "all"),
        ([0, 1, 1], None, "last two"),
        ([1, 1, 0], None, "none"),
        ([1, 1, 1], [1, 2, 2], "packed"),
        ([1, 1, 0], [1, 1, 1], "none"),
        ([0, 0, 0], None, "nothing"),
    ],
)


@WIDTHS
@MASKS
def test_divergence_by_hand(attention_kl, query, key, zeros, mask, segments, part):
    """(1/5, 1/5, 3/5) and (1/11, 1/11, 9/11) against thirds: 3/5 ln(9/5) + 2/5 ln(3/5) + 9/11 ln(27/11) + 2/11 ln(3/11) = 0.646788.

    Among the last two tokens (1/4, 3/4) and (1/10, 9/10) against halves: 3/4 ln 3 - ln 2 + 1/10 ln(1/5) + 9/10 ln(9/5) = 0.498877.
    """
    expected = {"all": (0.646788, 3), "last two": (0.498877, 2), "none": (0, 2), "packed": (0.498877, 3), "nothing": (0, 0)}[part]
    segments = None if segments is None else jnp.array([segments])
    total, count = attention_kl(*map(jnp.asarray, (zeros, zeros, query, key)), jnp.array([mask]), num_heads=1, segment_ids=segments)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert (float(total), float(count)) == pytest.approx(expected, abs=2e-6)


def test_divergence_is_from_the_teacher_by_hand(attention_kl):
    """With the sides exchanged: 1/3 (2 ln(5/3) + ln(5/9)) + 1/3 (2 ln(11/3) + ln(11/27)) = 0.711496."""
    sides = map(jnp.asarray, (QUERY, KEY, ZEROS, ZEROS))
    assert float(attention_kl(*sides, jnp.ones((1, 3)), num_heads=1)[0]) == pytest.approx(0.711496, abs=2e-6)


@WIDTHS
@MASKS
def test_squares_by_hand(query, key, zeros, mask, segments, part):
    """Scores ln 3 and 2 ln 3 against zeros: 5 (ln 3)^2 = 6.034745, of queries 2 and 3 over key 3."""
    pairs = {"all": (6.034745, 9), "last two": (6.034745, 4), "none": (0, 4), "packed": (6.034745, 5), "nothing": (0, 0)}[part]
    segments = None if segments is None else jnp.array([segments])
    sides = list(map(jnp.asarray, (zeros, zeros, query, key)))
    total, count = losses.attention_mse(*sides, jnp.array([mask]), num_heads=1, segment_ids=segments)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert (float(total), float(count)) == pytest.approx(pairs, abs=4e-6)


def test_each_side_by_its_own_head_size(attention):
    """The same scores from heads of four numbers and of one cost nothing; a common divisor would."""
    sides = map(jnp.asarray, (WIDE_QUERY, WIDE_KEY, QUERY, KEY))
    assert abs(float(attention(*sides, jnp.ones((1, 3)), num_heads=1)[0])) < 1e-6


def test_heads_lie_side_by_side(attention):
    """A student with the teacher's first head and a blind second one misses what the second says, no more."""
    side = jnp.asarray(np.concatenate([QUERY, QUERY], -1)), jnp.asarray(np.concatenate([KEY, KEY], -1))
    student = side[0], jnp.asarray(np.concatenate([KEY, ZEROS], -1))
    total, count = attention(*student, *side, jnp.ones((1, 3)), num_heads=2)
    assert float(total) == pytest.approx(6.034745 if attention is losses.attention_mse else 0.646788, abs=4e-6)
    assert float(count) == (18 if attention is losses.attention_mse else 6)


@pytest.mark.parametrize("first", [0, 5], ids=["padded right", "padded left"])
def test_padding_against_loops(attention, first):
    """NaN and infinity under the padding do not show, and get no gradient."""
    student, teacher = make_sides()
    segments = make_segments(TEXTS, 14, first)
    spoilt = [tuple(spoil_padding(x, segments) for x in side) for side in (student, teacher)]
    value, count, gradients = evaluate(attention, *spoilt, segments)
    expected = by_loops(attention, student, teacher, segments)
    assert_close(value, expected[0] / expected[1])
    assert count == expected[1]
    for ours, clean in zip(gradients, evaluate(attention, student, teacher, segments)[2], strict=True):
        np.testing.assert_array_equal(ours, clean)
        assert not np.any(np.asarray(ours)[segments == 0])


def test_packed_equals_separate(attention):
    student, teacher = make_sides()
    segments = make_segments(PACKED, 14)
    packed = evaluate(attention, student, teacher, segments)
    apart = [tuple(one_text_a_row(x, segments) for x in side) for side in (student, teacher)]
    alone = evaluate(attention, *apart, one_text_a_row(segments, segments))
    assert_close(packed[0], alone[0])
    assert packed[1] == alone[1]
    for ours, reference in zip(packed[2], alone[2], strict=True):
        for i, (row, own) in enumerate(places_of_texts(segments)):
            assert_close(np.asarray(ours)[row, own], np.asarray(reference)[i, : len(own)])


def test_micro_batches_sum_to_the_batch(attention):
    """Of halves with 9 and 5 real tokens."""
    student, teacher = make_sides()
    segments = make_segments([[5], [4], [4], [1]], 14)
    value, count, gradients = evaluate(attention, student, teacher, segments)
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        halves.append(evaluate(attention, *(tuple(x[rows] for x in side) for side in (student, teacher)), segments[rows]))
    assert_close(sum(half[0] * half[1] for half in halves) / count, value)
    assert sum(half[1] for half in halves) == count
    for part, gradient in enumerate(gradients):
        assert_close(jnp.concatenate([half[2][part] * half[1] for half in halves]) / count, gradient)


def test_gradient_against_finite_differences(attention):
    student, teacher = make_sides()
    segments = make_segments(PACKED, 14)
    _, count, gradients = evaluate(attention, student, teacher, segments)
    rng = np.random.default_rng(2)
    for part, gradient in enumerate(np.asarray(x, np.float64) for x in gradients):

        def total(moved, part=part):
            return by_loops(attention, (moved, student[1]) if part == 0 else (student[0], moved), teacher, segments)[0]

        for row in (0, 1, 2) * 4:
            place = (row, rng.integers(13), rng.integers(24))
            reference = finite_difference(total, student[part], place) / float(count)
            assert gradient[place] == pytest.approx(reference, abs=1e-5 * np.abs(gradient).max())


def test_zero_at_equality(attention):
    student, _ = make_sides()
    value, _, gradients = evaluate(attention, student, student, make_segments(TEXTS, 14))
    assert abs(float(value)) < 1e-6 and all(np.abs(x).max() < 1e-6 for x in gradients)


def test_shifted_scores_are_equal_after_the_softmax():
    """A number added to every key moves all scores of a query alike: no KL, but squares."""
    student, _ = make_sides()
    teacher = student[0], student[1] + np.float32(0.5)
    segments = make_segments(TEXTS, 14)
    assert all(abs(float(evaluate(form, student, teacher, segments)[0])) < 1e-6 for form in DIVERGENCES.values())
    assert evaluate(losses.attention_mse, student, teacher, segments)[0] > 0.1


def test_divergence_is_the_query_key_relation(attention_kl):
    """With as many relation heads as attention heads."""
    student, teacher = (jax.tree.map(jnp.asarray, side) for side in make_sides())
    mask = jnp.asarray(make_segments(TEXTS, 14).clip(0, 1))
    relation = losses.relation_kl(student[0], teacher[0], mask, num_relation_heads=HEADS, student_keys=student[1], teacher_keys=teacher[1])
    ours = attention_kl(*student, *teacher, mask, num_heads=HEADS)
    assert_close(ours[0], relation[0])
    assert ours[1] == relation[1]


def test_finite_at_extremes(attention):
    """Scores of 1e4, and a row without tokens."""
    student, teacher = jax.tree.map(lambda x: 100 * x.clip(-2, 2), make_sides())
    segments = make_segments(TEXTS, 14)
    value, _, gradients = evaluate(attention, student, teacher, segments)
    assert_close(value, np.divide(*by_loops(attention, student, teacher, segments)))
    assert all(np.isfinite(x).all() and np.any(x) for x in gradients)


def test_no_gradient_reaches_the_teacher(attention):
    student, teacher = make_sides()
    gradients = jax.jit(jax.grad(lambda teacher: evaluate(attention, student, teacher, jnp.ones((4, 14), jnp.int32))[0]))(teacher)
    assert not any(np.any(x) for x in gradients)


def test_bfloat16_inputs_give_float32_sums(attention):
    sides = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_sides())
    segments = make_segments(TEXTS, 14)
    value, count, gradients = evaluate(attention, *sides, segments)
    assert (value.dtype, count.dtype) == (jnp.float32, jnp.float32)
    exact = evaluate(attention, *jax.tree.map(lambda x: np.asarray(x, np.float32), sides), segments)
    assert_close(value, exact[0], 1e-6)
    for ours, reference in zip(gradients, exact[2], strict=True):
        assert ours.dtype == jnp.bfloat16
        assert_close(np.asarray(ours, np.float32), reference, 1e-2)


def test_nothing_to_count(attention):
    value, count, gradients = evaluate(attention, *make_sides(), np.zeros((4, 14), np.int32))
    assert value == count == 0.0 and not any(np.any(x) for x in gradients)


@pytest.mark.parametrize(("heads", "width"), [(5, 24), (8, 36)])
def test_heads_that_do_not_divide(attention, heads, width):
    student, teacher = jnp.ones((1, 3, 24)), jnp.ones((1, 3, 36))
    with pytest.raises(ValueError, match=f"{heads} relation heads do not divide the hidden size {width}"):
        attention(student, student, teacher, teacher, jnp.ones((1, 3)), num_heads=heads)


@pytest.mark.parametrize("config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"])
def test_eight_devices_equal_one(attention, config):
    student, teacher = make_sides(seed=3, shape=(8, 9, 48, 96))
    segments = make_segments([[9], [4, 5], [2, 2], [1], [0], [3, 3, 3], [7], [8, 1]], 9)
    expected = evaluate(attention, student, teacher, segments, num_heads=8)
    mesh = create_mesh(config)
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), *spec)))  # noqa: E731
    student, teacher = jax.tree.map(lambda x: place(x, None, "tensor"), (student, teacher))
    with jax.set_mesh(mesh):
        value, count, gradients = evaluate(attention, student, teacher, place(segments), num_heads=8)
    assert_close(value, expected[0])
    assert count == expected[1]
    for ours, reference in zip(gradients, expected[2], strict=True):
        assert_close(ours, reference)


@pytest.mark.torch
@pytest.mark.parametrize("texts", [TEXTS, PACKED], ids=["one text a row", "packed"])
def test_against_pytorch(attention, texts):
    """Text by text, without masks, `kl_div` or `mse_loss`, and autograd."""
    import torch

    student, teacher = make_sides(seed=5)
    segments = make_segments(texts, 14)
    ours = evaluate(attention, student, teacher, segments)
    theirs = [torch.tensor(x, requires_grad=True) for x in student]
    total, count = torch.zeros(()), 0
    for row, own in places_of_texts(segments):
        scores = []
        for side in (theirs, [torch.tensor(x) for x in teacher]):
            query, key = (torch.stack(x[row, torch.tensor(own)].chunk(HEADS, dim=-1)) for x in side)
            scores.append(query @ key.mT / query.shape[-1] ** 0.5)
        if attention is losses.attention_mse:
            total = total + torch.nn.functional.mse_loss(*scores, reduction="sum")
            count += scores[0].numel()
        else:
            logs = [torch.log_softmax(x, dim=-1) for x in scores]
            total = total + torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
            count += HEADS * len(own)
    (total / count).backward()
    assert ours[1] == count
    assert_close(ours[0], (total / count).detach().numpy(), 1e-6)
    for gradient, reference in zip(ours[2], theirs, strict=True):
        assert_close(gradient, reference.grad.numpy(), 1e-6)
