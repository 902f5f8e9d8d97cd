"""What the processes of a run must have in common before it begins, and its folder, which the main one makes for all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import jax

from jaxdistill import processes
from jaxdistill.config import Config
from jaxdistill.data import RowSource
from jaxdistill.errors import InputError
from jaxdistill.models import weights_sha256
from jaxdistill.output import begin_output, hold_output
from jaxdistill.resolve import Run


def check_same(runs: Sequence[Run]) -> None:
    """Raises InputError where a process has another config, JAX or tokenizer than the main one: other programs, or other rows."""
    tokenizers = [f"tokenizer: {run.tokenizer.fingerprint}" for run in runs]
    own = [f"jax: {jax.__version__}", *tokenizers, *(line.strip() for run in runs for line in run.config.to_yaml().splitlines())]
    theirs = processes.from_main(own)
    with processes.together():
        for ours, line in itertools.zip_longest(own, theirs, fillvalue="nothing"):
            if ours != line:
                raise InputError(f"config: {ours!r} here and {line!r} in process 0; give every process the same config, JAX and tokenizer")


def check_same_teacher(run: Run) -> None:
    """Raises InputError where a host has other weights than the main process's."""
    if processes.count() > 1:
        own = weights_sha256(run.teacher_folder)
        main = processes.from_main(own)
        with processes.together():
            if own != main:
                raise InputError(f"teacher: the weights in {run.teacher_folder} are not those of process 0; give all the same files")


def check_same_rows(run: Run, rows: RowSource) -> None:
    """Raises InputError where a host reads other rows than the main process."""
    main = processes.from_main(rows.fingerprint)
    with processes.together():
        if rows.fingerprint != main:
            raise InputError("data: the text or task here is not that of process 0; give all processes the same files")


@contextmanager
def held(config: Config) -> Iterator[None]:
    """The output folder, made and held by the main process."""
    with ExitStack() as stack:
        with processes.together():
            if processes.is_main():
                stack.enter_context(hold_output(config))
        yield


def open_output(run: Run, *, goes_on: bool) -> None:
    """The run's config in its folder, and what is stale there removed; by the main process, before any other writes."""
    with processes.together():
        if processes.is_main():
            begin_output(run.saved, goes_on=goes_on)
