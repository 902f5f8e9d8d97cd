"""Whether a difference is more than the noise of the seeds: the paired t-test."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from scipy.stats import ttest_rel

from jaxdistill.compare.cells import Cell

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """Ours minus the reference's, over pairs; `p` is None where there is no test, and `why` says why not."""

    mean: float | None
    p: float | None
    n: int
    why: str = ""

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < ALPHA


def paired(ours: Cell, reference: Cell) -> Difference:
    """Paired over the seeds that both have under the same hyperparameters; of two grids, they must be the same grid."""
    plain = reference.mean is not None and ours.mean is not None
    apart = ours.mean - reference.mean if plain else None
    seeds = [seed for seed in sorted(ours.values.keys() & reference.values.keys()) if _same_setting(ours, reference, seed)]
    if len(seeds) < 2:
        shared = ours.values.keys() & reference.values.keys()
        why = "other hyperparameters" if len(shared) > 1 and not seeds else "not enough seeds"
        return Difference(apart, None, len(seeds), why)
    pairs = [(ours.values[seed], reference.values[seed]) for seed in seeds]
    differences = [one - other for one, other in pairs]
    mean = statistics.fmean(differences)
    if max(differences) - min(differences) < 1e-9:  # of scores in percent: rounding alone
        if abs(mean) < 1e-9:
            return Difference(0.0, 1.0, len(seeds))
        return Difference(mean, None, len(seeds), "the same difference for every seed")
    return Difference(mean, float(ttest_rel(*zip(*pairs, strict=True)).pvalue), len(seeds))


def _same_setting(ours: Cell, reference: Cell, seed: int) -> bool:
    if ours.grid > 1 or reference.grid > 1:
        return ours.tried == reference.tried
    return ours.chosen.get(seed) == reference.chosen.get(seed)
