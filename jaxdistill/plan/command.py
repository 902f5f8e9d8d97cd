"""The command: a config's runs, each planned and printed as soon as it is compiled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from jaxdistill.config import Config, select_students
from jaxdistill.errors import InputError, nearest
from jaxdistill.plan.ahead import stay_on_the_host
from jaxdistill.plan.plan import plan_run, show_plan
from jaxdistill.plan.topology import parse_topology
from jaxdistill.resolve import resolve_stages


def plan_command(
    config: Config, topology: str, *, students: Sequence[str], stage: str | None, compile_step: bool, search_batch: bool
) -> None:
    """Prints the plan of every stage, or of one.

    Raises:
      InputError: an unknown topology or stage, or what `resolve` finds: a mesh that does not cover the devices, a batch that
        does not divide.
    """
    target = parse_topology(topology)
    stay_on_the_host(target.chip)
    runs = resolve_stages(select_students(config, students), num_devices=target.num_devices, platform=target.chip.platform)
    if stage is not None:
        names = [run.stage for run in runs]
        if stage not in names:
            known = nearest(stage, names) if any(names) else "; the config has no stages"
            raise InputError(f"--stage: no stage {stage!r}{known}")
        runs = tuple(run for run in runs if run.stage == stage)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for run in runs:
        tell = partial(print, file=sys.stderr, flush=True)
        console.print(show_plan(plan_run(run, target, compile_step=compile_step, search_batch=search_batch, tell=tell)))
