"""What the user got wrong, and where: the command line prints it as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from jaxdistill.redaction import redacted

TRY_AGAIN = 75  # exit code (EX_TEMPFAIL): nothing is wrong with the input, the same command goes on


class DivergedError(Exception):
    """Every student of a run has diverged: nothing is left to train."""


class PreemptedError(BaseException):
    """The machine is wanted back: what was finished is kept, and the same command goes on (exit 75).

    No `Exception`, as KeyboardInterrupt is none: a signal may raise it anywhere.
    """


class InputError(ValueError):
    """The user's input is wrong: one line that names the place, what is wrong and what would be right."""

    def __init__(self, message: str):
        super().__init__(redacted(" ".join(message.split())))


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
