"""What is seen where: lines, a bar, a notebook's cell, nothing."""

import io
import re
import sys
import types

import pytest

from jaxdistill import progress as progress_module
from jaxdistill.progress import (
    NotebookProgress,
    PlainProgress,
    Progress,
    TerminalProgress,
    choose_progress,
    duration,
    preparing,
    significant,
)

RECORD = {"step": 200, "loss": 2.3141, "small/loss": 2.3141, "small/held_out": 2.2009, "tokens_per_second": 3412.4, "eta_seconds": 200.2}


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch):
    for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


@pytest.fixture
def terminal(monkeypatch):
    """Called in the test: between its set-up and the test, pytest's capture puts its own stderr back."""

    def start():
        monkeypatch.setattr(sys, "stderr", FakeTerminal())
        monkeypatch.setenv("COLUMNS", "90")
        return sys.stderr

    return start


@pytest.fixture
def notebook(monkeypatch):
    shown = []
    display = types.ModuleType("IPython.display")
    display.display = lambda bundle, raw, display_id: shown.append(("new", display_id, bundle))
    display.update_display = lambda bundle, raw, display_id: shown.append(("update", display_id, bundle))
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (200.2, "0:03:20"), (59.6, "0:01:00"), (100_000, "27:46:40"), (float("inf"), "?")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2.3, "2.300"), (0.031234, "0.03123"), (1234.4, "1234"), (1e-7, "1.000e-07"), (float("nan"), "nan")]
)
def test_significant(value, text):
    assert significant(value) == text


def test_plain_lines(capsys):
    with choose_progress(1000, "distilling", is_main=True) as progress:
        assert type(progress) is PlainProgress
        progress.update(199)  # not a logged step
        progress.update(200, RECORD)
        progress.say("a checkpoint at [step] 200")
        progress.update(220, {"step": 220, "loss": 2.0})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "step 200/1000 (20.0 %)  loss 2.314  held-out 2.201  3,412 tokens/s  eta 0:03:20\n"
        "a checkpoint at [step] 200\n"
        "step 220/1000 (22.0 %)  loss 2.000\n"
    )


def test_plain_line_of_several_students_and_an_unknown_total(capsys):
    with PlainProgress(None, "distilling") as progress:
        progress.update(5, {"loss": float("nan"), "a/held_out": 1.0, "b/held_out": 2.5, "c/held_out": None})
    assert capsys.readouterr().err == "step 5  loss nan  held-out a 1.000  held-out b 2.500\n"


@pytest.mark.parametrize("where", ["plain", "terminal", "notebook"])
def test_silent_unless_main(where, request, capsys):
    shown = request.getfixturevalue(where) if where != "plain" else None
    shown = shown() if where == "terminal" else shown
    with choose_progress(10, "distilling", is_main=False) as progress:
        assert type(progress) is Progress
        progress.update(1, RECORD)
        progress.say("hello")
    with preparing("preparing", is_main=False) as report:
        report(documents=1, tokens=2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not (shown.getvalue() if where == "terminal" else shown)


def visible(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_bar_in_a_terminal(terminal, capsys):
    screen = terminal()
    with choose_progress(1000, "distilling", is_main=True) as progress:
        assert type(progress) is TerminalProgress
        progress.update(200, RECORD)
        progress.say("a checkpoint at [step] 200")
        progress.update(250, {"step": 250, "loss": float("nan")})
    text = screen.getvalue()
    lines = [line.rstrip() for line in visible(text).replace("\r", "\n").split("\n") if line.strip()]
    assert lines.count("a checkpoint at [step] 200") == 1
    assert re.fullmatch(r"distilling [━╸╺]+ step 250/1000  25\.0 %  0:00:0\d", lines[-2])
    # The held-out loss stays until the next one.
    assert lines[-1].split() == ["loss", "nan", "held-out", "2.201", "3,412", "tokens/s", "eta", "0:03:20"]
    assert all(len(line) <= 90 for line in lines)
    assert "\x1b[?25l" in text and text.rstrip().endswith("\x1b[?25h")  # the cursor comes back
    assert capsys.readouterr().out == ""


def test_results_stay_on_stdout_while_the_bar_shows(terminal, capsys):
    screen = terminal()
    with choose_progress(10, "distilling", is_main=True) as progress:
        progress.update(1, RECORD)
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in screen.getvalue()


def test_the_terminal_is_whole_again_after_an_error(terminal):
    screen = terminal()
    with pytest.raises(KeyError), choose_progress(10, "distilling", is_main=True) as progress:
        progress.update(3, RECORD)
        raise KeyError
    assert sys.stderr is screen
    assert "step 3/10" in visible(screen.getvalue())


@pytest.mark.parametrize(("name", "value"), [("JPY_PARENT_PID", "17"), ("COLAB_RELEASE_TAG", "x"), ("TERM", "dumb")])
def test_lines_on_a_terminal_that_cannot_redraw(terminal, monkeypatch, name, value):
    terminal()
    monkeypatch.setenv(name, value)
    assert type(choose_progress(10, "distilling", is_main=True)) is PlainProgress


def test_ipython_in_a_terminal_is_a_terminal(terminal, monkeypatch):
    terminal()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert type(choose_progress(10, "distilling", is_main=True)) is TerminalProgress


def test_one_display_in_a_notebook(notebook, monkeypatch, capsys):
    with choose_progress(1000, "distilling", is_main=True) as progress:
        assert type(progress) is NotebookProgress
        for step in range(1, 101):
            progress.update(step)
        assert len(notebook) < 50  # steps do not flood the browser
        progress.update(200, RECORD)
        progress.say("<b> & co")
    assert [kind for kind, *_ in notebook] == ["new"] + ["update"] * (len(notebook) - 1)
    assert len({display_id for _, display_id, _ in notebook}) == 1
    bundle = notebook[-1][2]
    head, *rest = bundle["text/plain"].split("\n")
    assert head == "<b> & co"
    assert re.fullmatch(r"distilling  step 200/1000  20\.0 %  0:00:0\d", rest[0])
    assert rest[1] == "loss 2.314  held-out 2.201  3,412 tokens/s  eta 0:03:20"
    assert "&lt;b&gt; &amp; co" in bundle["text/html"] and '<progress value="200" max="1000"' in bundle["text/html"]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_preparing_in_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with preparing("preparing the text") as report:
        for second in range(16):
            now[0] = float(second)
            report(documents=1000 * second, tokens=500_000 + 20_000 * second, bytes_done=100 * second, bytes_total=2000)
    assert capsys.readouterr().err.splitlines() == [
        "preparing the text (0.0 %)  0 documents  500,000 tokens",
        "preparing the text (50.0 %)  10,000 documents  700,000 tokens  20,000 tokens/s  eta 0:00:10",
        "preparing the text (75.0 %)  15,000 documents  800,000 tokens  20,000 tokens/s  eta 0:00:05",  # the last word, at the end
    ]


def test_preparing_without_a_known_size(capsys):
    with preparing("preparing") as report:
        report(documents=3, tokens=40)
    assert capsys.readouterr().err == "preparing  3 documents  40 tokens\n"


def test_preparing_in_a_terminal(terminal):
    screen = terminal()
    with preparing("preparing") as report:
        report(documents=3, tokens=40, bytes_done=50, bytes_total=100)
    text = visible(screen.getvalue())
    assert "50.0 %" in text and "3 documents   40 tokens" in text


def test_preparing_in_a_notebook(notebook):
    with preparing("preparing") as report:
        report(documents=3, tokens=40)
    assert "3 documents  40 tokens" in notebook[-1][2]["text/plain"]
    assert "<progress  style" in notebook[-1][2]["text/html"]  # no value: the browser's own "nobody knows"
