"""Joining the other processes of a run, and leaving them: in good order, or at once when one has failed."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from jaxdistill.errors import TRY_AGAIN, DivergedError, InputError, PreemptedError
from jaxdistill.processes import exchange
from jaxdistill.processes.detect import Place, find_place
from jaxdistill.processes.watch import GOES_ON, Watch, answers, end_now, instead_of_abort

HEARTBEAT_SECONDS = 60.0
JOIN_SECONDS = 300.0

_watch: Watch | None = None
_hosts: list[str] = []
_ending: tuple[str | None, int] | None = None  # how this process is about to end


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: float = HEARTBEAT_SECONDS,
    timeout: float = JOIN_SECONDS,
) -> None:
    """Join the other processes of the run, before any device is used. Alone, or where `jax.distributed` is initialised: does nothing.

    Args:
      coordinator: HOST:PORT that process 0 listens at; this and the next two are the cluster's where it has them.
      heartbeat: seconds without a sign of life after which a process counts as lost and the others end, with exit code 75.
      timeout: seconds to wait for the others.

    Raises:
      InputError: flags that cannot be; the port is taken. Others that do not come within `timeout` end the process: one line, exit
        code 75.
    """
    import jax

    global _watch
    if heartbeat < 1 or timeout < 1:
        raise InputError(f"--heartbeat and --join-timeout are at least 1 second, got {heartbeat:g} and {timeout:g}")
    if jax.distributed.is_initialized():
        return
    place = find_place(coordinator, processes, process, timeout=timeout)
    if place is None:
        return
    if place.number == 0:
        _check_free(place.coordinator)
    instead_of_abort(functools.partial(_explain_abort, place, timeout))
    try:
        jax.distributed.initialize(
            place.coordinator, place.count, place.number, place.devices,
            cluster_detection_method="deactivate",  # done, and it would take one GPU of several
            initialization_timeout=int(timeout), heartbeat_timeout_seconds=int(2 * heartbeat) + 10,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(f"process {place.number}: cannot join at {place.coordinator}: {error}") from None
    _hosts[:] = exchange.gathered(socket.gethostname())
    _watch = Watch(exchange.client(), place.number, _hosts, heartbeat)
    _watch.start()


def _check_free(address: str) -> None:
    """Raises InputError if somebody listens at this port already: JAX's runtime would crash."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a run before may linger
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(f"process 0: cannot listen at {address}: {error.strerror}; give another port") from None


def hosts() -> list[str]:
    """Host of each process; [] where they did not join through here."""
    return list(_hosts)


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Inside, the run asks for notices (SIGTERM to any process) after every step; elsewhere one ends all processes where they are."""
    if _watch is not None:
        _watch.asked = True
    yield
    if _watch is not None:  # and not where an error passes: a run that stops has a checkpoint to finish
        _watch.asked = False


def check_joined() -> None:
    """Raises InputError where devices of processes are here that cannot talk to each other."""
    import jax

    if jax.process_count() != exchange.count():
        raise InputError(
            f"{jax.process_count()} processes hold devices, but they have not joined: call jax.distributed.initialize() before "
            f"anything else, or use the command line"
        )


def _explain_abort(place: Place, timeout: float) -> tuple[str | None, int] | None:
    if _ending is not None:
        return _ending
    alone = place.number > 0 and not answers(place.coordinator)
    if _watch is None:
        what = f"nobody answers at {place.coordinator}" if alone else f"not all of the {place.count} processes came"
        return f"error: process {place.number}: {what} within {timeout:g} s (--join-timeout)", TRY_AGAIN
    return (f"error: {_watch.name(0)} has died{GOES_ON}", TRY_AGAIN) if alone else None


@contextlib.contextmanager
def joined(**flags: Any) -> Iterator[None]:
    """Around a command: `join`, and at its end all processes leave together; what fails in one ends all."""
    join(**flags)
    try:
        yield
    except (Exception, KeyboardInterrupt, PreemptedError) as error:
        if _watch is not None:
            _leave_failed(_watch, error)
        raise
    if _watch is not None:
        exchange.barrier()
        _watch.stop()
        import jax

        jax.distributed.shutdown()


def _leave_failed(watch: Watch, error: BaseException) -> None:
    """Returns where the command line is to say the error: in the main process, or where it is this process's own.

    What is wrong with all in the same words, the main process says; else everybody is told whose error it is.
    """
    import jax

    global _ending
    of_file = isinstance(error, OSError) and error.filename is not None
    expected = of_file or isinstance(error, (InputError, DivergedError, PreemptedError, KeyboardInterrupt))
    code = {InputError: 2, PreemptedError: TRY_AGAIN, KeyboardInterrupt: 130}.get(type(error), 2 if of_file else 1)
    # What JAX raises of a collective that breaks because a peer has died is any of these.
    broken = isinstance(error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError)) and "RESOURCE_EXHAUSTED" not in str(error)
    first = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split()) or type(error).__name__
    perhaps_lost = broken and not expected
    _ending = None if perhaps_lost else (None, code)
    said = first if expected else f"{type(error).__name__}: {first}"[:300]
    same = watch.fail(said, code, perhaps_lost=perhaps_lost)
    if not expected:
        traceback.print_exception(error)
    watch.stop()
    if not expected or (same and not exchange.is_main()):
        end(code)


def end(code: int) -> None:
    """Ends this process if it had joined others: JAX's own end would wait for them. Returns where it had not."""
    global _ending
    if _watch is None or not exchange.client():
        return
    _ending = (None, code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if exchange.is_main():
        with contextlib.suppress(Exception):  # of gRPC
            _watch.linger()
    end_now(None, code)


def fail(message: str, code: int) -> None:
    """Ends this process from any thread with its error, and with it the others, which name it. Alone: does nothing."""
    global _ending
    if _watch is not None:
        _ending = (None, code)
        _watch.fail(message, code, perhaps_lost=False)
        print(f"error: {message}", file=sys.stderr)
        end(code)


def only_on_main(work: Callable[[], Any]) -> None:
    """Work of one process, on the devices of its host, while the others wait for it at the end of the command."""
    import jax

    if exchange.count() > 1:
        jax.local_devices()  # the devices of a pod come up together or not at all
        if exchange.is_main():
            print(f"one of {exchange.count()} processes does this, on the devices of its host", file=sys.stderr)
    if exchange.is_main():
        work()
