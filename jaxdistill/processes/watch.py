"""Ends this process when another one has died, hangs or has failed, with one line that names it.

Each process says in the coordination service that it lives; the main one looks at all and says who is lost. JAX has a heartbeat of
its own, but it aborts without a name that can be read, so that it is left as the second line, twice as patient.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from jaxdistill.errors import TRY_AGAIN

GOES_ON = "; all end, and the same command goes on from the newest checkpoint"
STOPPED = "stopped; what was finished is kept, the same command goes on"
_BEATS, _FAILURES, _VERDICT = "jaxdistill/beats/", "jaxdistill/failures/", "jaxdistill/verdict/"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where JAX's runtime writes that a process was sent SIGTERM, or told by its platform
GRACE_SECONDS = 3.0  # between the first process that fails and the last that fails of the same


class Watch:
    """Of a process that has joined others; `start` begins, `stop` ends before an orderly end."""

    def __init__(self, client: Any, number: int, hosts: list[str], heartbeat: float):
        self._client, self._number, self._hosts, self.heartbeat = client, number, hosts, heartbeat
        self.interval = min(max(heartbeat / 8, 0.1), 5.0)
        self._stopped = threading.Event()
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}  # process -> its last beat, and when it came
        self._failed_since: float | None = None
        self.own_failure: str | None = None
        self.asked = False  # the run itself asks for notices, after every step
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._look_at_main)]

    def start(self) -> None:
        self._seen = {number: ("", time.monotonic()) for number in range(len(self._hosts))}
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._threads[0].join(2 * self.interval)  # of a main process that hangs it would wait for ever

    def name(self, number: int) -> str:
        return f"process {number} ({self._hosts[number]})"

    def _beat(self) -> None:
        beat = 0
        while not self._stopped.wait(self.interval):
            beat += 1
            try:
                self._client.key_value_set(f"{_BEATS}{self._number}", str(beat), allow_overwrite=True)
                if self._number == 0:
                    self._look_at_all()
                verdict = self._client.key_value_dir_get(_VERDICT)
            except Exception:  # of gRPC: the service is gone
                if not self._stopped.is_set():
                    self._lost(0, "has died")
                return
            self._answered = time.monotonic()
            if verdict:
                self._obey(json.loads(verdict[0][1]))

    def _look_at_main(self) -> None:
        """A main process that hangs does not answer at all."""
        while not self._stopped.wait(self.interval):
            if time.monotonic() - self._answered > self.heartbeat:
                self._lost(0, f"has not answered for {self.heartbeat:g} s")

    def _look_at_all(self) -> None:
        if not self.asked and self._noticed():
            self.judge(None, "was told to stop", TRY_AGAIN)
            return
        for key, beat in self._client.key_value_dir_get(_BEATS):
            number = int(key.rpartition("/")[2])
            if self._seen[number][0] != beat:
                self._seen[number] = (beat, time.monotonic())
        for number, (_, when) in self._seen.items():
            if time.monotonic() - when > self.heartbeat and number:
                self.judge(number, f"has not been heard of for {self.heartbeat:g} s", TRY_AGAIN)
                return
        failures = self.failures()
        certain = [number for number, failure in failures.items() if not failure["perhaps_lost"]]
        if certain and self.own_failure is None and len(certain) < len(self._hosts):
            self._failed_since = self._failed_since or time.monotonic()
            if time.monotonic() - self._failed_since > GRACE_SECONDS:
                number = min(certain)
                self.judge(number, f"has failed: {failures[number]['message']}", failures[number]["code"])

    def _noticed(self) -> bool:
        try:
            return bool(self._client.key_value_try_get(_NOTICE))
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return False
            raise

    def judge(self, number: int | None, what: str, code: int) -> None:
        """Says to all why they end, with the process that is to blame; the first to be said counts."""
        if not self._client.key_value_dir_get(_VERDICT):
            self._client.key_value_set(f"{_VERDICT}0", json.dumps({"process": number, "what": what, "code": code}), allow_overwrite=True)

    def failures(self) -> dict[int, dict]:
        """Processes that have failed by themselves."""
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in self._client.key_value_dir_get(_FAILURES)}

    def fail(self, message: str, code: int, *, perhaps_lost: bool) -> bool:
        """Says that this process has failed; whether all have, and the main one in the same words.

        Where some have not within the grace, they are told of the first that has, which ends them.

        Args:
          perhaps_lost: the failure may be that another process is lost: then the watch ends this one as soon as it knows which.
        """
        self.own_failure = None if perhaps_lost else message
        until = time.monotonic() + (self.heartbeat + 4 * self.interval if perhaps_lost else GRACE_SECONDS)
        own = {"message": message, "code": code, "perhaps_lost": perhaps_lost}
        failures: dict[int, dict] = {}
        try:
            self._client.key_value_set(f"{_FAILURES}{self._number}", json.dumps(own), allow_overwrite=True)
            while not self._all_alike(failures := self.failures(), perhaps_lost):
                if time.monotonic() > until:
                    first = min(failures, key=lambda number: (failures[number]["perhaps_lost"], number))
                    self.judge(first, f"has failed: {failures[first]['message']}", failures[first]["code"])
                    break
                time.sleep(0.05)
        except Exception:  # of gRPC: the main process is gone, which the watch says, unless this process has its own to say
            time.sleep(2 * self.interval if perhaps_lost else 0)
        self.own_failure = message
        return self._all_alike(failures, perhaps_lost) and failures[0]["message"] == message

    def _all_alike(self, failures: dict[int, dict], perhaps_lost: bool) -> bool:
        """Whether every process has failed by itself, or every one by what another may have done."""
        return len(failures) == len(self._hosts) and all(each["perhaps_lost"] == perhaps_lost for each in failures.values())

    def linger(self) -> None:
        """The service ends with the main process: until the others have read what it says."""
        time.sleep(2 * self.interval if len(self.failures()) < len(self._hosts) else 0.3)

    def _obey(self, verdict: dict) -> None:
        if self.own_failure is not None:
            return  # it is about to end by itself
        if self._number == 0:
            self.linger()
        self._end(verdict["process"], verdict["what"], verdict["code"])

    def _lost(self, number: int, what: str) -> None:
        if self.own_failure is None:
            self._end(number, what, TRY_AGAIN)

    def _end(self, number: int | None, what: str, code: int) -> NoReturn:
        end_now(STOPPED if number is None else f"error: {self.name(number)} {what}{GOES_ON if code == TRY_AGAIN else ''}", code)


def end_now(line: str | None, code: int) -> NoReturn:
    """Ends the process from any thread, whatever the others wait for."""
    if line is not None:
        show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
        os.write(2, f"{show_cursor}{line}\n".encode())
    os._exit(code)


_keep: list[Any] = []  # what C calls must not be collected


def instead_of_abort(explain: Any) -> None:
    """Puts a line of ours under the page that JAX's runtime prints when it gives up (main process gone, nobody came), and our exit code.

    It calls abort() from a thread of its own: no Python signal handler would be run.

    Args:
      explain: () -> (line, exit code); None: the abort has another reason and goes on.
    """

    def handler(number: int) -> None:
        found = explain()
        if found is not None:
            end_now(*found)
        c_library.signal(number, None)

    c_library = ctypes.CDLL(None)
    c_library.signal.argtypes, c_library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    c_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    _keep.append(c_handler)
    c_library.signal(signal.SIGABRT, ctypes.cast(c_handler, ctypes.c_void_p))


def answers(address: str, seconds: float = 2.0) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError:
        return False
    return True
