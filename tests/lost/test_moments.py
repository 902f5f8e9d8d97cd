"""CKA from sums over batches, against the formula on all vectors at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.agreement import linear_cka
from jaxdistill.lost.moments import batch_moments, cka, debiased_cka, group_sums, merged

LENGTHS = (5, 9, 2, 7, 1, 9, 4)


def vectors(seed=0, dims=(6, 4), layers=(3, 2), offset=30.0):
    """x [7, 9, 3, 6], y [7, 9, 2, 4], which share directions, far from 0; under the padding stands what would ruin any sum."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(9)[None] < np.array(LENGTHS)[:, None]).astype(np.int32)
    common = rng.normal(size=(7, 9, 1, 4))
    x, y = (
        (common @ rng.normal(size=(count, 4, dim)).transpose(1, 0, 2).reshape(4, -1)).reshape(7, 9, count, dim)
        + rng.normal(size=(7, 9, count, dim))
        + offset
        for count, dim in zip(layers, dims, strict=True)
    )
    x[mask == 0], y[mask == 0] = 1e9, np.nan
    return x.astype(np.float32), y.astype(np.float32), mask


def streamed(x, y, mask, splits):
    total = None
    for rows in np.split(np.arange(len(x)), splits):
        own = batch_moments(*(jnp.asarray(each[rows]) for each in (x, y, mask)))
        total = own if total is None else merged(total, own)
    return np.asarray(cka(total))


@pytest.mark.parametrize("splits", [[], [3], [1, 4, 5]])
def test_streaming_equals_in_one_go(splits):
    x, y, mask = vectors()
    real = mask > 0
    expected = [[linear_cka(x[real][:, i], y[real][:, j]) for j in range(2)] for i in range(3)]
    assert 0.02 < np.min(expected) < np.max(expected) < 0.98
    np.testing.assert_allclose(streamed(x, y, mask, splits), expected, rtol=2e-5)


def test_rows_of_padding_count_nothing():
    x, y, mask = vectors()
    more = [np.concatenate([each, np.full_like(each[:2], fill)]) for each, fill in ((x, 7.0), (y, -3.0), (mask, 0))]
    np.testing.assert_allclose(streamed(*more, [7]), streamed(x, y, mask, []), rtol=1e-6)


def test_rotation_and_scale_are_no_difference():
    x, _, mask = vectors(layers=(2, 2))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0].astype(np.float32)
    np.testing.assert_allclose(np.diag(streamed(x, 3 * x @ rotation, mask, [2])), 1.0, rtol=1e-5)


def hsic(x, y):
    """Song et al. 2012, eq. 5, with the Gram matrices."""
    n = len(x)
    k, kl = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(kl, 0)
    ones = np.ones(n)
    value = np.trace(k @ kl) + (ones @ k @ ones) * (ones @ kl @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * ones @ k @ kl @ ones
    return value / (n * (n - 3))


def debiased(x, y, mask, splits):
    total = None
    for rows in np.split(np.arange(len(x)), splits):
        own = group_sums(x[rows], y[rows], mask[rows])
        total = own if total is None else {p: {k: total[p][k] + own[p][k] for k in own[p]} for p in own}
    return debiased_cka(total)


def test_debiased_cka_against_gram_matrices():
    x, y, mask = vectors(offset=0.3)
    a, b = (each[mask > 0][:, 0].astype(np.float64) for each in (x, y))
    expected = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert 0.05 < expected < 0.95
    assert debiased(x[:, :, 0], y[:, :, 0], mask, [2, 5]) == pytest.approx(expected, rel=1e-4)
    assert debiased(x[:, :, 0] + 0.5, y[:, :, 0], mask, [2, 5]) == pytest.approx(expected, rel=1e-3)  # no matter around what
    assert debiased(x[:, :, 0], 2 * x[:, :, 0], mask, []) == pytest.approx(1.0, rel=1e-5)


def test_few_tokens_of_many_dimensions():
    """Of unrelated vectors the plain estimate says 0.8, the debiased one nothing."""
    rng = np.random.default_rng(3)
    mask, found, plain = np.ones((1, 12), np.int32), [], []
    for _ in range(30):
        x, y = rng.normal(size=(2, 1, 12, 48)).astype(np.float32)
        found.append(debiased(x, y, mask, []))
        plain.append(linear_cka(x[0], y[0]))
    assert np.mean(plain) > 0.7
    assert abs(np.mean(found)) < 0.03


def test_nothing_to_say():
    x, y, mask = vectors(offset=0.0)
    assert debiased(x[:, :, 0], y[:, :, 0], mask * (np.arange(7) == 2)[:, None], []) is None  # 2 tokens
    assert debiased(np.where(mask[..., None] > 0, 0.0, x[:, :, 0]).astype(np.float32), y[:, :, 0], mask, []) is None
