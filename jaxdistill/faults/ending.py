"""How a command ends: one line on stderr, and an exit code that says who has to do something."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxdistill import processes
from jaxdistill.errors import TRY_AGAIN, DivergedError, InputError, PreemptedError
from jaxdistill.faults.preemption import stoppable


def _end(code: int) -> NoReturn:
    processes.end(code)
    raise SystemExit(code) from None


def _leave(code: int) -> NoReturn:
    """Ends the process here: threads of a computation that was left in its midst crash an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(command: Callable[[], None]) -> None:
    """Exit codes: 0 done; 2 the input or the disk must be put right (one line on stderr); 75 stopped by SIGTERM, or another process is
    lost: the same command goes on; 130 interrupted; 1 anything else."""
    try:
        with stoppable(program=True):
            command()
    except PreemptedError as error:
        print(_stopped(str(error)), file=sys.stderr)
        processes.end(TRY_AGAIN)
        _leave(TRY_AGAIN)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(2)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        _end(1)
    except BrokenPipeError:
        # The reader of a pipe (head) has gone: nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        _end(2)
    except SystemExit as error:
        if error.code == 130:  # typer makes it of KeyboardInterrupt, without a word
            interrupt = error.__context__ and error.__context__.__cause__
            _say_interrupted(interrupt or KeyboardInterrupt())
        if error.code:
            _end(error.code)
        raise
    except KeyboardInterrupt as error:
        _say_interrupted(error)
        _end(130)


def _say_interrupted(error: BaseException) -> None:
    if processes.is_main():
        print(_stopped(str(error) if error.args else "interrupted"), file=sys.stderr)


def _stopped(message: str) -> str:
    if "; " in message:  # it says by itself how to go on
        return message
    newest, rest = "goes on from the newest checkpoint", "goes on with what is not done"
    goes_on = {"distill": newest, "quickstart": newest, "evaluate": rest, "prepare": rest}
    return f"{message}; the same command {goes_on.get(sys.argv[1] if sys.argv[1:] else '', 'begins anew')}"
