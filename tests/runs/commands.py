"""The command line in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from waiting import PATIENCE


def environment(num_devices: int = 1) -> dict[str, str]:
    """Of a command in a process of its own: as a user runs it, but with this many fake devices and no network."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "jaxdistill-test-compiled")}
    return os.environ | cache | {"JAX_NUM_CPU_DEVICES": str(num_devices), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def command(*arguments: str | Path, num_devices: int = 1) -> subprocess.Popen:
    line = [sys.executable, "-m", "jaxdistill.cli", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(num_devices))


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that ends by itself."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err
