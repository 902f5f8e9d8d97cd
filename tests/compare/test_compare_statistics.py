"""Means, deviations, grids and the paired test."""

import math

import pytest
import scipy.stats
from compared import board_of, entry_of, runs, task, write_result

from jaxdistill.compare.cells import Cell, mean_of, read_cells
from jaxdistill.compare.significance import paired
from jaxdistill.compare.table import csv_text, legend, markdown, model_notes, score_text
from jaxdistill.errors import InputError

RTE, MRPC = ("rte", "validation", "accuracy"), ("mrpc", "validation", "f1")


def cell(*scores, setting=(2e-5, 32, 3), first=0):
    seeds = range(first, first + len(scores))
    return Cell(dict(zip(seeds, scores, strict=True)), dict.fromkeys(seeds, setting), frozenset([setting]))


def test_mean_and_deviation_by_hand():
    one = cell(60.0, 62.0, 67.0)
    assert one.mean == 63.0
    assert one.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))  # of the sample: over n - 1
    assert cell(60.0).deviation is None


def test_paired_test_by_hand():
    found = paired(cell(60.0, 62.0, 67.0), cell(61.0, 64.0, 70.0))
    # Differences -1, -2, -3: mean -2, deviation 1, t = -2 / (1 / sqrt(3)); two-sided p with 2 degrees of freedom is 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    assert (found.mean, found.n) == (-2.0, 3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert not found.significant


def test_paired_test_is_scipys_and_pairs_by_seed():
    ours, theirs = [61.2, 60.1, 63.3, 62.0], [64.1, 63.9, 65.2, 66.0]
    found = paired(cell(*ours), cell(*theirs))
    assert found.p == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue)
    assert found.significant
    shifted = paired(cell(*ours), cell(*theirs, first=1))  # seeds 1, 2, 3 in common
    assert shifted.n == 3
    assert shifted.p == pytest.approx(scipy.stats.ttest_rel(ours[1:], theirs[:3]).pvalue)
    assert shifted.mean == pytest.approx(sum(ours[1:]) / 3 - sum(theirs[:3]) / 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "p", "why"),
    [
        (cell(60.0), cell(61.0), None, "not enough seeds"),
        (cell(60.0, 61.0), cell(61.0, 62.0, first=1), None, "not enough seeds"),
        (cell(60.0, 61.0), cell(60.0, 61.0, setting=(5e-5, 32, 3)), None, "other hyperparameters"),
        (cell(60.1, 61.2, 62.3), cell(61.1, 62.2, 63.3), None, "the same difference for every seed"),
        (cell(60.0, 61.0), cell(60.0, 61.0), 1.0, ""),
        (Cell(alone=60.0), cell(60.0, 61.0), None, "not enough seeds"),
    ],
)
def test_where_there_is_no_test_it_says_why(ours, theirs, p, why):
    found = paired(ours, theirs)
    assert (found.p, found.why) == (p, why)
    assert found.mean == pytest.approx(-1.0 if why == "the same difference for every seed" else ours.mean - theirs.mean)


def test_grids_pair_only_with_the_same_grid():
    def grid(*rates, best):
        values = {0: 60.0, 1: 61.5, 2: 63.0 + best}
        return Cell(values, {0: (rates[0],), 1: (rates[-1],), 2: (rates[0],)}, frozenset((rate,) for rate in rates), len(rates))

    assert paired(grid(1, 2, best=0), grid(1, 2, best=1)).n == 3
    assert paired(grid(1, 2, best=0), grid(1, 3, best=1)).why == "other hyperparameters"


def test_average_is_seed_by_seed():
    assert mean_of([cell(10.0, 20.0), cell(30.0, 20.0)]).values == {0: 20.0, 1: 20.0}
    # A task that lacks a seed: the mean of the cells beside it, and no deviation or pairs of fewer seeds than they show.
    found = mean_of([cell(10.0, 20.0, 30.0), cell(30.0, 20.0, first=1)])
    assert (found.mean, found.deviation, found.values) == (22.5, None, {})
    assert mean_of([cell(10.0), cell(30.0, first=1)]).alone == 20.0


def test_of_a_grid_the_best_on_the_dev_set_counts_and_is_said(tmp_path):
    def both(seed, rate, f1, accuracy):
        scores = {"validation": {"f1": f1, "accuracy": accuracy}}
        return {"seed": seed, "learning_rate": rate, "batch_size": 32, "epochs": 3, "scores": scores}

    listed = [both(0, 1e-5, 0.80, 0.99), both(0, 3e-5, 0.84, 0.70), both(1, 1e-5, 0.88, 0.75), both(1, 3e-5, 0.81, 0.98)]
    write_result(tmp_path, "one", {"mrpc": task(listed)})
    board = board_of(tmp_path)
    one = entry_of(board, "one")
    assert board.cell(one, MRPC).values == {0: pytest.approx(84.0), 1: pytest.approx(88.0)}
    # The other metric is of the same runs, not a maximum of its own.
    assert board.cell(one, ("mrpc", "validation", "accuracy")).values == {0: pytest.approx(70.0), 1: pytest.approx(75.0)}
    assert score_text(board, one, MRPC) == "86.0 ± 2.8‡"
    assert any("grid of up to 2 settings: a maximum" in line for line in legend(board))
    assert "one: MRPC: of every seed the best run on the dev set, a maximum over a grid of 2 settings" in model_notes(board)


def test_limited_training_rows_get_a_footnote(tmp_path):
    write_result(tmp_path, "few", {"rte": task(runs(0.6, 0.62), train=1000, available=2490)})
    write_result(tmp_path, "all", {"rte": task(runs(0.6, 0.62), train=2490, available=2490)})
    board = board_of(tmp_path)
    assert score_text(board, entry_of(board, "few"), RTE) == "61.0 ± 1.4†"
    assert score_text(board, entry_of(board, "all"), RTE) == "61.0 ± 1.4"
    assert model_notes(board) == ["few: RTE: fine-tuned on 1,000 of 2,490 rows"]
    assert "† fine-tuned on fewer rows" in markdown(board, ["x"], [], [])
    (row,) = [line for line in csv_text(board).splitlines() if line.startswith("few,measured,rte")]
    assert row.endswith("fewer training rows")


def test_a_run_that_diverged_is_left_out_and_named():
    listed = runs(0.6, math.nan, 0.64)
    cells, notes = read_cells({"tasks": {"rte": task(listed)}}, "x.json")
    assert cells[RTE].values == {0: 60.0, 2: 64.0}
    assert notes == ["RTE: the run of seed 1 has no finite score and is left out"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"rta": task([])}, "unknown task 'rta'; did you mean 'rte'"),
        ({"rte": {"examples": {}}}, "x.json: scores.tasks.rte: not as evaluate writes it: no 'runs'"),
        ({"rte": task([{"seed": 0}])}, "not as evaluate writes it: no 'scores'"),
    ],
)
def test_scores_that_nobody_wrote(tasks, message):
    with pytest.raises(InputError, match=message):
        read_cells({"tasks": tasks}, "x.json")


@pytest.mark.parametrize("change", [{"max_length": 64}, {"weight_decay": 0.1}, {"train_limit": 100}, {"precision": "bfloat16"}])
def test_only_runs_of_one_protocol_are_paired(change):
    listed = runs(0.6, 0.62, 0.64)
    first = read_cells({"tasks": {"rte": task(listed)}, "protocol": {"max_length": 128}}, "x.json")[0][RTE]
    other = read_cells({"tasks": {"rte": task(listed)}, "protocol": {"max_length": 128} | change}, "x.json")[0][RTE]
    assert paired(first, first).n == 3
    assert paired(first, other).why == "other hyperparameters"


def test_a_diverged_run_leaves_the_others():
    listed = [*runs(0.6, 0.62), {"seed": 2, "learning_rate": 1.0, "batch_size": 32, "epochs": 3, "diverged": True, "scores": {}}]
    cells, notes = read_cells({"tasks": {"rte": task(listed)}}, "x.json")
    assert cells[RTE].values == {0: 60.0, 1: 62.0}
    assert "RTE: the run of seed 2 has no finite score and is left out" in notes


def test_a_model_that_was_not_fine_tuned_here():
    cells, notes = read_cells({"tasks": {"rte": task([{"seed": None, "scores": {"validation": {"accuracy": 0.7}}}])}}, "x.json")
    assert cells[RTE].mean == 70.0 and cells[RTE].deviation is None
    assert notes == ["RTE: scored as it is, not fine-tuned here"]
