"""The picture and the tables."""

import io
import math
import re
import sys

import matplotlib.image
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.metrics import MetricsWriter, read_history
from jaxdistill.report import COLOURS, SUMMARY_COLUMNS, markdown_table, plot_losses, print_table, summary_row, summary_table


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def holds(picture, colour):
    return bool((np.abs(picture[..., :3] - rgb(colour)).max(-1) < 0.02).any())


def curves(students, steps=40):
    for step in range(steps):
        record = {"step": step, "loss": 0.0}
        for i, student in enumerate(students):
            record[f"{student}/loss"] = (i + 1) * (0.1 + 5 * math.exp(-step / 5))
            if step % 10 == 0:
                record[f"{student}/held_out"] = record[f"{student}/loss"] * 1.1
        yield record


def test_every_student_has_its_colour(tmp_path):
    path = plot_losses(list(curves(["a", "b", "c"])), tmp_path / "plots" / "loss.png", "three [students] $1")
    picture = matplotlib.image.imread(path)
    assert picture.shape == (800, 1200, 4)
    assert [holds(picture, colour) for colour in COLOURS[:4]] == [True, True, True, False]
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def axes_of(history, tmp_path, monkeypatch):
    from jaxdistill import report

    figures = []

    class Kept(report.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr(report, "Figure", Kept)
    plot_losses(history, tmp_path / "loss.png", "title")
    return figures[0].axes[0]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_legend_says_where_each_curve_begins_and_ends(tmp_path, monkeypatch):
    history = [{"step": 0, "small/held_out": 3.0}, {"step": 5, "loss": 2.9, "small/loss": 2.8}, {"step": 10, "small/held_out": 2.5}]
    axes = axes_of(history, tmp_path, monkeypatch)
    assert labels(axes) == ["small, training: 2.800", "small, held-out: 3.000 → 2.500"]
    assert axes.get_yscale() == "linear" and axes.get_ylabel() == "loss"


@pytest.mark.parametrize(("last", "scale"), [(0.5, "log"), (2.0, "linear"), (-1.0, "linear"), (0.0, "linear")])
def test_log_scale_beyond_a_factor_of_ten(tmp_path, monkeypatch, last, scale):
    assert axes_of([{"step": 0, "loss": 10.0}, {"step": 1, "loss": last}], tmp_path, monkeypatch).get_yscale() == scale


@pytest.mark.parametrize(
    ("held_out", "label"),
    [({}, "training"), ({"a/held_out": 1.0}, "a, training"), ({"a/held_out": 1.0, "b/held_out": 1.0}, "all students, training")],
)
def test_the_total_stands_in_for_a_missing_loss(tmp_path, monkeypatch, held_out, label):
    axes = axes_of([{"step": 1, "loss": 1.0, **held_out}], tmp_path, monkeypatch)
    assert f"{label}: 1.000" in labels(axes)
    assert len(labels(axes)) == 1 + len(held_out)


def test_a_diverged_student_leaves_a_gap(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, wandb=None, config={}, resume_step=0, is_main=True) as metrics:
        for step in range(6):
            metrics.write({"step": step, "a/loss": 1.0, "b/loss": math.nan if step > 2 else 2.0})
    assert plot_losses(read_history(tmp_path), tmp_path / "loss.png", "one diverged").stat().st_size > 5000


def test_losses_that_are_all_nan_are_still_a_picture(tmp_path):
    assert plot_losses([{"step": 1, "loss": math.nan}], tmp_path / "loss.png", "diverged").stat().st_size > 5000


@pytest.mark.parametrize("history", [[], [{"step": 1, "learning_rate": 1.0}]])
def test_nothing_to_plot(tmp_path, history):
    with pytest.raises(InputError, match="nothing to plot"):
        plot_losses(history, tmp_path / "loss.png", "title")
    assert list(tmp_path.iterdir()) == []


ROW = summary_row(
    "small",
    num_layers=6,
    hidden_size=384,
    num_parameters=22_713_216,
    num_teacher_parameters=109_482_240,
    held_out=(9.1234, 0.21),
    tokens=327_680_000,
    export_folder="runs/a/long/path/of/a/run/that/goes/on/export/small",
)


def test_summary_row():
    assert len(ROW) == len(SUMMARY_COLUMNS)
    assert ROW[1:6] == ("6 x 384", "22.7", "4.8x", "9.123 -> 0.2100", "327,680,000")


def test_table_in_a_pipe_is_never_cut(capsys):
    print_table(summary_table([ROW], SUMMARY_COLUMNS, "Students of [bert]"))
    captured = capsys.readouterr()
    assert captured.err == ""
    title, *_, row = [line for line in captured.out.splitlines() if line.strip()]
    assert title.strip() == "Students of [bert]"
    assert all(cell in row for cell in ROW)
    assert max(len(line) for line in captured.out.splitlines()) > 80


def test_table_in_a_narrow_terminal_stands_upright(monkeypatch):
    class FakeTerminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", FakeTerminal())
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    row = (*ROW[:-1], "runs/a/export/small")
    print_table(summary_table([row, row], SUMMARY_COLUMNS, "Students"))
    text = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("smaller than the teacher by") == 2 and text.count(row[-1]) == 2


def test_columns_of_numbers_stand_to_the_right():
    table = summary_table([("a1", "1,000", "2.5x", "-"), ("b", "20", "10x", "3")], ["name", "n", "ratio", "score"], "t")
    assert [column.justify for column in table.columns] == ["left", "right", "right", "right"]
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        summary_table([("a",)], ["x", "y"], "t")


def test_markdown():
    assert markdown_table([("a|b", 1.5), ("c", 20)], ["name", "score"]) == (
        "| name | score |\n| --- | ---: |\n| a\\|b | 1.5 |\n| c | 20 |\n"
    )
