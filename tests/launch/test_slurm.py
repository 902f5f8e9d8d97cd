"""slurm.sbatch against a stand-in of SLURM: batch script, tasks and their variables, signals, the queue."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from jax._src.clusters.slurm_cluster import SlurmCluster
from stand_ins import HOSTILE, JAXDISTILL, batch_environment, noted, spooled, write_command
from waiting import PATIENCE, wait_for

import jaxdistill


@pytest.fixture
def job(tmp_path):
    """job(*arguments, nodes=2, ...) -> the running batch script, whose tasks are stand-ins of jaxdistill."""

    def submit(*arguments: str, nodes: int = 2, **more: str) -> subprocess.Popen:
        environment = batch_environment(tmp_path, nodes=nodes, node_list="node[1-2],other7" if nodes > 1 else "node1", **more)
        write_command(tmp_path / "commands", "jaxdistill", JAXDISTILL)
        return subprocess.Popen([*spooled(tmp_path), *arguments], cwd=tmp_path, env=environment)

    return submit


def started(notes, tasks: int) -> list[dict]:
    wait_for(lambda: len(noted(notes)) == tasks, said=lambda: f"{len(noted(notes))} of {tasks} tasks started")
    return noted(notes)


def requeued(tmp_path) -> bool:
    return (tmp_path / "notes" / "requeued").exists()


def test_one_process_on_each_node(job, tmp_path, monkeypatch):
    """Arguments as they were given; JAX finds the job, its size and the first node in what each task has."""
    assert job("my run.yaml", *HOSTILE).wait(timeout=PATIENCE) == 0
    tasks = sorted(noted(tmp_path / "notes"), key=lambda task: task["environment"]["SLURM_PROCID"])
    assert [task["arguments"] for task in tasks] == [["distill", "my run.yaml", *HOSTILE]] * 2
    assert {task["cwd"] for task in tasks} == {str(tmp_path)} and not list(tmp_path.rglob("pwned")) and not requeued(tmp_path)
    for number, task in enumerate(tasks):
        assert task["environment"]["SLURM_CPUS_PER_TASK"] == "32"  # srun has to be told
        with monkeypatch.context() as patch:
            for name, value in task["environment"].items():
                patch.setenv(name, value)
            assert SlurmCluster.is_env_present()
            assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (2, number)
            assert SlurmCluster.get_coordinator_address(None, None) == f"node1:{61440 + 4711 % 4096}"
            assert SlurmCluster.get_local_process_id() == 0


@pytest.mark.parametrize(
    "codes, expected, again",
    [("75 75", 75, True), ("0 75", 75, True), ("2 2", 2, False), ("1 75", 75, True), ("0 1", 1, False), ("137 75", 137, True)],
)
def test_what_can_go_on_goes_back_to_the_queue(job, tmp_path, codes, expected, again):
    assert job("run.yaml", CODES=codes).wait(timeout=PATIENCE) == expected
    assert requeued(tmp_path) == again


def test_killed_a_job_goes_back_a_few_times(job, tmp_path):
    assert job("run.yaml", CODES="137 75", SLURM_RESTART_COUNT="5").wait(timeout=PATIENCE) == 137
    assert not requeued(tmp_path)


def test_before_the_time_is_over(job, tmp_path):
    """--signal without B: goes to the tasks, not to the script."""
    process = job("run.yaml", LINGER="1")
    for task in started(tmp_path / "notes", 2):
        os.kill(task["pid"], signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75 and requeued(tmp_path)


def test_cancelled(job, tmp_path):
    """scancel sends SIGTERM to the script too: it stays cancelled."""
    process = job("run.yaml", nodes=1, LINGER="1")
    (task,) = started(tmp_path / "notes", 1)
    process.send_signal(signal.SIGTERM)
    os.kill(task["pid"], signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == -signal.SIGTERM and not requeued(tmp_path)


def test_without_slurm(tmp_path):
    """The careless way, `bash launch/slurm.sbatch run.yaml`: it says what is missing."""
    line = ["bash", *spooled(tmp_path), "run.yaml"]
    done = subprocess.run(line, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 127 and "srun: command not found" in done.stderr


def free_job_id() -> int:
    """JAX makes the coordinator's port of a job's number: one whose port is free."""
    for job_id in range(os.getpid(), os.getpid() + 100):
        with socket.socket() as listener:
            if listener.connect_ex(("localhost", 61440 + job_id % 4096)):
                return job_id
    raise AssertionError("no port is free")


def test_two_nodes_distil(teacher_and_text, tmp_path):
    """The real command in both tasks: one run over two hosts, said and written once."""
    teacher, text = map(str, teacher_and_text)
    fields = {
        "teacher": teacher,
        "data": {"sources": [text], "sequence_length": 16, "held_out": 0.1},
        "students": {"small": {"num_layers": 2}},
        "objective": [{"kind": "relation_kl", "relation_heads": 6}],
        "training": {"steps": 4, "batch_size": 8, "log_every": 1, "evaluate_rows": 12, "tensorboard": False},
    }
    (tmp_path / "my run.yaml").write_text(yaml.safe_dump(fields))
    more = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HF_HUB_OFFLINE": "1"}
    more["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "jaxdistill-test-compiled")
    more["PYTHONPATH"] = str(Path(jaxdistill.__file__).parents[1])
    environment = batch_environment(tmp_path, nodes=2, node_list="localhost", job_id=free_job_id(), **more)
    write_command(
        tmp_path / "commands",
        "jaxdistill",
        f"import os, sys; os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'jaxdistill.cli', *sys.argv[1:]])",
    )
    line = [*spooled(tmp_path), "my run.yaml", "output=out put/small", "students.small.intermediate_size=64"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^devices: 2 cpu.*\(data 2,", done.stderr, re.MULTILINE)) == 1
    records = [json.loads(record) for record in (tmp_path / "out put" / "small" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert (tmp_path / "out put" / "small" / "export" / "small" / "model.safetensors").exists()
