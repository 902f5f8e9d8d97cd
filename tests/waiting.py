"""How long a test waits for what must come: a guard against hanging, never a measure, since a busy machine is slow."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

PATIENCE = 600.0


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None, said: Callable[[], str] = str) -> None:
    """Until the condition holds; an error once the process has ended or patience has, with what was said."""
    end = time.monotonic() + PATIENCE
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended and condition():
            return
        assert not ended, f"ended before it came to that: {said() or process.communicate()}"
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {said()}"
        time.sleep(0.002)
