"""Averages, columns, the reference, and what stands beside what."""

import csv
import io

import pytest
from compared import MINILM, MODEL, SHAPE, board_of, distilled, entry_of, runs, task, write_result

from jaxdistill.compare.headline import headline, how_made, sources
from jaxdistill.compare.published import GLUE_ALL, GLUE_WITHOUT_COLA, XNLI_AVERAGE
from jaxdistill.compare.table import csv_text, difference_table, main_table, markdown
from jaxdistill.errors import InputError

LARGE = {"parameters": 110_000_000, "num_layers": 12, "hidden_size": 768, "intermediate_size": 3072}


def glue(shift=0.0, **left):
    """CoLA 0.5, SST-2 0.9, RTE 0.6 at three seeds."""
    tasks = {
        "cola": task(runs(0.50 + shift, 0.51 + shift, 0.52 + shift, metric="matthews")),
        "sst2": task(runs(0.90 + shift, 0.91 + shift, 0.92 + shift / 2)),
        "rte": task(runs(0.60 + shift, 0.62 + shift, 0.61 + shift / 3)),
    }
    return {name: content for name, content in tasks.items() if name not in left.get("without", ())}


def test_averages_leave_out_by_name(tmp_path):
    write_result(tmp_path, "teacher", glue() | {"wnli": task(runs(0.56))}, LARGE)
    write_result(tmp_path, "student", glue(-0.1, without=("rte",)))
    write_result(tmp_path, "unscored", None)
    board = board_of(tmp_path)
    assert board.averaged[GLUE_ALL] == ("cola", "sst2")
    assert GLUE_WITHOUT_COLA not in board.columns  # one task is no average
    assert board.cell(entry_of(board, "teacher"), GLUE_ALL).values == {0: pytest.approx(70), 1: pytest.approx(71), 2: pytest.approx(72)}
    assert "GLUE averages: RTE left out, missing for student" in board.notes
    assert "GLUE averages: WNLI left out, no published average holds it" in board.notes
    assert not any("unscored" in note for note in board.notes)


def test_with_and_without_cola(tmp_path):
    write_result(tmp_path, "one", glue())
    board = board_of(tmp_path)
    one = entry_of(board, "one")
    assert board.cell(one, GLUE_ALL).mean == pytest.approx((51 + 91 + 61) / 3)
    assert board.cell(one, GLUE_WITHOUT_COLA).mean == pytest.approx((91 + 61) / 2)
    assert board.columns[GLUE_ALL] == "GLUE average (3 tasks)" and board.columns[GLUE_WITHOUT_COLA] == "GLUE without CoLA (2 tasks)"


def test_languages_average_over_those_that_all_have(tmp_path):
    def xnli(**languages):
        scores = {"validation": {"accuracy": 0.8}} | {name: {"accuracy": value} for name, value in languages.items()}
        return {"xnli": task([{"seed": 0, "learning_rate": 2e-5, "batch_size": 32, "epochs": 5, "scores": scores}])}

    write_result(tmp_path, "three", xnli(en=0.8, de=0.7, ur=0.2))
    write_result(tmp_path, "two", xnli(en=0.7, de=0.5))
    board = board_of(tmp_path)
    assert board.columns[XNLI_AVERAGE] == "XNLI (2 languages)"
    assert board.cell(entry_of(board, "three"), XNLI_AVERAGE).mean == pytest.approx(75.0)
    assert "XNLI average: ur left out, missing for two" in board.notes
    assert set(board.languages.values()) == {"XNLI en", "XNLI de", "XNLI ur"}


def test_reference_is_the_largest_or_the_one_named(tmp_path):
    write_result(tmp_path, "student", glue(-0.1))
    write_result(tmp_path, "teacher", glue(), LARGE)
    assert board_of(tmp_path).reference.name == "teacher"
    assert board_of(tmp_path, reference="student").reference.name == "student"
    with pytest.raises(InputError, match=r"--reference teachr: no such model.*did you mean 'teacher'"):
        board_of(tmp_path, reference="teachr")
    with pytest.raises(InputError, match="published rows have no seeds"):
        board_of("udagawa2023:3L", reference="teacher")


def test_the_published_value_stands_beside_ours(tmp_path):
    write_result(tmp_path, "ours", glue(), {"distilled": distilled(MINILM)})
    board = board_of(tmp_path)
    ours = entry_of(board, "ours")
    assert board.published(ours, ("cola", "validation", "matthews")) == (13.3, "udagawa2023, table 5")
    assert board.published(ours, GLUE_WITHOUT_COLA) is None  # the paper's is over 7 tasks, ours over 2
    (row,) = main_table(board).rows
    assert row[-3:] == ("51.0 ± 1.0 · published 13.3", "91.0 ± 1.0 · published 87.3", "61.0 ± 1.0 · published 55.1")
    (line,) = [line for line in sources(board) if line.startswith("ours")]
    assert "3L MiniLMv2 teacher_minus_2 monolingual" in line and "udagawa2023, table 5" in line


def test_a_published_average_stands_beside_one_over_the_same_tasks(tmp_path):
    metrics = {"mrpc": "f1", "stsb": "pearson"}
    tasks = {name: task(runs(0.8, 0.7, metric=metrics.get(name, "accuracy"))) for name in ("sst2", "mrpc", "stsb", "qqp", "qnli", "rte")}
    tasks["mnli"] = task(runs(0.8, 0.7, split="validation_matched"))
    write_result(tmp_path, "ours", tasks, {"distilled": distilled(MINILM)})
    board = board_of(tmp_path)
    ours = entry_of(board, "ours")
    assert board.published(ours, GLUE_WITHOUT_COLA) == (78.3, "udagawa2023, table 3")
    # The paper's QQP is F1 by its size: never beside our accuracy.
    assert board.published(ours, ("qqp", "validation", "accuracy")) is None
    assert any("QQP" in note and "F1" in note for note in board.notes)


def test_rows_of_which_the_average_alone_is_published_have_a_column(tmp_path):
    write_result(tmp_path, "ours", glue())
    board = board_of(tmp_path, "udagawa2023:3L:monolingual:HS")
    table = main_table(board)
    column = table.columns.index("GLUE without CoLA (7 tasks, as published)")
    shown = {row[0]: row[column] for row in table.rows}
    assert shown["3L HS last monolingual (udagawa2023)"] == "77.7" and shown["ours (reference)"] == "-"
    assert len(shown) == 6
    # Per task, over the tasks that ours has.
    last_layer = entry_of(board, "3L HS last_layer monolingual (udagawa2023)")
    assert board.cell(last_layer, GLUE_WITHOUT_COLA).mean == pytest.approx((89.4 + 57.5) / 2)


def test_order_differences_and_headline(tmp_path):
    latency = {"measurements": [{"framework": "jax", "device": "cpu", "batch_size": 1, "length": 128, "mean_seconds": 0.06}]}
    quick = {"measurements": [latency["measurements"][0] | {"mean_seconds": 0.01, "deviation_seconds": 0.001}]}
    write_result(tmp_path, "worse", glue(-0.09))
    write_result(tmp_path, "better", glue(-0.03), latency=quick)
    write_result(tmp_path, "teacher", glue(), LARGE, latency=latency)
    board = board_of(tmp_path)
    assert [entry.name for entry in board.entries] == ["teacher", "better", "worse"]
    first, second = headline(board)[:2]
    assert first == "teacher, the reference, scores best of 3 models: 76.0 ± 0.9 (GLUE without CoLA, 2 tasks)."
    assert second == "better comes closest: 73.6 ± 1.6, 96.8% of teacher's, with 15% of its parameters (16.0 M), 6.0 times as fast."
    (row, _) = difference_table(board).rows
    assert row[0] == "better" and row[2].startswith("-2.4 (p ") and row[2].endswith(", n 3)")


def test_csv_is_long_and_complete(tmp_path):
    write_result(tmp_path, "teacher", glue(), LARGE)
    write_result(tmp_path, "ours", glue(-0.2), {"distilled": distilled(MINILM)})
    found = {(row["model"], row["task"], row["metric"]): row for row in csv.DictReader(io.StringIO(csv_text(board_of(tmp_path))))}
    cell = found["ours", "sst2", "accuracy"]
    assert float(cell["mean"]) == pytest.approx((70 + 71 + 82) / 3, abs=1e-3) and cell["seeds"] == "3"
    assert cell["published"] == "87.3" and cell["published_source"] == "udagawa2023, table 5"
    assert cell["reference"] == "teacher" and float(cell["difference"]) == pytest.approx(-50 / 3, abs=1e-3)
    assert 0 < float(cell["p_value"]) < 0.05
    assert found["teacher", "sst2", "accuracy"]["p_value"] == ""
    assert found["ours", "glue", "average"]["note"] == "over cola, sst2, rte"
    assert found["ours", "cola", "matthews"]["note"] == "the same difference for every seed"
    assert found["ours", "", "parameters"]["mean"] == "16000000"


def test_markdown_marks_the_best_and_holds_every_part(tmp_path):
    write_result(tmp_path, "teacher", glue(), LARGE)
    write_result(tmp_path, "a*b<script>", glue(-0.2), {"distilled": distilled(MINILM)})
    board = board_of(tmp_path)
    text = markdown(board, headline(board), how_made(board, ["results"], tmp_path / "r", tmp_path / "o", None), sources(board))
    (row,) = [line for line in text.splitlines() if line.startswith("| teacher (reference)")]
    assert row.count("**") == 2 * 5  # the best of every column
    (row,) = [line for line in text.splitlines() if line.startswith("| a\\*b&lt;script>")][:1]
    assert "\\*" in row and "published 87.3" in row
    assert "## Difference to teacher" in text and "## How it was made" in text and "## Published tables" in text
    assert str(tmp_path) not in text and "/home/someone" not in text


def test_two_models_of_one_name_stay_apart_and_one_model_twice_is_one(tmp_path):
    one = write_result(tmp_path / "a", "x", glue(), {"weights_sha256": "1"})
    other = write_result(tmp_path / "b", "x", glue(-0.1), {"weights_sha256": "2", "source": "runs/second/export/x"})
    assert {entry.name for entry in board_of(one, other, one).entries} == {"x", "second/x"}


def test_published_rows_are_chosen_by_their_values():
    assert len(board_of("udagawa2023").entries) == 2 * (4 * 16 + 2)  # with DistilBERT and the teacher
    assert {entry.row.keys["student"] for entry in board_of("udagawa2023:3l").entries} == {"3L"}
    assert len(board_of("udagawa2023:3L:monolingual").entries) == 16
    assert {entry.row.keys["setting"] for entry in board_of("wang2023:task_agnostic").entries} == {"task_agnostic"}
    for name, message in (
        ("udagawa", "did you mean 'udagawa2023'"),
        ("udagawa2023:3M", "no row of udagawa2023 has '3M'"),
        ("wang2023:task_specific:random", "together"),
    ):
        with pytest.raises(InputError, match=message):
            board_of(name)


def test_published_averages_are_those_of_their_tasks():
    """The slips that a typist makes: every average that is printed is that of the cells that are printed, but for the paper's own slip."""
    checked = 0
    for entry in board_of("udagawa2023", "wang2023:task_agnostic").entries:
        for key, tasks in entry.row.averaged.items():
            values = [
                score for (task, split, _), (score, _) in entry.row.scores.items() if task in tasks and split.startswith("validation")
            ]
            if len(values) == len(tasks) and key in entry.row.scores and "6L OD uniform_consecutive multilingual" not in entry.name:
                assert sum(values) / len(values) == pytest.approx(entry.row.scores[key][0], abs=0.11), entry.name
                checked += 1
    assert checked > 80


def test_a_shape_of_nobody_says_so(tmp_path):
    write_result(tmp_path, "ours", glue(), {**SHAPE, "hidden_size": 400, "distilled": distilled(MINILM)})
    write_result(tmp_path, "plain", glue(), {name: value for name, value in MODEL.items() if name != "distilled"})
    board = board_of(tmp_path)
    assert "ours stands beside none: no published row has its shape, vocabulary, objective and layers of the teacher" in sources(board)
    assert not any(line.startswith("plain") for line in sources(board))


def test_nothing_published_stands_beside_a_score_that_is_not_there(tmp_path):
    write_result(tmp_path, "ours", {"snli": task(runs(0.8, 0.82, 0.81))}, {"distilled": distilled(MINILM)})
    write_result(tmp_path, "other", {"snli": task(runs(0.81, 0.80, 0.83))}, LARGE)
    board = board_of(tmp_path, "udagawa2023:3L:monolingual")
    assert "none of its scores is comparable to ours here" in "".join(sources(board))
    assert not any("QQP" in note for note in board.notes)
    assert difference_table(board).columns == ("model", "SNLI")
