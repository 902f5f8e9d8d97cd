"""Which row the n-th sample is: a pure function of (seed, n), so that one integer resumes a run exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxdistill.errors import InputError

FEISTEL_ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: consecutive multiples are far apart in every bit


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on every bit of the uint64 value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of range(size) sends each index; another one for each key. No memory but the arguments'.

    A Feistel network is a bijection of a power of two whatever its round function; an image outside of range(size) is sent on until
    it falls inside (cycle walking, fewer than two times on average).

    Args:
      index: int64 [n], 0 <= index < size.
      key: uint64 [n].

    Returns:
      int64 [n].
    """
    num_bits = max(2, int(size - 1).bit_length())
    low_width = np.uint64(num_bits // 2)
    low_bits, high_bits = np.uint64(2 ** (num_bits // 2) - 1), np.uint64(2 ** (num_bits - num_bits // 2) - 1)
    images = index.astype(np.uint64)
    walking = np.arange(len(images))
    while len(walking):
        high, low, round_key = images[walking] >> low_width, images[walking] & low_bits, key[walking]
        for _ in range(FEISTEL_ROUNDS // 2):
            low ^= _mix(round_key + high) & low_bits
            high ^= _mix(round_key + GOLDEN + low) & high_bits
            round_key = round_key + GOLDEN + GOLDEN
        images[walking] = (high << low_width) | low
        walking = walking[images[walking] >= np.uint64(size)]
    return images.astype(np.int64)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to the weights; what rounding leaves goes to the largest remainders."""
    exact = np.array(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts.tolist()


class RowOrder:
    """The endless sequence of rows that training reads.

    Without weights each epoch is a permutation of all rows. With weights an epoch of N = all rows draws round(share * N) times from
    each source, evenly interleaved, and a source's draws walk through permutation after permutation of its own rows, on across the
    epochs: no row of it comes twice before each has come once.

    Args:
      rows_per_source: how many rows each source has; they lie one source after the other.
      weights: of each pool.
      pools: numbers of the sources that are drawn from as if they were one; default: each by itself.
    """

    def __init__(
        self,
        rows_per_source: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        pools: Sequence[Sequence[int]] | None = None,
    ):
        self.rows_per_epoch = sum(rows_per_source)
        if self.rows_per_epoch == 0:
            raise InputError("data.sources: no rows to train on")
        self.seed = seed
        # Of each stream: where its sources' rows begin among its own and in the store, how many it has, its draws per epoch.
        self._streams: list[tuple[np.ndarray, np.ndarray, int, int]] = []
        if weights is None:
            self._streams = [(np.zeros(1, np.int64), np.zeros(1, np.int64), self.rows_per_epoch, self.rows_per_epoch)]
            return
        sizes, starts = np.array(rows_per_source, np.int64), np.cumsum([0, *rows_per_source])
        pools = [[i] for i in range(len(sizes))] if pools is None else pools
        for pool, count in zip(pools, shares(self.rows_per_epoch, weights), strict=True):
            own = sizes[list(pool)]
            where = "data.sources." + ", data.sources.".join(map(str, pool))
            if not own.any():
                raise InputError(f"{where}: no rows to train on, so that it cannot have a share (weight)")
            if count == 0:
                raise InputError(f"{where}: its share (weight) of an epoch of {self.rows_per_epoch} rows is less than one row")
            self._streams.append((np.cumsum([0, *own[:-1]]), starts[list(pool)], int(own.sum()), count))

    def rows(self, sample_numbers: np.ndarray) -> np.ndarray:
        """Row numbers, int64 [n], of the samples 0, 1, 2, ... (int64 [n])."""
        epoch, slot = np.divmod(np.asarray(sample_numbers, np.int64), self.rows_per_epoch)
        result = np.empty(slot.shape, np.int64)
        open_samples = np.arange(len(slot))
        open_slots = self.rows_per_epoch
        for stream, (firsts, places, num_rows, count) in enumerate(self._streams):
            # Of the slots still open this stream takes `count`, as a line drawn with the slope count / open_slots.
            drawn = slot * count // open_slots
            mine = (slot + 1) * count // open_slots > drawn
            passes, position = np.divmod(epoch[mine] * count + drawn[mine], num_rows)
            drawn_rows = permute(position, num_rows, self._keys(stream, passes))
            source = np.searchsorted(firsts, drawn_rows, side="right") - 1  # an empty one begins where the next does
            result[open_samples[mine]] = drawn_rows - firsts[source] + places[source]
            others = ~mine
            epoch, slot, open_samples = epoch[others], (slot - drawn)[others], open_samples[others]
            open_slots -= count
        return result

    def _keys(self, stream: int, passes: np.ndarray) -> np.ndarray:
        seeds = np.full(passes.shape, self.seed, np.uint64)
        return _mix(_mix(_mix(seeds) + np.uint64(stream)) + passes.astype(np.uint64))
