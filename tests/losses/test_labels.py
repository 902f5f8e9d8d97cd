"""Losses on the logits of a classification head: by hand, against PyTorch, the temperature, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses

label_kl, label_cross_entropy, label_mse = map(jax.jit, (losses.label_kl, losses.label_cross_entropy, losses.label_mse))
# The teacher says 3/4 and 1/4, the student halves; and a second row on which they agree.
PEAKED = jnp.array([[np.log(3), 0], [0, 0]], jnp.float32)
UNIFORM = jnp.zeros((2, 2))
BOTH = jnp.ones(2, jnp.int32)


def draw(rows=6, classes=3, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    student, teacher = (jnp.asarray(rng.normal(0, scale, (rows, classes)), jnp.float32) for _ in range(2))
    return student, teacher, jnp.asarray(rng.integers(0, classes, rows), jnp.int32)


# name -> (value of the student's logits, another array, mask); the other array is the labels for the cross entropy
CALLS = {
    "label_kl": lambda student, teacher, labels, mask: label_kl(student, teacher, mask, temperature=2.0),
    "label_cross_entropy": lambda student, teacher, labels, mask: label_cross_entropy(student, labels, mask),
    "label_mse": lambda student, teacher, labels, mask: label_mse(student, teacher, mask),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_kl_by_hand():
    """3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; twice the logits at T = 2: 4 x that; the sides exchanged: 1/2 ln(4/3) = 0.143841."""
    total, count = label_kl(UNIFORM, PEAKED, BOTH)
    assert (total.dtype, count.dtype, total.shape, count.shape) == (jnp.float32, jnp.float32, (), ())
    assert float(total) == pytest.approx(0.130812, abs=1e-6) and float(count) == 2.0
    assert float(label_kl(UNIFORM, 2 * PEAKED, BOTH, temperature=2.0)[0]) == pytest.approx(0.523248, abs=1e-6)
    assert float(label_kl(PEAKED, UNIFORM, BOTH)[0]) == pytest.approx(0.143841, abs=1e-6)


def test_cross_entropy_by_hand():
    """-ln(1/4) for the class that is not said, -ln(1/2) in the row of halves."""
    total, count = label_cross_entropy(PEAKED, jnp.array([1, 0]), BOTH)
    assert float(total) == pytest.approx(1.386294 + 0.693147, abs=1e-6) and float(count) == 2.0


def test_mse_by_hand():
    """(1 - 3)² + (2 - 2)² + 5² over two rows of two; of a regression the squares over the rows."""
    total, count = label_mse(jnp.array([[1.0, 2.0], [0.0, 5.0]]), jnp.array([[3.0, 2.0], [0.0, 0.0]]), BOTH)
    assert (float(total), float(count)) == (29.0, 4.0)
    total, count = label_mse(jnp.array([[1.0], [4.5]]), jnp.array([[3.0], [4.0]]), BOTH)
    assert (float(total), float(count)) == (4.25, 2.0)


def test_rows_that_fill_a_batch_up_count_for_nothing(call):
    """Whatever is in them, a NaN included, in value and gradient."""
    student, teacher, labels = draw()
    mask = jnp.array([1, 0, 1, 1, 0, 1])
    kept = np.flatnonzero(mask)
    alone = call(student[kept], teacher[kept], labels[kept], jnp.ones(4, jnp.int32))
    gaps = (mask == 0)[:, None]
    dirty = [jnp.where(gaps, jnp.nan, x) for x in (student, teacher)]
    labels = jnp.where(gaps[:, 0], 99, labels)
    np.testing.assert_allclose(call(*dirty, labels, mask), alone, rtol=1e-6)
    gradient = jax.grad(lambda x: call(x, dirty[1], labels, mask)[0])(dirty[0])
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[np.asarray(gaps[:, 0])].any() and np.asarray(gradient).any()
    nothing = call(*dirty, labels, jnp.zeros(6, jnp.int32))
    assert [float(x) for x in nothing] == [0.0, 0.0]


def test_the_teacher_gets_no_gradient():
    student, teacher, _ = draw()
    for loss in (label_kl, label_mse):
        assert not np.asarray(jax.grad(lambda t, loss=loss: loss(student, t, jnp.ones(6))[0])(teacher)).any()


def test_zero_where_student_and_teacher_agree():
    _, teacher, _ = draw()
    for loss in (label_kl, label_mse):
        value, gradient = jax.value_and_grad(lambda s, loss=loss: loss(s, teacher, jnp.ones(6))[0])(teacher)
        assert float(value) == pytest.approx(0.0, abs=1e-6) and np.abs(gradient).max() < 1e-6


def test_kl_ignores_a_constant_and_the_mse_does_not():
    student, teacher, _ = draw()
    shifted = teacher + jnp.arange(6.0)[:, None]
    np.testing.assert_allclose(label_kl(student, shifted, jnp.ones(6))[0], label_kl(student, teacher, jnp.ones(6))[0], rtol=1e-5)
    assert float(label_mse(student, shifted, jnp.ones(6))[0]) != pytest.approx(float(label_mse(student, teacher, jnp.ones(6))[0]), rel=0.1)


@pytest.mark.parametrize("label", [3, -1, -100, 1000])
def test_a_label_outside_of_the_classes_shows(label):
    student, _, labels = draw()
    assert np.isnan(label_cross_entropy(student, labels.at[2].set(label), jnp.ones(6))[0])


def test_extreme_logits_stay_finite():
    """Teacher and student sure of different classes: KL and cross entropy are the difference of the logits."""
    student, teacher = jnp.array([[1e4, -1e4]]), jnp.array([[-1e4, 1e4]])
    for total, expected in (
        (label_kl(student, teacher, jnp.ones(1))[0], 2e4),
        (label_cross_entropy(student, jnp.array([1]), jnp.ones(1))[0], 2e4),
        (label_mse(student, teacher, jnp.ones(1))[0], 8e8),
    ):
        assert float(total) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(jax.grad(lambda s: label_kl(s, teacher, jnp.ones(1))[0])(student)).all()


def test_bfloat16_is_reduced_in_float32(call):
    student, teacher, labels = draw()
    low = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    found = call(*low, labels, jnp.ones(6, jnp.int32))
    assert found[0].dtype == jnp.float32
    np.testing.assert_allclose(found, call(*(x.astype(jnp.float32) for x in low), labels, jnp.ones(6, jnp.int32)), rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_against_pytorch(temperature):
    """Values and gradients of torch.nn.functional, in float64."""
    import torch
    import torch.nn.functional as F

    arrays = draw()
    student, teacher, labels = (torch.tensor(np.asarray(x, np.float64 if i < 2 else np.int64)) for i, x in enumerate(arrays))
    student.requires_grad_()
    log, other = (F.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    reference = {
        "label_kl": F.kl_div(log, other, log_target=True, reduction="sum") * temperature**2,
        "label_cross_entropy": F.cross_entropy(student, labels, reduction="sum"),
        "label_mse": F.mse_loss(student, teacher, reduction="sum"),
    }
    ours = {
        "label_kl": lambda s: label_kl(s, arrays[1], jnp.ones(6), temperature=temperature)[0],
        "label_cross_entropy": lambda s: label_cross_entropy(s, arrays[2], jnp.ones(6))[0],
        "label_mse": lambda s: label_mse(s, arrays[1], jnp.ones(6))[0],
    }
    for name, loss in ours.items():
        value, gradient = jax.value_and_grad(loss)(arrays[0])
        (expected,) = torch.autograd.grad(reference[name], student, retain_graph=True)
        np.testing.assert_allclose(value, reference[name].item(), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
