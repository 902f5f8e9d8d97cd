"""What a person sees while a run goes on: a bar in a terminal or a notebook, plain lines elsewhere.

All of it goes to stderr: stdout is for results.
"""

from __future__ import annotations

import contextlib
import html
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Numbers = Sequence[tuple[str, str]]  # (label, value); the label may be empty


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:03:20."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def significant(value: float) -> str:
    """Four significant digits, zeros kept, so that a column of losses does not jump about: 2.300."""
    return f"{value:#.4g}".rstrip(".")


def training_numbers(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a line of training shows of a record: loss, held-out loss (by student if there are several), speed, time left."""
    numbers = [("loss", significant(record["loss"]))] if record.get("loss") is not None else []
    held_out = {name.removesuffix("/held_out"): value for name, value in record.items() if name.endswith("/held_out") and value is not None}
    for student, value in held_out.items():
        numbers.append((f"held-out {student}" if len(held_out) > 1 else "held-out", significant(value)))
    if record.get("tokens_per_second") is not None:
        numbers.append(("", f"{record['tokens_per_second']:,.0f} tokens/s"))
    if record.get("eta_seconds") is not None:
        numbers.append(("eta", duration(record["eta_seconds"])))
    return numbers


def _joined(numbers: Numbers) -> str:
    return "  ".join(f"{label} {value}".strip() for label, value in numbers)


class Progress:
    """How far a run is. This one shows nothing (processes other than the main one); the others override `show` and `say`.

    Args:
      total: steps of the whole run, or None if nobody knows.
      description: two or three words in front of the bar.
    """

    interval = math.inf  # seconds between two looks at a count that changes all the time
    keeps_numbers = True  # a display shows the last held-out loss until the next; a line shows what is new

    def __init__(self, total: int | None, description: str):
        self.total, self.description = total, description
        self._started = time.monotonic()
        self._record: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    @property
    def elapsed(self) -> float:
        """Seconds since the context was entered."""
        return time.monotonic() - self._started

    def update(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        """Moves to `step`; with the record of a logged step its numbers show as well."""
        if record:
            self._record = {**self._record, **record} if self.keeps_numbers else dict(record)
        counter = f"step {step}/{self.total}" if self.total else f"step {step}"
        self.show(step, self.total, counter, training_numbers(self._record) if record else None)

    def from_step(self, start: int) -> Callable[[int, float], None]:
        """A function of (steps done, loss) for a training that begins at step `start` of the whole; shows them now and then."""
        shown = -math.inf

        def report(step: int, loss: float) -> None:
            nonlocal shown
            done, now, numbers = start + step, time.monotonic(), None
            if now - shown >= self.interval:
                shown, numbers = now, {"step": done, "loss": loss}
                if done and self.total:
                    numbers["eta_seconds"] = self.elapsed / done * (self.total - done)
            self.update(done, numbers)

        return report

    def show(self, done: float | None, total: float | None, counter: str, numbers: Numbers | None) -> None:
        """Shows `done` of `total`; `numbers` None leaves those of the last time."""

    def say(self, message: str) -> None:
        """A line for the person who watches, above the bar."""


def _percent(done: float | None, total: float | None) -> str:
    return f"{100 * done / total:.1f} %" if total and done is not None else ""


class PlainProgress(Progress):
    """One line for each logged step: log files, CI, clusters."""

    interval = 10.0
    keeps_numbers = False

    def show(self, done: float | None, total: float | None, counter: str, numbers: Numbers | None) -> None:
        if numbers is not None:
            percent = _percent(done, total)
            self.say("  ".join(filter(None, [f"{counter or self.description}{f' ({percent})' if percent else ''}", _joined(numbers)])))

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


class TerminalProgress(Progress):
    """A bar and a line of numbers under it, redrawn in place."""

    interval = 0.1

    def __init__(self, total: int | None, description: str):
        super().__init__(total, description)
        self._console = Console(stderr=True)
        self._state: tuple[float | None, float | None, str] = (0, total, "")
        self._numbers: Numbers = ()
        # stdout is for results: rich may hold it back for the bar only where both end on the same screen.
        self._live = Live(console=self._console, get_renderable=self._render, redirect_stdout=sys.stdout.isatty())

    def __enter__(self) -> Progress:
        super().__enter__()
        self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.stop()

    def show(self, done: float | None, total: float | None, counter: str, numbers: Numbers | None) -> None:
        self._state = (done, total, counter)
        self._numbers = self._numbers if numbers is None else numbers

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        done, total, counter = self._state
        bar = ProgressBar(total=total or None, completed=done or 0, pulse=not total, complete_style="cyan", finished_style="green")
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        tail = "  ".join(filter(None, [counter, _percent(done, total), duration(self.elapsed)]))
        line.add_row(Text(self.description, style="bold"), bar, tail)
        numbers = Text(" " * (len(self.description) + 1))
        for i, (label, value) in enumerate(self._numbers):
            numbers.append("   " if i else "").append(f"{label} " if label else "", style="dim")
            numbers.append(value, style="bold red" if value in ("nan", "inf", "-inf") else "")
        return Group(line, numbers) if self._numbers else Group(line)


class NotebookProgress(Progress):
    """One output cell, updated in place: a bar, its numbers and what was said."""

    interval = 0.5

    def __init__(self, total: int | None, description: str):
        super().__init__(total, description)
        self._state: tuple[float | None, float | None, str] = (0, total, "")
        self._numbers: Numbers = ()
        self._said: list[str] = []
        self._display_id: str | None = None
        self._drawn = -math.inf

    def __enter__(self) -> Progress:
        super().__enter__()
        self._draw()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._draw()

    def show(self, done: float | None, total: float | None, counter: str, numbers: Numbers | None) -> None:
        self._state = (done, total, counter)
        self._numbers = self._numbers if numbers is None else numbers
        if time.monotonic() - self._drawn >= self.interval:  # every update is a message to the browser
            self._draw()

    def say(self, message: str) -> None:
        self._said.append(message)
        self._draw()

    def _draw(self) -> None:
        from IPython.display import display, update_display

        done, total, counter = self._state
        tail = "  ".join(filter(None, [counter, _percent(done, total), duration(self.elapsed)]))
        lines = [f"{self.description}  {tail}", _joined(self._numbers)]
        amount = f'value="{done or 0}" max="{total}"' if total else ""
        said = "".join(html.escape(message) + "\n" for message in self._said)
        head, numbers = (html.escape(line) for line in lines)
        page = f'<pre style="margin:0">{said}<progress {amount} style="width:24em"></progress> {head}\n{numbers}</pre>'
        bundle = {"text/plain": "\n".join([*self._said, *filter(None, lines)]), "text/html": page}
        if self._display_id is None:
            self._display_id = uuid.uuid4().hex
            display(bundle, raw=True, display_id=self._display_id)
        else:
            update_display(bundle, raw=True, display_id=self._display_id)
        self._drawn = time.monotonic()


def _presentation() -> type[Progress]:
    ipython = sys.modules.get("IPython")
    if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):  # the shell of a terminal has no kernel; None has none either
        return NotebookProgress
    # `!jaxdistill ...` in a cell of Jupyter or Colab runs on a terminal that cannot move its cursor up.
    below_notebook = "JPY_PARENT_PID" in os.environ or "COLAB_RELEASE_TAG" in os.environ
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return TerminalProgress if sys.stderr.isatty() and not below_notebook and not dumb else PlainProgress


def choose_progress(total: int | None, description: str, is_main: bool) -> Progress:
    """The presentation for where this runs: notebook, terminal or plain lines; a silent one unless `is_main`."""
    return (_presentation() if is_main else Progress)(total, description)


@contextlib.contextmanager
def preparing(description: str, is_main: bool = True) -> Iterator[Callable[..., None]]:
    """A small bar for preparing the data.

    Yields `progress(*, documents, tokens, bytes_done=None, bytes_total=None)`: totals so far, called as often as one likes. Speed and
    time left count from its first call, so a preparation that goes on from an earlier one does not look faster than it is.
    """
    first: tuple[float, int, int] | None = None  # time, tokens, bytes
    shown, pending = -math.inf, None

    def progress(*, documents: int, tokens: int, bytes_done: int | None = None, bytes_total: int | None = None) -> None:
        nonlocal first, shown, pending
        now = time.monotonic()
        first = first or (now, tokens, bytes_done or 0)
        seconds, new_bytes = now - first[0], (bytes_done or 0) - first[2]
        numbers = [("", f"{documents:,} documents"), ("", f"{tokens:,} tokens")]
        if seconds > 0 and tokens > first[1]:
            numbers.append(("", f"{(tokens - first[1]) / seconds:,.0f} tokens/s"))
        if bytes_total and bytes_done is not None and new_bytes > 0:
            numbers.append(("eta", duration(seconds / new_bytes * (bytes_total - bytes_done))))
        pending = (bytes_done, bytes_total, "", numbers)
        if now - shown >= bar.interval:
            bar.show(*pending)
            shown, pending = now, None

    with choose_progress(None, description, is_main) as bar:
        try:
            yield progress
        finally:
            if pending is not None:
                bar.show(*pending)
