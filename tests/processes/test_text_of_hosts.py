"""What processes must have in common before a run begins."""

from __future__ import annotations

import json

import pytest

from jaxdistill import processes
from jaxdistill.config import load_config
from jaxdistill.errors import InputError
from jaxdistill.hosts import check_same, check_same_rows, check_same_teacher
from jaxdistill.resolve import resolve, resolve_stages
from jaxdistill.text import prepare_text


@pytest.fixture
def other_process(monkeypatch):
    """Makes this process number 1 of 2, which hears `said` of the main one."""

    def become(*said) -> None:
        words = iter(said)
        monkeypatch.setattr(processes, "is_main", lambda: False)
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "from_main", lambda value: next(words))

    return become


def run_of(small_ground, folder, **fields):
    config = small_ground.config(folder / "run", **fields)
    return resolve(load_config(config | {"data": config["data"] | {"store": str(folder / "store")}}))


def test_other_rows_are_refused(small_ground, tmp_path, other_process):
    run = run_of(small_ground, tmp_path)
    rows = prepare_text(run, None)
    other_process(rows.fingerprint, "f" * 64)
    check_same_rows(run, rows)
    with pytest.raises(InputError, match=r"^data: the text or task here is not that of process 0"):
        check_same_rows(run, rows)


def test_another_config_or_teacher_is_refused(small_ground, tmp_path, other_process):
    runs = resolve_stages(load_config(small_ground.config(tmp_path / "run")))
    mine: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "from_main", lambda value: mine.append(json.loads(json.dumps(value))) or value)
        check_same(runs)
    theirs = [line.replace("batch_size: 8", "batch_size: 16") for line in mine[0]]
    tokenizer = [line.partition(": ")[0] + ": other" if line.startswith("tokenizer: ") else line for line in mine[0]]
    other_process(theirs, theirs[1:], tokenizer, "0" * 64)
    with pytest.raises(InputError, match=r"config: 'batch_size: 8' here and 'batch_size: 16' in process 0; give every process the same"):
        check_same(runs)
    for what in ("jax", "tokenizer"):
        with pytest.raises(InputError, match=f"config: '{what}: "):
            check_same(runs)
    with pytest.raises(InputError, match=r"teacher: the weights in .* are not those of process 0"):
        check_same_teacher(runs[0])
