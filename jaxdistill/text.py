"""The rows that a run reads: a token store, made if it is not there; text that is read while the run goes on; or a task's examples."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxdistill import processes
from jaxdistill.data import RowSource, open_stream, prepare
from jaxdistill.errors import InputError
from jaxdistill.faults.disk import writing
from jaxdistill.hosts import check_same_rows
from jaxdistill.progress import preparing
from jaxdistill.resolve import Run
from jaxdistill.tasks import open_task
from jaxdistill.urls import is_url


def prepare_text(run: Run, record: dict | None, *, verify: bool = False) -> RowSource:
    """The run's rows: those that it began with, if `record` names them. A token store is made, by all processes, if it is not there."""
    expected, data = record and record["identity"]["data"], run.config.data
    if data.task or data.streaming:
        with processes.together():
            rows = rows_without_store(run, expected)
        check_same_rows(run, rows)
        return rows
    if is_url(run.store):
        return prepare_store(run, expected, verify)
    processes.check_shared(Path(run.store), "data.store")
    with writing("data.store", Path(run.store)):
        return prepare_store(run, expected, verify)


def prepare_store(run: Run, expected: str | None, verify: bool) -> RowSource:
    said: list[str] = []
    with preparing("Preparing text", is_main=processes.is_main()) as report:
        options = {"expected": expected, "verify": verify, "shared": True, "tell": said.append}
        rows = prepare(run.config.data, tokenizer=run.tokenizer, store=run.store, progress=report, **options)
    for line in said:  # below the bar, which is gone by then
        print(line, file=sys.stderr, flush=True)
    return rows


def rows_without_store(run: Run, expected: str | None) -> RowSource:
    """A task's rows, or text that is read while the run goes on; `expected`: the fingerprint that it began with."""
    data, training = run.config.data, run.config.training
    if data.task:
        rows = open_task(data.task, tokenizer=run.tokenizer, family=run.teacher.family, sequence_length=data.sequence_length)
    else:
        kept = {"batch_size": training.batch_size, "held_out_rows": training.evaluate_rows}
        rows = open_stream(data, tokenizer=run.tokenizer, folder=Path(run.store), **kept)
    if expected not in (None, rows.fingerprint):
        what = "data.task: its rows or the tokenizer" if data.task else "data.sources: text or tokenizer"
        raise InputError(f"{what} changed since the run in {run.output} began; --overwrite begins anew")
    return rows
