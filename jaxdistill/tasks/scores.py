"""Predictions to scores: each task's own metrics, by scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np

from jaxdistill.tasks.catalogue import Task


def _correlation(kind: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    import scipy.stats

    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0  # a constant agrees with nothing; scipy says nan
    return float(getattr(scipy.stats, kind)(predictions, labels).statistic)


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metric -> value, fractions (1 is perfect), the task's main metric first.

    Args:
      logits: [n, C]; of a regression [n, 1].
      labels: [n].

    Raises:
      ValueError: logits that are not finite: the training diverged.
    """
    from sklearn import metrics

    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    predictions = logits[:, 0] if task.range else logits.argmax(axis=1)
    found = {}
    for name in task.metrics:
        if name in ("pearson", "spearman"):
            value = _correlation({"pearson": "pearsonr", "spearman": "spearmanr"}[name], predictions, np.asarray(labels, np.float64))
        elif name == "matthews":
            value = metrics.matthews_corrcoef(labels, predictions)
        elif name == "f1":
            value = metrics.f1_score(labels, predictions, zero_division=0.0)
        else:
            value = metrics.accuracy_score(labels, predictions)
        found[name] = float(value)
    assert all(map(math.isfinite, found.values()))
    return found


def shown_scores(scores: dict[str, dict[str, float]]) -> str:
    """Of each split and metric, in percent."""
    several = len(scores) > 1
    return ", ".join(
        (f"{split} " if several else "") + " ".join(f"{metric} {100 * value:.1f}" for metric, value in values.items())
        for split, values in scores.items()
    )
