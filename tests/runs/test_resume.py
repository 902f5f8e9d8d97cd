"""kill -9, SIGTERM and start again: bit-equal to a run that was left alone; other devices: equal to rounding."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import command, finish
from safetensors.numpy import load_file, save_file
from waiting import wait_for


def write_config(ground, folder: Path, **changes) -> Path:
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(ground.config(folder / "run", **changes)))
    return path


def run_losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / "export" / "small" / "model.safetensors")


pytestmark = [pytest.mark.long, pytest.mark.usefixtures("compiled_once")]  # Orbax is the same whatever the jax; test_methods resumes too

STEPS = {"training__steps": 40, "training__checkpoint_every": 3, "training__evaluate_every": 20}


@pytest.fixture(scope="module")
def uninterrupted(ground, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "one"
    code, _, err = finish(command("distill", write_config(ground, folder, **STEPS)))
    assert code == 0, err
    return folder


def checkpoint_folders(folder: Path) -> list[str]:
    checkpoints = folder / "run" / "checkpoints"
    return [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []


def killed_when(process: subprocess.Popen, condition) -> None:
    wait_for(condition, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def saved_step(folder: Path) -> int:
    return max((int(name) for name in checkpoint_folders(folder) if name.isdigit()), default=0)


@pytest.fixture(scope="module")
def killed(ground, tmp_path_factory) -> Path:
    """A run that was stopped before its first checkpoint, killed twice in a save and between two steps, and stopped again."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    config = write_config(ground, folder, **STEPS)
    first = command("distill", config)
    wait_for((folder / "run" / "config.yaml").exists, first)
    code, _, err = finish(command("distill", config, "--overwrite"))  # a second one, while the first works
    assert code == 2 and "another process is working on the run" in err
    first.send_signal(signal.SIGTERM)  # it is about to compile
    code, _, err = finish(first)
    assert code == 75 and err.splitlines()[-1].startswith("stopped"), err
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # had it been so quick
    for earlier in (6, 12):

        def saving(earlier: int = earlier) -> bool:
            return any(name.endswith("-tmp") and int(name.split(".")[0]) > earlier for name in checkpoint_folders(folder))

        killed_when(command("distill", config), saving)
    moment = random.randint(16, 24)
    metrics = folder / "run" / "metrics.jsonl"
    killed_when(command("distill", config), lambda: metrics.read_bytes().count(b"\n") > moment and saved_step(folder) > 12)
    last = command("distill", config)
    begun = saved_step(folder)
    wait_for(lambda: saved_step(folder) > begun, last)
    last.send_signal(signal.SIGTERM)
    code, _, err = finish(last)
    assert code == 75, err
    stopped = err.splitlines()[-1]
    assert stopped == f"stopped at step {saved_step(folder)}; the same command goes on from step {saved_step(folder)}"
    return folder


def test_killed_again_and_again(killed, tmp_path, uninterrupted):
    folder = tmp_path / "killed"
    shutil.copytree(killed, folder)
    code, _, err = finish(command("distill", folder / "run"))
    assert code == 0, err
    assert f"going on from step {saved_step(killed)}" in err
    assert run_losses(folder) == run_losses(uninterrupted)
    expected, found = weights(uninterrupted), weights(folder)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_goes_on_with_other_devices(killed, tmp_path, uninterrupted):
    """Written by one device; 2 and 4 of 8 fake devices go on."""
    expected = run_losses(uninterrupted)
    meshes = {2: ["mesh.data=1", "mesh.fsdp=2"], 4: ["mesh.data=2", "mesh.tensor=2"]}
    processes = {}
    for num_devices, mesh in meshes.items():
        folder = tmp_path / str(num_devices)
        shutil.copytree(killed, folder)
        processes[num_devices] = command("distill", folder / "run", *mesh, num_devices=num_devices)
    for num_devices, process in processes.items():
        code, _, err = finish(process)
        assert code == 0, err
        assert "going on from step" in err
        found = run_losses(tmp_path / str(num_devices))
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5, err_msg=str(num_devices))


def test_another_teacher_under_the_same_name_is_refused(ground, tmp_path, cli):
    teacher = tmp_path / "teacher"
    shutil.copytree(ground.teacher, teacher)
    config = write_config(ground, tmp_path / "a", teacher=str(teacher), training__steps=2)
    assert cli("distill", config)[0] == 0
    changed = load_file(teacher / "model.safetensors")
    changed["embeddings.LayerNorm.bias"] += 1
    save_file(changed, teacher / "model.safetensors")
    code, _, err = cli("distill", config)
    assert code == 2
    assert "teacher: its weights changed" in err


def test_a_run_goes_on_with_the_text_that_it_began_with(ground, tmp_path, cli):
    """The source changes or vanishes: the run has its token store, and nobody's hours are thrown away."""
    text = tmp_path / "text.jsonl"
    shutil.copy(ground.text, text)
    config = write_config(ground, tmp_path / "a", data__sources=[str(text)], data__store=None, training__steps=4)
    assert cli("distill", config)[0] == 0
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "4"
    shutil.rmtree(checkpoint)
    text.write_text("")
    code, _, err = cli("distill", config)
    assert (code, checkpoint.is_dir()) == (0, True), err
    assert "going on from step 2" in err
    shutil.rmtree(checkpoint)
    shutil.rmtree(tmp_path / "a" / "run" / "tokens")
    text.write_text('{"text": "another text"}\n')
    code, _, err = cli("distill", config)
    assert code == 2 and "data: the text or its tokenizer changed" in err
