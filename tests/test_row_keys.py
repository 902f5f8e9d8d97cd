"""The mask is a pure function of (key, row, site): how often it drops, and what it must not depend on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params, tiny_config, tiny_rows

from jaxdistill.features import Feature
from jaxdistill.models import forward
from jaxdistill.row_keys import RowKeys

RATE, PLACES = 0.1, 4096


@partial(jax.jit, static_argnames=("rate", "sites", "shape"))
def masks(seed, rows, *, rate=RATE, sites=1, shape=(PLACES,)) -> jax.Array:
    """[site, row, ...]: what dropout makes of ones."""
    keys = RowKeys.create(jax.random.key(seed), rows)
    return jnp.stack([keys.dropout(jnp.ones((rows.shape[0], *shape)), rate) for _ in range(sites)])


def rows(*numbers) -> jax.Array:
    return jnp.asarray(numbers, jnp.uint32)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """[key, site, row, place], 1 where an element is kept."""
    return np.stack([np.asarray(masks(seed, jnp.arange(16, dtype=jnp.uint32), sites=4)) for seed in range(3)]) > 0


def test_rate(sample):
    """Within 4 standard deviations overall, within 5 for each (key, site, row)."""
    spread = (RATE * (1 - RATE)) ** 0.5
    assert abs(1 - sample.mean() - RATE) < 4 * spread / sample.size**0.5
    assert np.abs(1 - sample.mean(axis=-1) - RATE).max() < 5 * spread / PLACES**0.5


def test_each_place_is_dropped_as_often(sample):
    per_place = 1 - sample.reshape(-1, PLACES).mean(axis=0)
    draws = sample.size // PLACES
    assert np.abs(per_place - RATE).max() < 6 * (RATE * (1 - RATE) / draws) ** 0.5
    assert abs(per_place.var() / (RATE * (1 - RATE) / draws) - 1) < 0.2


def test_keys_sites_and_rows_are_uncorrelated(sample):
    correlations = np.corrcoef(sample.reshape(-1, PLACES)) - np.eye(sample.size // PLACES)
    assert np.abs(correlations).max() < 6 / PLACES**0.5  # 18 thousand pairs: 5 deviations are reached by chance


@pytest.mark.parametrize("shift", [1, 2, 16, 64, 512])
def test_neighbours_in_a_row_are_uncorrelated(sample, shift):
    centred = sample - sample.mean()
    product = (centred[..., shift:] * centred[..., :-shift]).mean() / centred.var()
    assert abs(product) < 5 / (sample.size - shift) ** 0.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_expectation(rate):
    values = np.asarray(masks(7, jnp.arange(16, dtype=jnp.uint32), rate=rate))
    kept = values[values > 0]
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)
    assert abs(values.mean() - 1) < 4 * (rate / (1 - rate) / values.size) ** 0.5


def test_pure_function_of_key_row_and_site():
    whole = masks(3, rows(0, 1, 2, 3, 4), sites=2)
    assert np.array_equal(whole, masks(3, rows(0, 1, 2, 3, 4), sites=2))
    assert np.array_equal(whole[:, [3, 1]], masks(3, rows(3, 1), sites=2))  # wherever and beside whomever the row lies
    assert np.array_equal(whole[:1], masks(3, rows(0, 1, 2, 3, 4), sites=1))
    assert not np.array_equal(whole, masks(4, rows(0, 1, 2, 3, 4), sites=2))
    assert not np.array_equal(whole[0], whole[1]) and not np.array_equal(whole[:, 0], whole[:, 1])


def test_large_row_numbers():
    values = masks(0, rows(0, 2**31, 2**32 - 1))
    assert len({np.asarray(row).tobytes() for row in values[0]}) == 3


def test_shape_only_orders_the_places():
    flat, square = masks(5, rows(1, 2)), masks(5, rows(1, 2), shape=(4, 32, 32))
    assert np.array_equal(flat.reshape(square.shape), square)


def test_rate_of_zero_leaves_the_array_and_counts_as_a_site():
    keys = RowKeys.create(jax.random.key(3), rows(0, 1))
    x = jnp.ones((2, PLACES))
    assert keys.dropout(x, 0.0) is x
    assert np.array_equal(keys.dropout(x, RATE), masks(3, rows(0, 1), sites=2)[1])


def test_type_is_kept():
    keys = RowKeys.create(jax.random.key(0), rows(0))
    dropped = keys.dropout(jnp.ones((1, 64), jnp.bfloat16), 0.5)
    assert dropped.dtype == jnp.bfloat16 and set(np.asarray(dropped, np.float32).ravel()) == {0.0, 2.0}


def test_bits_are_uniform_words():
    keys = RowKeys.create(jax.random.key(1), rows(0, 1, 2, 3))
    words = np.stack([np.asarray(keys.bits((4, 64, 64))) for _ in range(4)])
    assert words.dtype == np.uint32 and keys.site == 4
    assert len(np.unique(words)) > words.size - 10  # of 2^16 words among 2^32, half a pair is equal
    for bit in range(32):
        assert abs((words >> np.uint32(bit) & np.uint32(1)).mean() - 0.5) < 4 * 0.5 / words.size**0.5


def test_dropout_keeps_the_large_words():
    bits = RowKeys.create(jax.random.key(3), rows(0, 1)).bits((2, PLACES))
    assert np.array_equal(np.asarray(masks(3, rows(0, 1)))[0] > 0, np.asarray(bits) >= np.uint32(round(RATE * 2**32)))


CONFIG = tiny_config(num_layers=2, hidden_dropout=0.1, attention_dropout=0.2)
PARAMS = random_params(CONFIG)
IDS, MASK = tiny_rows(CONFIG, ((0, 10),) * 8, 10)


@partial(jax.jit, static_argnums=0)
def last_hidden(config, seed, numbers, ids, mask):
    keys = RowKeys.create(jax.random.key(seed), numbers)
    output = forward(config, PARAMS, ids, mask, features=frozenset({Feature("hidden", 2)}), dropout=keys)
    assert keys.site == 1 + 2 * 3  # after the embeddings; in each block on the weights, the attention's output and the block's
    return output.hidden[2]


@pytest.fixture(scope="module")
def dropped():
    return last_hidden(CONFIG, 0, jnp.arange(8, dtype=jnp.uint32), IDS, MASK)


def test_micro_batches_do_not_change_an_encoder(dropped):
    halves = [last_hidden(CONFIG, 0, jnp.arange(i, i + 4, dtype=jnp.uint32), IDS[i : i + 4], MASK[i : i + 4]) for i in (0, 4)]
    np.testing.assert_allclose(jnp.concatenate(halves), dropped, rtol=1e-5, atol=1e-5)


def test_an_encoder_drops(dropped):
    without = jax.jit(partial(forward, CONFIG, features=frozenset({Feature("hidden", 2)})))
    exact = without(PARAMS, IDS, MASK).hidden[2]
    other = last_hidden(CONFIG, 1, jnp.arange(8, dtype=jnp.uint32), IDS, MASK)
    for a, b in ((exact, dropped), (exact, other), (dropped, other)):
        assert jnp.abs(a - b).mean() > 0.05
    off = tiny_config(num_layers=2, hidden_dropout=0.0, attention_dropout=0.0)
    np.testing.assert_allclose(last_hidden(off, 0, jnp.arange(8, dtype=jnp.uint32), IDS, MASK), exact, rtol=1e-5, atol=1e-5)
