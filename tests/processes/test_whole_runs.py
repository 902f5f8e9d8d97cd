"""Whole runs on 1, 2 and 4 processes: the same losses; stopped on 4, they go on with 2, 1 and 4; killed, to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from worker import distil

from jaxdistill.batches import training_batches
from jaxdistill.config import load_config
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.text import prepare_text
from launch import run, start

pytestmark = pytest.mark.usefixtures("compiled_once")
MESHES = {
    2: {"data": {}, "fsdp": {"data": 1, "fsdp": -1}, "tensor": {"data": 1, "tensor": -1}},
    4: {"data": {}, "fsdp and tensor": {"data": 1, "fsdp": 2, "tensor": 2}},
}


def run_jobs(folder: Path, count: int, jobs: dict, *, devices: int = 1) -> list[dict]:
    """What each process found, with the jobs done one after the other in one start."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run(folder, count, "worker", folder / "jobs.json", folder, devices=devices)
    found = [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]
    assert [each["devices"] for each in found] == [count * devices] * count
    assert [each["main"] for each in found] == [True] + [False] * (count - 1)
    return found


def losses(found: dict) -> np.ndarray:
    values = [[record.get("small/loss"), record.get("small/held_out")] for record in found["history"]]
    return np.array(values, np.float64)


def equal(a: dict, b: dict) -> None:
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)
    np.testing.assert_allclose(a["sums"], b["sums"], rtol=1e-5)
    assert [record["tokens"] for record in a["history"]] == [record["tokens"] for record in b["history"]]


@pytest.fixture(scope="module")
def alone(small_ground, compiled_once, tmp_path_factory) -> dict:
    """The run in one process."""
    found = distil(small_ground.config(tmp_path_factory.mktemp("alone") / "run"))
    assert not np.isnan(losses(found)[1:, 0]).any() and len(found["history"]) == 5
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def elastic(small_ground, folder) -> dict:
    """A run that is done by 4 processes to step 1, by 2 to step 2, by 1 to step 3 and by 4 to its end."""
    return small_ground.config(folder / "elastic")


def of_meshes(small_ground, folder: Path, count: int) -> dict:
    training = small_ground.config(folder)["training"] | {"checkpoint_every": 4}
    return {name: small_ground.config(folder / f"{name}{count}", mesh=mesh, training=training) for name, mesh in MESHES[count].items()}


@pytest.fixture(scope="module")
def four(small_ground, compiled_once, folder, elastic) -> list[dict]:
    jobs = {"exchange": "exchange", "elastic": {"config": elastic, "until": 1}}
    return run_jobs(folder / "four", 4, jobs | of_meshes(small_ground, folder, 4))


@pytest.fixture(scope="module")
def killed(small_ground, compiled_once, folder) -> dict:
    """A run of two processes of which the second was killed."""
    training = small_ground.config(folder)["training"] | {"steps": 12}
    config = small_ground.config(folder / "killed", training=training)
    (folder / "killed.json").write_text(json.dumps(config))
    command = ("jaxdistill.cli", "distill", folder / "killed.json", "--heartbeat", "8")
    with start(folder / "first", 2, *command, devices=2) as started:
        started.until(0, "step 3/12")
        started.processes[1].kill()
        assert started.wait(but=[1], seconds=30)[0] == 75
    assert started.last_line(0).startswith("error: process 1 (")
    assert "step" not in started.error(1), "one process speaks"
    assert not (folder / "killed" / "export").exists()
    return config


@pytest.fixture(scope="module")
def two(small_ground, four, folder, elastic, killed) -> list[dict]:
    """After `four`: two processes of two devices each."""
    jobs = {"elastic": {"config": elastic, "until": 2}, "rows": {"rows": elastic}}
    jobs |= {"killed": killed, "uninterrupted": killed | {"output": str(folder / "uninterrupted")}}
    jobs |= {"export": {"export": str(folder / "data4"), "to": str(folder / "exported")}}
    return run_jobs(folder / "two", 2, jobs | of_meshes(small_ground, folder, 2), devices=2)


def test_losses_are_those_of_one_process(alone, four, two):
    for found in (two, four):
        for mesh in MESHES[len(found)]:
            equal(found[0][mesh], alone)
            assert all(each[mesh] == found[0][mesh] for each in found), "every process has the students"


def test_a_run_goes_on_with_other_numbers_of_processes(alone, two, folder, elastic):
    assert distil(elastic, until=3) is None
    found = run_jobs(folder / "again", 4, {"elastic": elastic})
    equal(found[0]["elastic"], alone)
    assert len((folder / "elastic" / "metrics.jsonl").read_text().splitlines()) == len(alone["history"]), "written once"
    assert not list((folder / "elastic").glob(".shared-*"))


def test_killed_and_started_again_a_run_ends_with_the_same_bits(two, folder):
    said = (folder / "two" / "0.err").read_text()
    assert said.count("(holds this run: going on with it)") == 2 and "Distilled" not in (folder / "two" / "1.out").read_text()
    weights = [(folder / name / "export" / "small" / "model.safetensors").read_bytes() for name in ("uninterrupted", "killed")]
    assert weights[0] == weights[1]


def test_one_process_exports(two, folder):
    assert [each["export"] for each in two] == [[str(folder / "exported" / "small")], []]
    weights = [(folder / name / "small" / "model.safetensors").read_bytes() for name in ("exported", "data4/export")]
    assert weights[0] == weights[1]


def test_words_of_processes(four):
    assert [each["exchange"] for each in four] == [[0, [{"number": n} for n in range(4)]]] * 4


def test_rows_of_a_process_need_not_lie_side_by_side(two, elastic):
    """The devices of the two processes alternate."""
    by_start = {start: rows for each in two for start, rows in each["rows"]}
    assert [[start for start, _ in each["rows"]] for each in two] == [[0, 4], [2, 6]]
    resolved = resolve(load_config(elastic))
    batch = next(training_batches(resolved, prepare_text(resolved, None), create_mesh(resolved.config.mesh), 0))
    whole = np.asarray(batch["input_ids"])
    np.testing.assert_array_equal(np.concatenate([by_start[start] for start in (0, 2, 4, 6)], axis=1), whole)
