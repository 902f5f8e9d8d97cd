"""A process that dies, hangs, fails or never comes: the others end in time, with one line that names it."""

from __future__ import annotations

import signal
import socket
import time

from jaxdistill.processes import STOPPED
from launch import start

HEARTBEAT = 8.0  # a process of a busy machine may not get to run for seconds
HERE = socket.gethostname()
# way -> processes, the one that is lost, its signal, what the others say of it
WAYS = {
    "killed": (2, 1, signal.SIGKILL, "has not been heard of for 8 s"),
    "hung": (3, 2, signal.SIGSTOP, "has not been heard of for 8 s"),
    "main killed": (2, 0, signal.SIGKILL, "has died"),
    "main hung": (2, 0, signal.SIGSTOP, "has not answered for 8 s"),
}


def test_the_others_end_within_the_heartbeat_and_name_it(tmp_path):
    groups = {way: start(tmp_path / way, WAYS[way][0], "looping", "looping", "--heartbeat", str(HEARTBEAT)) for way in WAYS}
    try:
        for group in groups.values():
            for number in range(len(group.processes)):
                group.until(number, "computing")
        when = {}
        for way, (_, lost, how, _) in WAYS.items():
            groups[way].processes[lost].send_signal(how)
            when[way] = time.monotonic()
        for way, (count, lost, _, line) in WAYS.items():
            codes = groups[way].wait(but=[lost])
            assert time.monotonic() - when[way] < 2.5 * HEARTBEAT, way
            for number in {*range(count)} - {lost}:
                said = groups[way].last_line(number)
                assert said == f"error: process {lost} ({HERE}) {line}; all end, and the same command goes on from the newest checkpoint"
                assert codes[number] == 75
                assert groups[way].error(number).count("error: process") == 1
    finally:
        for group in groups.values():
            group.stop()


def test_what_one_process_finds_wrong_or_is_told_is_said_by_each_and_one_that_never_comes_is_waited_for_so_long(tmp_path):
    fails = start(tmp_path / "fails", 2, "looping", "looping", "--fails", "1")
    told = start(tmp_path / "told", 2, "looping", "looping", "--heartbeat", str(HEARTBEAT))  # it never asks for notices
    alone = [start(tmp_path / f"only{n}", 2, "looping", "looping", "--join-timeout", "2", only=n) for n in (0, 1)]
    with fails, told, alone[0], alone[1]:
        assert fails.wait() == [2, 2]
        assert fails.last_line(1) == "error: the disk of this host is full"
        assert fails.last_line(0) == f"error: process 1 ({HERE}) has failed: the disk of this host is full"
        for number, what in ((0, "not all of the 2 processes came"), (1, f"nobody answers at {alone[1].address}")):
            assert alone[number].wait() == [75]
            assert alone[number].last_line(0) == f"error: process {number}: {what} within 2 s (--join-timeout)"
        told.until(0, "computing")
        told.processes[1].send_signal(signal.SIGTERM)
        assert told.wait(seconds=30) == [75, 75]
        assert [told.last_line(number) for number in (0, 1)] == [STOPPED, STOPPED]
