import numpy as np
import pytest

from jaxdistill.data import RowOrder
from jaxdistill.errors import InputError

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 1000, 1024, 4097]


def epoch(order: RowOrder, number: int) -> np.ndarray:
    return order.rows(number * order.rows_per_epoch + np.arange(order.rows_per_epoch))


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_is_a_permutation(size):
    for seed in range(5):
        order = RowOrder((size,), None, seed)
        for number in (0, 1, 2**31):
            assert np.array_equal(np.sort(epoch(order, number)), np.arange(size))


def test_sources_without_weights_are_one_permutation():
    order = RowOrder((30, 0, 70), None, 0)
    rows = epoch(order, 0)
    assert np.array_equal(np.sort(rows), np.arange(100))
    assert 5 < (rows[:50] < 30).sum() < 25  # mixed, not one after the other


def test_seeds_and_epochs_differ():
    seen = [tuple(epoch(RowOrder((50,), None, seed), number)) for seed in range(6) for number in range(6)]
    assert len(set(seen)) == len(seen)


def test_permutations_are_spread_evenly():
    # Chi-square of (position, row) counts over many seeds; 13**2 degrees of freedom have a standard deviation of 18.4.
    size, trials = 14, 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        np.add.at(counts, (np.arange(size), epoch(RowOrder((size,), None, seed), 0)), 1)
    expected = trials / size
    assert ((counts - expected) ** 2 / expected).sum() < 13**2 + 5 * 18.4


@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 0.5)])
def test_samples_do_not_depend_on_each_other(weights):
    order = RowOrder((100, 57, 900), weights, 7)
    numbers = np.random.default_rng(0).integers(0, 5000, 200)
    expected = np.array([order.rows(np.array([number]))[0] for number in numbers])
    assert np.array_equal(order.rows(numbers), expected)
    assert order.rows(np.array([], np.int64)).shape == (0,)


def test_pinned_order():
    # A resumed run of an older version must meet the same rows: these numbers may never change.
    assert RowOrder((1000,), None, 0).rows(np.arange(6)).tolist() == [434, 141, 52, 213, 999, 500]
    assert RowOrder((600, 400), (1.0, 3.0), 5).rows(np.arange(6)).tolist() == [993, 964, 656, 293, 937, 747]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 1.0, 0.25), (0.1, 0.2, 0.7)])
def test_weights_are_shares_of_every_epoch(weights):
    sizes = (100, 57, 900)
    order = RowOrder(sizes, weights, 1)
    share = np.array(weights) / sum(weights) * order.rows_per_epoch
    for number in (0, 1, 5):
        source = np.searchsorted(np.cumsum(sizes), epoch(order, number), side="right")
        counts = np.bincount(source, minlength=3)
        assert counts.sum() == order.rows_per_epoch and (abs(counts - share) < 1).all()
        first_half = np.bincount(source[: len(source) // 2], minlength=3)
        assert (abs(first_half - share / 2) <= 3).all()  # interleaved, not one after the other


def test_weighted_rows_come_once_before_any_comes_twice():
    sizes, weights = (100, 57, 900), (4.0, 1.0, 1.0)
    order = RowOrder(sizes, weights, 3)
    rows = order.rows(np.arange(13 * order.rows_per_epoch))
    starts = np.cumsum((0, *sizes))
    for start, size in zip(starts, sizes, strict=False):
        own = rows[(rows >= start) & (rows < start + size)] - start
        passes = own[: len(own) // size * size].reshape(-1, size)
        assert len(passes) > 1
        assert (np.sort(passes, axis=1) == np.arange(size)).all()
        assert len({tuple(each) for each in passes}) == len(passes)


def test_what_cannot_be_drawn():
    with pytest.raises(InputError, match=r"data\.sources: no rows to train on"):
        RowOrder((0, 0), None, 0)
    with pytest.raises(InputError, match=r"data\.sources\.1: no rows to train on, so that it cannot have a share \(weight\)"):
        RowOrder((5, 0), (1.0, 1.0), 0)
    with pytest.raises(InputError, match=r"data\.sources\.0: its share \(weight\) of an epoch of 20 rows is less than one row"):
        RowOrder((10, 10), (0.01, 1.0), 0)
