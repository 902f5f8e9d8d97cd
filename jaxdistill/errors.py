"""What the user got wrong, and where: the command line prints it as one line and exits with 2."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# A password or a token inside a URL, and the Hub's tokens wherever they stand. A user's name alone (abfs://container@account) is none.
_PARAMETERS = r"(?:access_|auth_|x-amz-security-|hf_)?token|api_?key|password|secret|sig|signature|x-(?:amz|goog)-signature|awsaccesskeyid"
_SECRET = re.compile(
    rf"(?P<before>[:/]/)[^/\s@]*:[^/\s@]*(?=@)|(?P<name>[?&;](?:{_PARAMETERS})=)[^&;\s'\"]+|\bhf_[A-Za-z0-9]{{16,}}", re.IGNORECASE
)
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


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


def holds_secret(text: str) -> bool:
    """Whether a text holds what must not be written down: a password in a URL, a token."""
    return redacted(text) != text


def redacted(text: str) -> str:
    """The text with stars for passwords in URLs, for tokens of the Hub and for what the environment holds as a token."""
    for value in filter(None, map(os.environ.get, _ENVIRONMENT)):
        if len(value) >= 8:  # a shorter one is a placeholder, and would blot out words
            text = text.replace(value, "***")
    return _SECRET.sub(lambda found: f"{found['before'] or found['name'] or ''}***", text)


# What a person has to put right on a disk. Some libraries pass it on as text alone.
_DISK = {getattr(errno, name): os.strerror(getattr(errno, name)) for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EACCES", "EPERM")}


def _disk_fault(error: BaseException | None, folder: Path) -> str | None:
    while error is not None:
        if isinstance(error, OSError) and error.filename and not Path(error.filename).absolute().is_relative_to(folder.absolute()):
            return None
        if isinstance(error, OSError) and error.errno in _DISK:
            return error.strerror or _DISK[error.errno]
        if found := next((text for text in _DISK.values() if text in str(error)), None):
            return found
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(what: str, folder: str | Path) -> Iterator[None]:
    """Around writing: a disk that is full or refuses becomes an InputError that names the folder. `what`: the field, as in `output`."""
    fault = None
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        fault = _disk_fault(error, Path(folder))
        if fault is None:
            raise
    if fault:  # here, so that nothing of what was under way is kept alive by it
        raise InputError(f"{what}: {folder} cannot be written: {fault}; what lies there is kept, and the same command goes on")


def without_abandoned(hook: Callable) -> Callable:
    """A hook for `sys.unraisablehook` without the page that Orbax leaves of every array under way when one fails; that one is raised."""

    def quiet(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if "Event loop is closed" not in str(unraisable.exc_value) and not (code and "orbax" in code.co_filename):
            hook(unraisable)

    return quiet


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
