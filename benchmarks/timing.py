"""Step times that mean something: warmed up, waited for, and on a CPU without the steps that other processes disturbed."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

DISTURBED = 0.05  # share of the cores that others may use during a step that counts
WARM_UP_STEPS = 3


def busy_seconds() -> tuple[float, float]:
    """CPU seconds of all processes of the machine, and those that its cores had."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0, time.perf_counter()
    ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second


def wait_until_idle(until: float) -> None:
    """Until the cores are left alone for half a second, or the patience is over."""
    while time.monotonic() < until:
        busy, total = busy_seconds()
        time.sleep(0.5)
        after, total_after = busy_seconds()
        if after - busy < DISTURBED * max(total_after - total, 1e-9):
            return


def timed(step: Callable[[], object], wait: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Of `repeats` steps in a row, then waited for: seconds and page faults a step, and the share of the cores that others used."""
    busy, total = busy_seconds()
    own, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    seconds = time.perf_counter() - start
    own, faults = time.process_time() - own, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    after, total_after = busy_seconds()
    return seconds / repeats, max(after - busy - own, 0.0) / max(total_after - total, 1e-9), faults / repeats


def measure(step: Callable[[], object], wait: Callable[[], object], job: dict, warmed_up: Callable[[], object] = lambda: None) -> dict:
    """Times of `step`, which need not wait for its results: `wait` does.

    Args:
      job: "steps" timings; "repeats" of one (an accelerator is given several steps before it is waited for, as in a run);
        "cpu": only undisturbed timings count, as many as asked for, or past "patience" seconds any.
      warmed_up: called once between the first steps and those that are timed.

    Returns:
      "first": seconds of the first step, with whatever it compiles; "seconds" of the others; "others": the largest share of the
      cores that other processes had, "faults": page faults of each step, "disturbed": how many of them were.
    """
    start = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - start
    for _ in range(WARM_UP_STEPS - 1):
        step()
    wait()
    warmed_up()
    until, results, wanted = time.monotonic() + job["patience"], [], job["steps"]
    allowed = DISTURBED if job["cpu"] else 1.0
    while sum(share <= allowed for _, share, _ in results) < wanted:
        if len(results) >= wanted and time.monotonic() > until:
            break
        if job["cpu"] and (not results or results[-1][1] > allowed):
            wait_until_idle(until)
        results.append(timed(step, wait, job["repeats"]))
    best = sorted(results, key=lambda result: result[1] > allowed and result[1])[:wanted]
    seconds, shares, faults = (list(column) for column in zip(*best, strict=True))
    disturbed = sum(share > allowed for share in shares)
    return {"first": first, "seconds": seconds, "others": max(shares), "faults": faults, "disturbed": disturbed}


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
