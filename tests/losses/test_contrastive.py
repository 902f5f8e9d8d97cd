"""The contrastive loss: by hand, against loops and PyTorch, its negatives, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.config import MeshConfig
from jaxdistill.losses import hidden_contrastive
from jaxdistill.sharding import create_mesh

TEMPERATURE = 0.07
# Cosines of 1 and 0 become the weights 3 and 1.
THREE = 1 / np.log(3).item()


contrast = jax.jit(hidden_contrastive)


# Most tests share the shapes 16 x 24 with 5 more negatives, and with them the compiled program.
@jax.jit
def evaluate(student, teacher, negatives, mask, negatives_mask, temperature=TEMPERATURE):
    """(value, count, gradients of the value with respect to the student, the teacher and the negatives)."""

    def value(student, teacher, negatives):
        total, count = hidden_contrastive(
            student, teacher, temperature=temperature, mask=mask.astype(jnp.int32), negatives=negatives, negatives_mask=negatives_mask
        )
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(student, teacher, negatives)
    return value, count, gradients


def by_loops(student, teacher, negatives, mask, negatives_mask, temperature=TEMPERATURE) -> tuple[float, int]:
    """(sum, count) in float64, row by row."""
    student, teacher, negatives = (
        np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True) for x in (student, teacher, negatives)
    )
    total = 0.0
    for row in np.nonzero(mask)[0]:
        others = [*teacher[np.nonzero(mask)[0]], *negatives[np.nonzero(negatives_mask)[0]]]
        scores = np.array([student[row] @ other for other in others]) / temperature
        total += np.log(np.exp(scores).sum()) - student[row] @ teacher[row] / temperature
    return total, int(np.count_nonzero(mask))


def make_rows(batch: int = 16, width: int = 24, more: int = 5, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(student, teacher, negatives); the student near the teacher, so that neither wins nor loses everywhere."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0, 1, (batch, width))
    student = 0.2 * teacher + rng.normal(0, 1, (batch, width))
    return tuple(x.astype(np.float32) for x in (student, teacher, rng.normal(0, 1, (more, width))))


MASK = np.arange(16) % 5 != 3
FILLED = np.array([1, 0, 1, 1, 0])


def assert_close(ours, reference, tolerance=1e-5):
    reference = np.asarray(reference)
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance * max(np.abs(reference).max(), 1e-12), equal_nan=False)


@pytest.mark.parametrize("temperature", [THREE, jnp.float32(THREE)], ids=["float", "array"])
def test_two_rows_by_hand(temperature):
    """Each row has weight 3 for its own text and 1 for the other: 2 ln(4/3) = 0.575364. Lengths do not matter."""
    student, teacher = jnp.array([[1.0, 0.0], [0.0, 7.0]]), jnp.array([[0.1, 0.0], [0.0, 2.0]])
    total, count = hidden_contrastive(student, teacher, temperature=temperature)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(0.575364, abs=1e-6) and float(count) == 2.0


def test_direction_by_hand():
    """The sum is over the teacher's vectors: 3/4 and 1/4 for two equal students, 3/6 and 1/2 for two equal teachers."""
    different, equal = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    assert float(contrast(equal, different, temperature=THREE)[0]) == pytest.approx(np.log(4 / 3) + np.log(4), abs=1e-6)
    assert float(contrast(different, equal, temperature=THREE)[0]) == pytest.approx(2 * np.log(2), abs=1e-6)


@pytest.mark.parametrize("filled", [None, jnp.array([1, 0])], ids=["one negative", "one of two"])
def test_negatives_by_hand(filled):
    """A negative like the first text: 3 / (3 + 1 + 3) and 3 / (1 + 3 + 1), so ln(7/3) + ln(5/3) = 1.358123."""
    rows = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    negatives = jnp.array([[5.0, 0.0], [0.0, 1.0]])[: 1 if filled is None else 2]
    total, count = contrast(rows, rows, temperature=THREE, negatives=negatives, negatives_mask=filled)
    assert float(total) == pytest.approx(1.358123, abs=1e-6) and float(count) == 2.0


def test_mask_by_hand():
    """A row that does not count is nobody's negative: the two others cost what they cost alone, 2 ln(4/3)."""
    rows = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    total, count = contrast(rows, rows, temperature=THREE, mask=jnp.array([1, 0, 1]))
    assert float(total) == pytest.approx(0.575364, abs=1e-6) and float(count) == 2.0


def test_one_text_alone():
    """Nothing to tell it from."""
    student, teacher, _ = make_rows(1)
    assert float(contrast(jnp.asarray(student), jnp.asarray(teacher), temperature=TEMPERATURE)[0]) == 0.0


@pytest.mark.parametrize("noise", [np.nan, np.inf, 1e30, 0.0])
def test_masked_rows_against_loops(noise):
    """Whatever lies in the rows that do not count, and in empty places of the bank: no value, no gradient."""
    arrays = make_rows()
    total, count = by_loops(*arrays, MASK, FILLED)
    expected = evaluate(*arrays, MASK, FILLED)
    # New arrays: a computation that is still under way may read the old ones.
    rows = zip(arrays, (MASK, MASK, FILLED > 0), strict=True)
    noisy = [np.where(counted[:, None], array, np.float32(noise)) for array, counted in rows]
    value, own_count, gradients = evaluate(*noisy, MASK, FILLED)
    assert_close(value, total / count)
    assert own_count == count == 13
    for gradient, reference, counted in zip(gradients, expected[2], (MASK, MASK, FILLED > 0), strict=True):
        assert not np.any(np.asarray(gradient)[~counted]) and np.any(gradient)
        assert_close(gradient, reference)


def test_masks_default_to_all():
    student, teacher, negatives = map(jnp.asarray, make_rows())
    expected = evaluate(student, teacher, negatives, np.ones(16, bool), np.ones(5, int))
    total, count = contrast(student, teacher, temperature=TEMPERATURE, negatives=negatives)
    assert_close(total / count, expected[0])
    assert count == expected[1] == 16.0


def test_without_a_bank_equals_an_empty_one():
    student, teacher, negatives = map(jnp.asarray, make_rows())
    expected = evaluate(student, teacher, negatives, MASK, np.zeros(5, int))
    total, count = contrast(student, teacher, temperature=TEMPERATURE, mask=jnp.asarray(MASK, jnp.int32))
    assert_close(total / count, expected[0])
    assert not np.any(expected[2][2])


def test_the_other_texts_of_the_batch_are_the_negatives():
    """Halves add up to the batch when each has the teacher's vectors of the other half as negatives, and not without."""
    student, teacher, _ = make_rows()
    value, _, gradients = evaluate(student, teacher, np.ones((8, 24), np.float32), np.ones(16, bool), np.zeros(8, int))
    halves = [slice(0, 8), slice(8, 16)]
    both_ways = halves, halves[::-1]
    parts = [evaluate(student[own], teacher[own], teacher[other], np.ones(8, bool), np.ones(8, int)) for own, other in both_ways]
    assert_close((parts[0][0] + parts[1][0]) / 2, value)
    assert_close(jnp.concatenate([part[2][0] for part in parts]) / 2, gradients[0])
    assert_close(jnp.concatenate([parts[0][2][1] + parts[1][2][2], parts[1][2][1] + parts[0][2][2]]) / 2, gradients[1])
    alone = [evaluate(student[own], teacher[own], teacher[own], np.ones(8, bool), np.zeros(8, int))[0] for own in halves]
    assert sum(alone) / 2 < value - 0.1


def test_lengths_do_not_matter():
    """Rows of 1e30 or 1e-27 are what rows of length 1 are."""
    arrays = make_rows()
    expected = evaluate(*arrays, MASK, FILLED)
    for exponents in ((100, -90, 110), (-90, 100, 0)):
        scaled = (x * np.float32(2.0**exponent) for x, exponent in zip(arrays, exponents, strict=True))
        value, _, gradients = evaluate(*scaled, MASK, FILLED)
        assert_close(value, expected[0])
        for gradient, reference, exponent in zip(gradients, expected[2], exponents, strict=True):
            assert_close(np.asarray(gradient).astype(np.float64) * 2.0**exponent, reference)


def test_finite_for_zero_vectors():
    """Cosine 0 with every vector; a text of zeros costs the logarithm of the weights."""
    arrays = make_rows()
    for array in arrays:
        array[:3] = 0.0
    value, _, gradients = evaluate(*arrays, MASK, FILLED)
    assert np.isfinite(value) and all(np.isfinite(gradient).all() and np.any(gradient) for gradient in gradients)
    assert not np.any(np.asarray(gradients[0])[:3])
    everything_zero = evaluate(*map(np.zeros_like, arrays), MASK, FILLED)
    assert_close(everything_zero[0], np.log(13 + 3))


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_finite_at_any_temperature(temperature):
    """Scores of +-1e4 and of 1e-4; at the hot end every candidate is as likely."""
    arrays = make_rows()
    value, _, gradients = evaluate(*arrays, MASK, FILLED, temperature)
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)
    assert temperature < 1 or float(value) == pytest.approx(np.log(13 + 3), abs=1e-3)


def test_gradients_against_finite_differences():
    arrays = make_rows()
    _, count, gradients = evaluate(*arrays, MASK, FILLED)
    rng, step = np.random.default_rng(2), 1e-5
    for i, gradient in enumerate(np.asarray(g, np.float64) for g in gradients):
        for _ in range(16):
            place = tuple(rng.integers(size) for size in gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in arrays]
                moved[i][place] += sign * step
                ends.append(by_loops(*moved, MASK, FILLED)[0])
            assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step) / float(count), abs=1e-5 * np.abs(gradient).max())


def test_bfloat16_inputs_give_float32_sums():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make_rows()]
    value, count, gradients = evaluate(*arrays, MASK, FILLED)
    assert (value.dtype, count.dtype, gradients[0].dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    # The sums are those of the rounded inputs: nothing after them is rounded.
    exact = evaluate(*(np.asarray(x, np.float32) for x in arrays), MASK, FILLED)
    assert_close(value, exact[0], 1e-6)
    for gradient, reference in zip(gradients, exact[2], strict=True):
        assert_close(np.asarray(gradient, np.float32), reference, 1e-2)


def test_nothing_to_count():
    value, count, gradients = evaluate(*make_rows(), np.zeros(16, bool), FILLED)
    assert value == count == 0.0 and not any(np.any(gradient) for gradient in gradients)


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(axes):
    """Two rows a device: the negatives are still the 13 of the global batch."""
    arrays = make_rows()
    expected = evaluate(*arrays, MASK, FILLED)
    mesh = create_mesh(MESHES[axes])
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    batch = ("data", "fsdp")
    student, teacher = (jax.device_put(x, place(batch, "tensor")) for x in arrays[:2])
    with jax.set_mesh(mesh):
        value, count, gradients = evaluate(student, teacher, jax.device_put(arrays[2], place()), jax.device_put(MASK, place(batch)), FILLED)
    assert_close(value, expected[0])
    jax.tree.map(assert_close, gradients, expected[2])
    assert count == expected[1]
    assert gradients[0].sharding.is_equivalent_to(student.sharding, 2)


@pytest.mark.torch
def test_against_pytorch():
    """As a PyTorch user would write it: `normalize`, and `cross_entropy` with the row's own number as the label."""
    import torch
    from torch.nn import functional

    arrays = make_rows(seed=5)
    ours = evaluate(*arrays, MASK, FILLED)
    theirs = [torch.tensor(x, requires_grad=True) for x in arrays]
    picked = (functional.normalize(x[torch.tensor(own)], dim=-1) for x, own in zip(theirs, (MASK, MASK, FILLED > 0), strict=True))
    student, teacher, negatives = picked
    value = functional.cross_entropy(student @ torch.cat([teacher, negatives]).T / TEMPERATURE, torch.arange(len(student)))
    value.backward()
    assert_close(ours[0], value.detach().numpy(), 1e-6)
    for gradient, reference in zip(ours[2], theirs, strict=True):
        assert_close(gradient, reference.grad.numpy(), 1e-6)
