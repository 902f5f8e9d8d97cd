"""Several processes of a command over localhost, and their end whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commands import environment
from waiting import PATIENCE, wait_for


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Started:
    """Processes under way; their output is in files of `folder`."""

    processes: list[subprocess.Popen]
    folder: Path
    address: str

    def error(self, number: int) -> str:
        return (self.folder / f"{number}.err").read_text()

    def output(self, number: int) -> str:
        return (self.folder / f"{number}.out").read_text()

    def last_line(self, number: int) -> str:
        return self.error(number).strip().splitlines()[-1]

    def wait(self, *, but: Sequence[int] = (), seconds: float = PATIENCE) -> list[int | None]:
        """Exit codes of all (None: of those in `but`, which are not waited for)."""
        until = time.monotonic() + seconds
        codes: list[int | None] = []
        for number, process in enumerate(self.processes):
            if number in but:
                codes.append(None)
                continue
            try:
                codes.append(process.wait(max(until - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {number} has not ended in {seconds} s: {self.error(number)[-3000:]}") from None
        return codes

    def until(self, number: int, text: str) -> None:
        """Waits until a process has said this on stderr."""
        wait_for(lambda: text in self.error(number), self.processes[number], lambda: self.error(number)[-3000:])

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exception) -> None:
        self.stop()


def start(folder: Path, count: int, *arguments: str | Path, devices: int = 1, only: int | None = None, **variables: str) -> Started:
    """`count` processes of `python -m ARGUMENTS`, each with so many devices; with `only` that one alone, the others never come."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    # Every program is kept: processes that are started again would spend most of their time on compiling.
    own = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = environment(devices) | own | variables
    processes = []
    for number in range(count) if only is None else [only]:
        line = [sys.executable, "-m", *map(str, arguments), "--coordinator", address, "--processes", str(count), "--process", str(number)]
        with open(folder / f"{len(processes)}.out", "w") as out, open(folder / f"{len(processes)}.err", "w") as err:
            processes.append(subprocess.Popen(line, stdout=out, stderr=err, env=env))
    return Started(processes, folder, address)


def run(folder: Path, count: int, *arguments: str | Path, devices: int = 1, **variables: str) -> Started:
    """The same, waited for; each must end with 0."""
    with start(folder, count, *arguments, devices=devices, **variables) as started:
        codes = started.wait()
        assert codes == [0] * count, "\n".join(f"{n}: {code}\n{started.error(n)[-3000:]}" for n, code in enumerate(codes))
    return started
