"""Losses on the logits: by hand, against loops and PyTorch, the temperature, and what they must not depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import make_segments, make_vectors

from jaxdistill import losses
from jaxdistill.config import MeshConfig
from jaxdistill.sharding import create_mesh


def hard_labels(student, teacher, mask, *, temperature=1.0):
    """The counted tokens are the ones to predict, and the teacher's first choice is the label: both losses from the same arrays."""
    return losses.mlm_cross_entropy(student, jnp.where(mask != 0, jnp.argmax(teacher, axis=-1).astype(jnp.int32), -100))


LOSSES = {"output_kl": losses.output_kl, "mlm_cross_entropy": hard_labels}
TEMPERATURES = {"output_kl": 2.0, "mlm_cross_entropy": 1.0}


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


output_kl, mlm_cross_entropy = jax.jit(losses.output_kl), jax.jit(losses.mlm_cross_entropy)


# Most tests share the shape 4 x 14 x 24, and with it the compiled program.
@partial(jax.jit, static_argnums=0)
def evaluate(loss, student, teacher, mask, temperature):
    """(value, count, gradient of the value with respect to the student)."""

    def value(student):
        total, count = loss(student, teacher, mask.astype(jnp.int32), temperature=temperature)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradient = jax.value_and_grad(value, has_aux=True)(student)
    return value, count, gradient


def by_loops(name, student, teacher, mask, temperature=1.0) -> tuple[float, int]:
    """(sum, count) in float64, token by token."""
    total = 0.0
    for place in zip(*np.nonzero(mask), strict=True):
        logs = []
        for logits in (teacher, student):
            own = np.asarray(logits, np.float64)[place] / temperature
            logs.append(own - own.max() - np.log(np.exp(own - own.max()).sum()))
        if name == "output_kl":
            total += temperature**2 * np.sum(np.exp(logs[0]) * (logs[0] - logs[1]))
        else:
            total -= logs[1][np.argmax(logs[0])]
    return total, int(np.count_nonzero(mask))


def assert_close(ours, reference, tolerance=1e-5):
    reference = np.asarray(reference)
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance * max(np.abs(reference).max(), 1e-12), equal_nan=False)


TEXTS = [[9], [4], [0], [1]]
# A vocabulary of two: the teacher says 3/4 and 1/4 at the first temperature, the student halves.
PEAKED = np.array([[[np.log(3), 0], [0, 0]]], np.float32)
UNIFORM = np.zeros((1, 2, 2), np.float32)


@pytest.mark.parametrize("temperature", [1.0, jnp.float32(1.0)], ids=["float", "array"])
def test_kl_by_hand(temperature):
    """3/4 ln(3/2) + 1/4 ln(1/2) = 3/4 ln 3 - ln 2 = 0.130812, and nothing for the second token."""
    total, count = losses.output_kl(jnp.asarray(UNIFORM), jnp.asarray(PEAKED), jnp.ones((1, 2)), temperature=temperature)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(0.130812, abs=1e-6) and float(count) == 2.0


def test_kl_temperature_by_hand():
    """Logits twice as large at T = 2 are the same distributions: 4 x 0.130812 = 0.523248."""
    total, _ = output_kl(jnp.asarray(UNIFORM), jnp.asarray(2 * PEAKED), jnp.ones((1, 2)), temperature=2.0)
    assert float(total) == pytest.approx(0.523248, abs=1e-6)


def test_kl_direction_by_hand():
    """With the sides exchanged, 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = 0.143841."""
    total, _ = output_kl(jnp.asarray(PEAKED), jnp.asarray(UNIFORM), jnp.ones((1, 2)))
    assert float(total) == pytest.approx(0.143841, abs=1e-6)


def test_kl_mask_by_hand():
    """Any other number than zero counts once."""
    arrays = jnp.asarray(UNIFORM), jnp.asarray(PEAKED)
    total, count = output_kl(*arrays, jnp.array([[0, 1]]))
    assert float(total) == 0.0 and float(count) == 1.0
    total, count = output_kl(*arrays, jnp.array([[3, 0]]))
    assert float(total) == pytest.approx(0.130812, abs=1e-6) and float(count) == 1.0


def test_cross_entropy_by_hand():
    """-ln(3/4) = 0.287682 for label 0, -ln(1/4) = 1.386294 for label 1; -100 costs nothing, whatever its logits."""
    logits = jnp.array([[[np.log(3), 0], [np.log(3), 0], [5, -5]]], jnp.float32)
    total, count = mlm_cross_entropy(logits, jnp.array([[0, 1, -100]]))
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(0.287682 + 1.386294, abs=1e-6) and float(count) == 2.0


@pytest.mark.parametrize("label", [24, 30522, -1, -101])
def test_label_outside_the_vocabulary_shows(label):
    logits, _ = make_vectors(4, 14, 24, 24)
    labels = np.full((4, 14), -100)
    labels[1, 3] = label
    assert np.isnan(mlm_cross_entropy(logits, labels)[0])


@pytest.mark.parametrize("first", [0, 5], ids=["padded right", "padded left"])
@pytest.mark.parametrize("noise", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_against_loops(name, first, noise):
    """Noise under the padding does not show, and gets no gradient."""
    arrays = make_vectors(4, 14, 24, 24, seed=first)
    mask = make_segments(TEXTS, 14, first) > 0
    total, count = by_loops(name, *arrays, mask, TEMPERATURES[name])
    for logits in arrays:
        logits[~mask] = noise
    value, own_count, gradient = evaluate(LOSSES[name], *arrays, mask, TEMPERATURES[name])
    assert_close(value, total / count)
    assert own_count == count == 14
    assert not np.any(np.asarray(gradient)[~mask]) and np.isfinite(gradient).all()


def test_padding_does_not_matter(name):
    """The same texts in rows of 9, and in rows of 14 on either side: value and gradient."""
    tight = make_vectors(4, 9, 24, 24)
    expected = evaluate(LOSSES[name], *tight, make_segments(TEXTS, 9) > 0, TEMPERATURES[name])
    for first in (0, 5):
        padded = make_vectors(4, 14, 24, 24, seed=1)
        for own, text in zip(padded, tight, strict=True):
            own[:, first : first + 9] = text
        value, count, gradient = evaluate(LOSSES[name], *padded, make_segments(TEXTS, 14, first) > 0, TEMPERATURES[name])
        assert_close(value, expected[0])
        assert count == expected[1]
        assert_close(gradient[:, first : first + 9], expected[2])


def test_zero_at_equality():
    logits, _ = make_vectors(4, 14, 24, 24)
    value, _, gradient = evaluate(losses.output_kl, logits, logits, make_segments(TEXTS, 14) > 0, 2.0)
    assert abs(float(value)) < 1e-6
    assert np.abs(gradient).max() < 1e-6


def test_never_negative():
    student, noise = make_vectors(4, 14, 24, 24)
    value, _, _ = evaluate(losses.output_kl, student, student + 1e-3 * noise, make_segments(TEXTS, 14) > 0, 2.0)
    assert -1e-7 < float(value) < 1e-5


TEMPERED = [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("temperature", TEMPERED)
def test_temperature_keeps_the_size_of_the_gradient(temperature):
    """With every |logit| <= e, the gradient's norm is |d| / V up to a factor 1 +- (exp(4 e / T) - 1), d = student - teacher, centred.

    The gradient of a token is T (p - q), the integral over the way from teacher to student of J d, J = diag(p) - p p^T at
    the logits / T. On that way every p is 1/V up to a factor exp(2 e / T) = 1 + x, so J d = d / V + (p - 1/V) d - p (p . d)
    with a second term below x |d| / V and a third below (1 + x) x |d| / V: together exp(4 e / T) - 1, 2 % at e = 0.005, T = 1.
    """
    size = 0.005
    student, teacher = (np.clip(size / 2 * x, -size, size) for x in make_vectors(4, 14, 24, 24))
    mask = np.ones((4, 14), bool)
    difference = student - teacher
    expected = np.linalg.norm(difference - difference.mean(axis=-1, keepdims=True)) / 24 / mask.size
    gradient = evaluate(losses.output_kl, student, teacher, mask, temperature)[2]
    assert np.linalg.norm(gradient) == pytest.approx(expected, rel=np.expm1(4 * size / temperature))
    # Without T^2 it would fall with 1 / T^2: the same distributions reached by dividing the logits outside.
    plain = evaluate(losses.output_kl, student / temperature, teacher / temperature, mask, 1.0)[2] / temperature
    assert np.linalg.norm(plain) == pytest.approx(expected / temperature**2, rel=np.expm1(4 * size / temperature))


def test_temperature_may_be_traced():
    """One compiled program for every temperature, with the values of the static ones."""
    arrays = *make_vectors(4, 14, 24, 24), np.ones((4, 14))
    traces = []

    @jax.jit
    def kl(temperature):
        traces.append(None)
        return losses.output_kl(*map(jnp.asarray, arrays), temperature=temperature)[0]

    for temperature in TEMPERED:
        assert_close(kl(jnp.float32(temperature)), by_loops("output_kl", *arrays, temperature)[0])
    assert len(traces) == 1


def test_micro_batches_sum_to_the_batch(name):
    """Of halves with 9 and 5 counted tokens: the mean of their means would be another number."""
    arrays = *make_vectors(4, 14, 24, 24), make_segments([[5], [4], [4], [1]], 14) > 0
    value, count, gradient = evaluate(LOSSES[name], *arrays, TEMPERATURES[name])
    halves = [evaluate(LOSSES[name], *(x[rows] for x in arrays), TEMPERATURES[name]) for rows in (slice(0, 2), slice(2, 4))]
    assert_close(sum(half[0] * half[1] for half in halves) / count, value)
    assert sum(half[1] for half in halves) == count
    assert_close(jnp.concatenate([half[2] * half[1] for half in halves]) / count, gradient)


def test_gradient_against_finite_differences(name):
    student, teacher = make_vectors(4, 14, 24, 24)
    mask = make_segments(TEXTS, 14) > 0
    _, count, gradient = evaluate(LOSSES[name], student, teacher, mask, TEMPERATURES[name])
    gradient = np.asarray(gradient, np.float64)
    rng, step = np.random.default_rng(2), 1e-5
    for row in (0, 1, 3) * 8:
        place = (row, rng.integers(mask[row].sum()), rng.integers(24))
        ends = []
        for sign in (1, -1):
            moved = student.astype(np.float64)
            moved[place] += sign * step
            ends.append(by_loops(name, moved, teacher, mask, TEMPERATURES[name])[0])
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step) / float(count), abs=1e-5 * np.abs(gradient).max())


def test_no_gradient_reaches_the_teacher():
    student, teacher = make_vectors(4, 14, 24, 24)
    gradient = jax.jit(jax.grad(lambda t: losses.output_kl(jnp.asarray(student), t, jnp.ones((4, 14)))[0]))(teacher)
    assert gradient.shape == teacher.shape and not np.any(gradient)


def test_bfloat16_inputs_give_float32_sums(name):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make_vectors(4, 14, 24, 24)]
    mask = make_segments(TEXTS, 14) > 0
    value, count, gradient = evaluate(LOSSES[name], *arrays, mask, TEMPERATURES[name])
    assert (value.dtype, count.dtype, gradient.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    # The sums are those of the rounded inputs: nothing after them is rounded.
    exact = evaluate(LOSSES[name], *(np.asarray(x, np.float32) for x in arrays), mask, TEMPERATURES[name])
    assert_close(value, exact[0], 1e-6)
    assert_close(np.asarray(gradient, np.float32), exact[2], 1e-2)


def test_finite_at_large_logits(name):
    """Logits of +-1e4, where most probabilities are 0: finite, and the value still that of float64."""
    arrays = [1e4 * np.sign(x) for x in make_vectors(4, 14, 24, 24)]
    mask = make_segments(TEXTS, 14) > 0
    value, _, gradient = evaluate(LOSSES[name], *arrays, mask, TEMPERATURES[name])
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4
    assert_close(value, np.divide(*by_loops(name, *arrays, mask, TEMPERATURES[name])))


def test_nothing_to_count(name):
    value, count, gradient = evaluate(LOSSES[name], *make_vectors(4, 14, 24, 24), np.zeros((4, 14), bool), TEMPERATURES[name])
    assert value == count == 0.0 and not np.any(gradient)


MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(name, axes):
    """Also with the vocabulary split over the devices."""
    student, teacher = make_vectors(8, 9, 48, 48, seed=3)
    mask = make_segments([[9], [4], [2], [1], [0], [3], [7], [8]], 9).clip(0, 1)
    expected = evaluate(LOSSES[name], student, teacher, mask, TEMPERATURES[name])
    mesh = create_mesh(MESHES[axes])
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    batch = ("data", "fsdp")
    student, teacher = (jax.device_put(x, place(batch, None, "tensor")) for x in (student, teacher))
    with jax.set_mesh(mesh):
        value, count, gradient = evaluate(LOSSES[name], student, teacher, jax.device_put(mask, place(batch)), TEMPERATURES[name])
    assert_close(value, expected[0])
    assert_close(gradient, expected[2])
    assert count == expected[1]
    assert gradient.sharding.is_equivalent_to(student.sharding, 3)


@pytest.mark.torch
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_against_pytorch(temperature):
    """As a PyTorch user would write it: the counted tokens picked out, `kl_div`, and autograd."""
    import torch
    from torch.nn import functional

    student, teacher = make_vectors(4, 14, 24, 24, seed=5)
    mask = make_segments(TEXTS, 14) > 0
    ours = evaluate(losses.output_kl, student, teacher, mask, temperature)
    theirs = torch.tensor(student, requires_grad=True)
    logs = [torch.log_softmax(x[torch.tensor(mask)] / temperature, dim=-1) for x in (theirs, torch.tensor(teacher))]
    value = temperature**2 * functional.kl_div(*logs, reduction="batchmean", log_target=True)
    value.backward()
    assert_close(ours[0], value.detach().numpy(), 1e-6)
    assert_close(ours[2], theirs.grad.numpy(), 1e-6)


@pytest.mark.torch
def test_cross_entropy_against_pytorch():
    import torch
    from torch.nn import functional

    student, teacher = make_vectors(4, 14, 24, 24, seed=5)
    mask = make_segments(TEXTS, 14) > 0
    ours = evaluate(hard_labels, student, teacher, mask, 1.0)
    theirs = torch.tensor(student, requires_grad=True)
    labels = torch.tensor(np.where(mask, teacher.argmax(axis=-1), -100))
    value = functional.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    value.backward()
    assert_close(ours[0], value.detach().numpy(), 1e-6)
    assert_close(ours[2], theirs.grad.numpy(), 1e-6)
