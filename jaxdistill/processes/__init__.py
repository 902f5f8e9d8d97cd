"""Several processes as one run: each drives the devices of its host, all compute the same program.

On one process everything here does nothing. What only one may do (write metrics, say something) the main process does, number 0;
what any of them may find wrong is raised by all of them, so that none is left waiting; when one dies or hangs, the others end.
"""

from jaxdistill.processes.exchange import barrier, check_shared, count, from_main, gathered, index, is_main, together
from jaxdistill.processes.group import asking, check_joined, end, fail, hosts, join, joined, only_on_main
from jaxdistill.processes.watch import STOPPED

__all__ = [
    "STOPPED",
    "asking",
    "barrier",
    "check_joined",
    "check_shared",
    "count",
    "end",
    "fail",
    "from_main",
    "gathered",
    "hosts",
    "index",
    "is_main",
    "join",
    "joined",
    "only_on_main",
    "together",
]
