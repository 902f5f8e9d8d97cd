"""Being told to stop: SIGTERM (the machine is wanted back) or Ctrl-C. A training stops between two steps, anything else where it is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

from jaxdistill import processes
from jaxdistill.errors import TRY_AGAIN, PreemptedError

_PATIENCE = 2.0  # seconds until a main thread that does not hear (it is inside the compiler) is stopped without it


class _Now:
    """What this process was told. One of it: signals belong to a process."""

    installed = False
    between_steps = False  # somebody asks at every step
    asked: int | None = None  # the signal
    heard = threading.Event()


def _handle(number: int, _frame) -> None:
    again, _Now.asked = _Now.asked is not None, number
    _Now.heard.set()
    if again or not _Now.between_steps:
        raise KeyboardInterrupt if number == signal.SIGINT else PreemptedError("stopped")


def _watch(reader: socket.socket, codes: dict[int, int]) -> None:
    """A handler waits for the main thread to be in Python; a compilation may take longer than a machine is left to us.

    Args:
      codes: signal -> exit code.
    """
    with reader:
        while number := reader.recv(1):
            if number[0] in codes and not _Now.between_steps and not _Now.heard.wait(_PATIENCE):
                cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
                print(f"{cursor}{processes.STOPPED}", file=sys.stderr, flush=True)
                os._exit(codes[number[0]])


def _child() -> None:
    if _Now.installed:  # a worker process is ended by its parent
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_child)


@contextlib.contextmanager
def _handled(number: int) -> Iterator[bool]:
    """Our handler for a signal, where one may be set and the signal is not ignored; yields whether it is ours."""
    before = signal.getsignal(number) if threading.current_thread() is threading.main_thread() else None
    if before is None or before is signal.SIG_IGN:  # None: not of Python's making, so that it could not be put back
        yield False
        return
    signal.signal(number, _handle)
    try:
        yield True
    finally:
        signal.signal(number, before)


def _joined() -> bool:
    """Whether JAX's runtime of several processes catches SIGTERM itself, and tells the other processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def stoppable(*, program: bool = False) -> Iterator[None]:
    """Inside, SIGTERM raises PreemptedError wherever the main thread is; the handler that was there is put back. May be nested.

    Args:
      program: Ctrl-C too ends the process if the main thread does not hear it, which a notebook would not like.
    """
    if _Now.installed or _joined():
        yield
        return
    wanted = {signal.SIGTERM: TRY_AGAIN} | ({signal.SIGINT: 130} if program else {})
    with contextlib.ExitStack() as stack:
        codes = {number: code for number, code in wanted.items() if stack.enter_context(_handled(number))}
        if signal.SIGTERM not in codes:
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        _Now.installed, _Now.asked = True, None
        _Now.heard.clear()
        threading.Thread(target=_watch, args=(reader, codes), name="signals", daemon=True).start()
        try:
            yield
        finally:
            _Now.installed = False
            signal.set_wakeup_fd(before)
            writer.close()  # the thread reads the end of it


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[int], bool]]:
    """Inside, the first SIGTERM or Ctrl-C is kept until it is asked for; a second one stops at once.

    Yields `asked(step)`, to be called after every step: whether to stop there. On several processes all hear the same answer at
    the same step, whichever of them was told (there Ctrl-C, which goes to the launcher, stops at once).
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        with processes.asking():
            yield multihost_utils.reached_preemption_sync_point if jax.config.jax_enable_preemption_service else lambda _step: False
        return
    with _handled(signal.SIGINT):
        _Now.between_steps, _Now.asked = True, None
        try:
            yield lambda _step: _Now.asked is not None
        finally:
            _Now.between_steps = False
    if _Now.asked is not None:  # after the last step was looked at
        raise stopped("stopped after the last step")


def stopped(message: str) -> BaseException:
    """What a training raises that was asked to stop."""
    return KeyboardInterrupt(message) if _Now.asked == signal.SIGINT else PreemptedError(message)
