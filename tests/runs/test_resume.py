"""kill -9 and start again: bit-equal to a run that was left alone; other devices: equal to rounding."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import command, finish
from safetensors.numpy import load_file


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


pytestmark = pytest.mark.long  # Orbax is the same whatever the jax; test_methods resumes too

STEPS = {"training__steps": 40, "training__checkpoint_every": 3, "training__evaluate_every": 20}


@pytest.fixture(scope="module")
def uninterrupted(ground, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "one"
    code, _, err = finish(command("distill", write_config(ground, folder, **STEPS)))
    assert code == 0, err
    return folder


def wait_for(process, condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1]}"
        assert time.monotonic() < end
        time.sleep(0.002)


def checkpoint_folders(folder: Path) -> list[str]:
    checkpoints = folder / "run" / "checkpoints"
    return [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []


def kill_when(ground, folder: Path, condition) -> None:
    config = folder / "config.yaml" if folder.exists() else write_config(ground, folder, **STEPS)
    process = command("distill", config)
    wait_for(process, condition)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_resumes_bit_equal(folder: Path, uninterrupted: Path, *, from_the_start: bool = False) -> None:
    code, _, err = finish(command("distill", folder / "run"))
    assert code == 0, err
    assert ("going on from step" in err) is not from_the_start, err
    assert run_losses(folder) == run_losses(uninterrupted)
    expected, found = weights(uninterrupted), weights(folder)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_killed_at_a_random_step(ground, tmp_path, uninterrupted):
    folder = tmp_path / "killed"
    moment = random.randint(4, 36)

    def reached() -> bool:
        path = folder / "run" / "metrics.jsonl"
        saved = any(name.isdigit() for name in checkpoint_folders(folder))  # saving is asynchronous, and these steps are short
        return saved and path.read_bytes().count(b"\n") > moment

    kill_when(ground, folder, reached)
    assert_resumes_bit_equal(folder, uninterrupted)


def test_killed_during_a_save_and_killed_again(ground, tmp_path, uninterrupted):
    folder = tmp_path / "killed"
    for earlier in (6, 12):

        def saving(earlier: int = earlier) -> bool:
            return any(name.endswith("-tmp") and int(name.split(".")[0]) > earlier for name in checkpoint_folders(folder))

        kill_when(ground, folder, saving)
    assert_resumes_bit_equal(folder, uninterrupted)


def test_killed_before_the_first_checkpoint(ground, tmp_path, uninterrupted):
    folder = tmp_path / "killed"
    kill_when(ground, folder, lambda: (folder / "run" / "config.yaml").exists())
    assert not [name for name in checkpoint_folders(folder) if name.isdigit()]
    assert_resumes_bit_equal(folder, uninterrupted, from_the_start=True)


def test_goes_on_with_other_devices(ground, tmp_path, uninterrupted):
    """Stopped after step 12 by a copy of its folder, then 1, 2 and 4 of 8 fake devices."""
    base = tmp_path / "base"
    kill_when(ground, base, lambda: any(name.isdigit() and int(name) >= 12 for name in checkpoint_folders(base)))
    expected = run_losses(uninterrupted)
    meshes = {1: ["mesh.data=1"], 2: ["mesh.data=1", "mesh.fsdp=2"], 4: ["mesh.data=2", "mesh.tensor=2"]}
    processes = {}
    for num_devices, mesh in meshes.items():
        folder = tmp_path / str(num_devices)
        shutil.copytree(base, folder)
        processes[num_devices] = command("distill", folder / "run", *mesh, num_devices=num_devices)
    for num_devices, process in processes.items():
        code, _, err = finish(process)
        assert code == 0, err
        assert "going on from step" in err
        found = run_losses(tmp_path / str(num_devices))
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5, err_msg=str(num_devices))


def test_another_teacher_under_the_same_name_is_refused(ground, tmp_path):
    from safetensors.numpy import save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(ground.teacher, teacher)
    config = write_config(ground, tmp_path / "a", teacher=str(teacher), training__steps=2)
    assert finish(command("distill", config))[0] == 0
    changed = load_file(teacher / "model.safetensors")
    changed["embeddings.LayerNorm.bias"] += 1
    save_file(changed, teacher / "model.safetensors")
    code, _, err = finish(command("distill", config))
    assert code == 2
    assert "teacher: its weights changed" in err


def test_a_run_goes_on_with_the_text_that_it_began_with(ground, tmp_path):
    """The source changes or vanishes: the run has its token store, and nobody's hours are thrown away."""
    text = tmp_path / "text.jsonl"
    shutil.copy(ground.text, text)
    config = write_config(ground, tmp_path / "a", data__sources=[str(text)], data__store=None, training__steps=4)
    assert finish(command("distill", config))[0] == 0
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "4"
    shutil.rmtree(checkpoint)
    text.write_text("")
    code, _, err = finish(command("distill", config))
    assert (code, checkpoint.is_dir()) == (0, True), err
    assert "going on from step 2" in err
    shutil.rmtree(checkpoint)
    shutil.rmtree(tmp_path / "a" / "run" / "tokens")
    text.write_text('{"text": "another text"}\n')
    code, _, err = finish(command("distill", config))
    assert code == 2 and "data: the text or its tokenizer changed" in err


def test_a_second_process_is_refused_while_the_first_works(ground, tmp_path):
    config = write_config(ground, tmp_path / "a", **STEPS)
    first = command("distill", config)
    wait_for(first, lambda: (tmp_path / "a" / "run" / "config.yaml").exists())
    code, _, err = finish(command("distill", config, "--overwrite"))
    assert code == 2 and "another process is working on the run" in err
    assert finish(first)[0] == 0
