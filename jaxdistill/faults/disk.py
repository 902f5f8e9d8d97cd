"""A disk that is full or refuses, whichever library says so and how."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxdistill import processes
from jaxdistill.errors import InputError
from jaxdistill.redaction import first_line

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


class CommitFailures(logging.Filter):
    """Of Orbax's log: lets nothing through, and ends several processes when one of them cannot write its part of a checkpoint.

    Orbax says so nowhere else: its threads, and with them the main threads of all, would wait for one another for 20 minutes.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and "background save thread" in record.getMessage() and processes.count() > 1:
            fault = _disk_fault(error, self._folder)
            why = f"{fault}; what lies there is kept, and the same command goes on" if fault else first_line(str(error))
            processes.fail(f"output: {self._folder} cannot be written: {why}", 2 if fault else 1)
        return record.levelno >= logging.CRITICAL


def without_abandoned(hook: Callable) -> Callable:
    """A hook for `sys.unraisablehook` without the page that Orbax leaves of every array under way when one fails; that one is raised."""

    def quiet(unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if "Event loop is closed" not in str(unraisable.exc_value) and not (code and "orbax" in code.co_filename):
            hook(unraisable)

    return quiet
