"""SIGTERM and Ctrl-C: where they stop, what they leave as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from waiting import PATIENCE

from jaxdistill.errors import PreemptedError
from jaxdistill.faults.preemption import between_steps, stoppable, stopped


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def heard():
    """A suite in the background of a script is started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def handlers() -> tuple:
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def test_it_stops_at_once_outside_of_a_training_and_puts_back_what_was_there():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("mine"))
    try:
        mine = handlers()
        with pytest.raises(PreemptedError), stoppable(), stoppable():
            tell(signal.SIGTERM)
        assert handlers() == mine
        assert signal.set_wakeup_fd(-1) == -1
        tell(signal.SIGTERM)
        assert heard == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, PreemptedError), (signal.SIGINT, KeyboardInterrupt)])
def test_a_training_asks_at_every_step_and_a_second_signal_stops_at_once(number, error):
    before = handlers()
    with stoppable():
        with pytest.raises(error, match=r"^stopped at step 3$"), between_steps() as asked:
            for step in range(1, 9):
                if step == 3:
                    tell(number)
                if asked(step):
                    assert step == 3
                    raise stopped(f"stopped at step {step}")
        with pytest.raises(error), between_steps() as asked:
            tell(number)
            assert asked(1)
            tell(number)
            pytest.fail("the second signal did not stop it")
        with pytest.raises(error, match=r"^stopped after the last step$"), between_steps():
            tell(number)
        with pytest.raises(error):  # at once again
            tell(number)
    assert handlers() == before


def test_a_thread_and_an_ignored_signal_are_left_alone():
    found = []

    def work():
        with stoppable(), between_steps() as asked:
            found.append((handlers(), asked(1)))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable():
            tell(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, ignored)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with pytest.raises(PreemptedError), stoppable(program=True):
            tell(signal.SIGINT)
            tell(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, ignored)


# A C function that hears no signal and lets other threads run, as a compiler does; and a worker process that its parent ends.
BUSY = """
import hashlib, multiprocessing, sys, time
from jaxdistill.faults.preemption import stoppable

with stoppable(program=True):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join()
    print("child", child.exitcode, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_main_thread_that_cannot_hear_is_stopped_without_it_and_a_child_is_no_matter(number, code):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"child {-signal.SIGTERM}\n"
    time.sleep(0.3)
    assert process.poll() is None
    told = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (code, "stopped; what was finished is kept, the same command goes on\n")
    assert time.monotonic() - told < 10
