"""Faults of a disk, as libraries say them."""

from __future__ import annotations

import errno
import logging
import sys

import pytest

from jaxdistill import processes
from jaxdistill.faults.disk import CommitFailures


def record(error: Exception, message: str = "[process=1] Failed to run 3 Handler Commit operations in background save thread"):
    try:
        raise error
    except Exception:
        return logging.LogRecord("absl", logging.ERROR, "x.py", 1, message, (), sys.exc_info())


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; what lies there is kept, and the same command", 2),
        (ValueError("OUT_OF_RANGE: File too large [source locations='x']"), "File too large; what lies there is kept", 2),
        (RuntimeError("of another kind\nand more"), "of another kind", 1),
    ],
)
def test_a_write_that_fails_in_a_thread_ends_several_processes(error, said, code, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(processes, "fail", lambda message, code: ended.append((message, code)))
    failures = CommitFailures(tmp_path)
    assert not failures.filter(record(error)) and not ended  # one process: it is raised where it waits
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert not failures.filter(record(error, "something else")) and not ended
    assert not failures.filter(record(error))
    ((message, found),) = ended
    assert message.startswith(f"output: {tmp_path} cannot be written: {said}") and found == code and "\n" not in message
