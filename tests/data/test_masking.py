"""BERT's masking: its shares, whom it spares, and that a row's draw depends on its key alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data import NOT_PREDICTED, Masking, mask_tokens
from jaxdistill.errors import InputError
from jaxdistill.row_keys import RowKeys

ROWS, LENGTH = 512, 512
CLS, SEP, PAD, MASK = 101, 102, 0, 103
BERT = Masking(rate=0.15, mask=0.8, random=0.1, mask_id=MASK, special_ids=(PAD, CLS, SEP, MASK), vocab_size=30522)


@partial(jax.jit, static_argnames="masking")
def draw(ids, segments, seed=0, first_row=0, *, masking=BERT):
    rows = jnp.asarray(first_row, jnp.uint32) + jnp.arange(ids.shape[0], dtype=jnp.uint32)
    return mask_tokens(RowKeys.create(jax.random.key(seed), rows), ids, segments, masking)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, segment_ids) [B, S]: CLS, text, SEP, text, SEP as two segments, and padding of 0 to 100 places."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, BERT.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 0], ids[:, 200] = CLS, SEP
    place, length = np.arange(LENGTH), LENGTH - rng.integers(0, 101, (ROWS, 1))
    ids = np.where(place == length - 1, SEP, ids).astype(np.int32)
    segments = np.where(place < length, 1 + (place > 200), 0).astype(np.int32)
    return ids, segments


IDS, SEGMENTS = texts()
ORDINARY = (SEGMENTS > 0) & ~np.isin(IDS, BERT.special_ids)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    masked, labels = map(np.asarray, draw(IDS, SEGMENTS))
    assert masked.dtype == labels.dtype == np.int32 and masked.shape == labels.shape == IDS.shape
    return masked, labels


def assert_share(chosen: np.ndarray, share: float):
    """Within 4 standard deviations."""
    assert chosen.size > 1e4
    assert abs(chosen.mean() - share) < 4 * (share * (1 - share) / chosen.size) ** 0.5


def test_shares(drawn):
    masked, labels = drawn
    assert ORDINARY.sum() > 2e5
    predicted = labels != NOT_PREDICTED
    assert_share(predicted[ORDINARY], 0.15)
    assert_share((masked == MASK)[predicted], 0.8)
    kept = (masked == IDS)[predicted]
    assert_share(kept, 0.1 + 0.1 / BERT.vocab_size)
    assert_share(~kept & (masked != MASK)[predicted], 0.1 * (1 - 2 / BERT.vocab_size))


def test_only_predicted_tokens_change_and_labels_are_what_was_there(drawn):
    masked, labels = drawn
    predicted = labels != NOT_PREDICTED
    assert not predicted[~ORDINARY].any()
    assert np.array_equal(labels[predicted], IDS[predicted])
    assert np.array_equal(masked[~predicted], IDS[~predicted])


def test_places_rows_and_neighbours_are_independent(drawn):
    predicted = drawn[1] != NOT_PREDICTED
    for axis in (0, 1):
        counts, draws = np.where(ORDINARY, predicted, 0).sum(axis), ORDINARY.sum(axis)
        deviations = (counts - 0.15 * draws)[draws > 100] / (0.15 * 0.85 * draws[draws > 100]) ** 0.5
        assert np.abs(deviations).max() < 5 and abs(deviations.var() - 1) < 0.3
    assert_share((predicted[:, 1:] & predicted[:, :-1])[ORDINARY[:, 1:] & ORDINARY[:, :-1]], 0.15**2)
    assert_share((predicted[1:] & predicted[:-1])[ORDINARY[1:] & ORDINARY[:-1]], 0.15**2)


def test_a_higher_rate_adds_tokens_and_changes_none():
    low, high = (np.asarray(draw(IDS, SEGMENTS, masking=dataclasses.replace(BERT, rate=rate))[0]) for rate in (0.15, 1.0))
    changed = (low != IDS) & ORDINARY
    assert np.array_equal(low[changed], high[changed])
    assert_share((high == MASK)[ORDINARY], 0.8)


def test_every_step_draws_afresh(drawn):
    again, other = draw(IDS, SEGMENTS), draw(IDS, SEGMENTS, 1)
    for ours, same, fresh in zip(drawn, again, other, strict=True):
        assert np.array_equal(ours, same)
        assert not np.array_equal(ours, fresh)
    assert_share((drawn[1] != NOT_PREDICTED)[ORDINARY] & (np.asarray(other[1]) != NOT_PREDICTED)[ORDINARY], 0.15**2)


def test_rows_draw_alike_in_any_batch(drawn):
    pieces = [draw(IDS[start : start + 128], SEGMENTS[start : start + 128], 0, start) for start in range(0, ROWS, 128)]
    for ours, split in zip(drawn, zip(*pieces, strict=True), strict=True):
        assert np.array_equal(ours, np.concatenate(split))


def test_rows_draw_alike_on_any_devices(drawn):
    rows = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
    for ours, sharded in zip(drawn, draw(*jax.device_put((IDS, SEGMENTS), rows)), strict=True):
        assert np.array_equal(ours, sharded)


def test_padding_changes_nothing(drawn):
    longer = draw(*(np.pad(x, ((0, 0), (0, 88))) for x in (IDS, SEGMENTS)))
    assert np.array_equal(longer[0], np.pad(drawn[0], ((0, 0), (0, 88))))
    assert np.array_equal(longer[1], np.pad(drawn[1], ((0, 0), (0, 88)), constant_values=NOT_PREDICTED))


@pytest.mark.parametrize("vocab_size", [7, 1000, 250_002])
def test_random_tokens_are_uniform_over_the_vocabulary(vocab_size):
    """Over the whole of it where it is small; over 10 equal parts and to the very ends where it is not."""
    masking = Masking(rate=1.0, mask=0.0, random=1.0, mask_id=3, special_ids=(), vocab_size=vocab_size)
    segments = np.ones_like(IDS)
    masked = np.concatenate([np.asarray(draw(np.full_like(IDS, 5), segments, seed, masking=masking)[0]).ravel() for seed in range(4)])
    parts = min(vocab_size, 1000)
    counts, expected = np.bincount(masked.astype(np.int64) * parts // vocab_size, minlength=parts), masked.size / parts
    assert len(counts) == parts
    assert ((counts - expected) ** 2 / expected).sum() < parts - 1 + 5 * (2 * (parts - 1)) ** 0.5
    # A share of e^-4.2 of 250 002 ids is not drawn by 2^20 draws.
    missing = vocab_size * (1 - 1 / vocab_size) ** masked.size
    assert abs(vocab_size - len(np.unique(masked)) - missing) < 5 * missing**0.5 + 0.5


@pytest.mark.parametrize(("mask", "expected"), [(1.0, MASK), (0.0, IDS)])
def test_all_or_nothing(mask, expected):
    masked, labels = draw(IDS, SEGMENTS, masking=dataclasses.replace(BERT, rate=1.0, mask=mask, random=0.0))
    assert np.array_equal(masked, np.where(ORDINARY, expected, IDS))
    assert np.array_equal(labels, np.where(ORDINARY, IDS, NOT_PREDICTED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, r"masking: rate is above 0 and at most 1, got 0\.0"),
        ({"rate": 1.5}, "rate is above 0 and at most 1"),
        ({"mask": 0.95}, r"mask and random are shares, together at most 1, got 0\.95 and 0\.1"),
        ({"random": -0.1}, "are shares"),
        ({"mask_id": 30522}, "id 30522 is outside the vocabulary of 30522 tokens"),
        ({"special_ids": (0, -1)}, "id -1 is outside"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BERT, **changes)
    dataclasses.replace(BERT, mask=0.7, random=0.3)
