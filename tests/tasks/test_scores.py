"""Each task's metrics on random predictions, by scikit-learn and scipy and by their definitions."""

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from jaxdistill.tasks import GLUE, TASKS, score, shown_scores


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*GLUE, "xnli", "snli"])
def test_against_the_libraries(name, seed):
    task, rng = TASKS[name], np.random.default_rng(seed)
    logits = rng.normal(size=(200, task.num_labels)).astype(np.float32)
    if task.range:
        labels = rng.uniform(*task.range, 200).astype(np.float32)
        expected = {
            "pearson": scipy.stats.pearsonr(logits[:, 0], labels).statistic,
            "spearman": scipy.stats.spearmanr(logits[:, 0], labels).statistic,
        }
    else:
        labels = rng.integers(0, task.num_labels, 200)
        guesses = np.argmax(logits, axis=1)
        expected = {
            "accuracy": metrics.accuracy_score(labels, guesses),
            "f1": metrics.f1_score(labels, guesses) if task.num_labels == 2 else None,
            "matthews": metrics.matthews_corrcoef(labels, guesses),
        }
    found = score(task, logits, labels)
    assert list(found) == list(task.metrics)
    for metric, value in found.items():
        assert value == pytest.approx(expected[metric], abs=1e-7), metric


def test_by_definition():
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    labels = np.array([1, 0, 1, 1])  # 2 true positives, 1 false positive, 1 false negative
    assert score(TASKS["mrpc"], logits, labels) == pytest.approx({"f1": 2 / 3, "accuracy": 0.5})
    true, false_positive, false_negative, negative = 2, 1, 1, 0
    below = ((true + false_positive) * (true + false_negative) * (negative + false_positive) * (negative + false_negative)) ** 0.5
    expected = (true * negative - false_positive * false_negative) / below
    assert score(TASKS["cola"], logits, labels) == pytest.approx({"matthews": expected})


def test_a_constant_prediction_scores_nothing_and_warns_nothing():
    labels = np.array([0.0, 2.5, 5.0], np.float32)
    assert score(TASKS["stsb"], np.ones((3, 1)), labels) == {"pearson": 0.0, "spearman": 0.0}
    assert score(TASKS["cola"], np.array([[1.0, 0.0]] * 3), np.array([0, 1, 1])) == {"matthews": 0.0}
    assert score(TASKS["mrpc"], np.array([[1.0, 0.0]] * 3), np.array([0, 1, 1]))["f1"] == 0.0


def test_a_diverged_model_is_not_scored():
    with pytest.raises(ValueError, match="not finite"):
        score(TASKS["rte"], np.array([[np.nan, 0.0]]), np.array([0]))


def test_shown():
    assert shown_scores({"validation": {"f1": 0.8123, "accuracy": 0.7}}) == "f1 81.2 accuracy 70.0"
    assert shown_scores({"en": {"accuracy": 0.5}, "sw": {"accuracy": 0.25}}) == "en accuracy 50.0, sw accuracy 25.0"
