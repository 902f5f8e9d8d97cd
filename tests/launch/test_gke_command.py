"""The container's command as Kubernetes starts it: `command`, then `args`, without a shell of its own."""

from __future__ import annotations

import signal
import subprocess

from stand_ins import HOSTILE, JAXDISTILL, environment, noted, write_command
from test_launch_files import container
from waiting import PATIENCE, wait_for


def start(tmp_path, arguments: list[str], **more: str) -> subprocess.Popen:
    commands = tmp_path / "commands"
    write_command(commands, "jaxdistill", JAXDISTILL)
    write_command(commands, "pip", "import sys; sys.exit(sys.argv[1:3] != ['install', '--quiet'] or sys.argv[-1] != 'jax[tpu]')")
    return subprocess.Popen(container()["command"] + arguments, env=environment(commands, tmp_path / "notes", **more), cwd=tmp_path)


def test_arguments_arrive_as_they_are(tmp_path):
    process = start(tmp_path, [*container()["args"], *HOSTILE], CODES="75")
    assert process.wait(timeout=PATIENCE) == 75
    (note,) = noted(tmp_path / "notes")
    assert note["arguments"] == ["distill", *container()["args"][1:], *HOSTILE]


def test_sigterm_reaches_it(tmp_path):
    process = start(tmp_path, container()["args"], LINGER="1")
    wait_for(lambda: noted(tmp_path / "notes"), process)
    assert noted(tmp_path / "notes")[0]["pid"] == process.pid  # no shell between
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
