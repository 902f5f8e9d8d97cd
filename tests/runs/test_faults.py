"""Damaged checkpoints, full disks, signals and losses gone wrong: what a run does, what it keeps (docs/reliability.md)."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import jaxdistill
from jaxdistill import checkpoint, evaluate
from jaxdistill.batches import run_order
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.config import load_config
from jaxdistill.data import TokenStore, prepare
from jaxdistill.faults.checksums import DamagedError
from jaxdistill.models import load_pretrained
from jaxdistill.recorder import Recorder
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state

pytestmark = pytest.mark.usefixtures("compiled_once")


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "small" / "model.safetensors")


def assert_same_end(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert losses(one) == losses(other)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    found = [(record["step"], record["loss"]) for record in records(run) if "loss" in record]
    assert len(found) == len(dict(found))
    return dict(found)


def write(path: Path, config: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def done(ground, tmp_path_factory) -> Path:
    """A finished run of 8 steps, with the checkpoints of its steps 6 and 8."""
    return jaxdistill.distill(ground.config(tmp_path_factory.mktemp("done") / "run")).output


def at_step(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as it was when that step was saved."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    shutil.rmtree(to / "export")
    kept = [line for line in (to / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step]
    (to / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    return to


# Checkpoints


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


DAMAGE = {
    "truncated": lambda folder: os.truncate(largest(folder / "state"), largest(folder / "state").stat().st_size // 2),
    "flipped bit": lambda folder: flip(largest(folder / "state")),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no record": lambda folder: shutil.rmtree(folder / "record"),
    "torn record": lambda folder: os.truncate(largest(folder / "record"), 100),
    "another record": lambda folder: largest(folder / "record").write_text(
        largest(folder / "record").read_text().replace('"tokens": ', '"tokens": 1')
    ),
}


def like_of(run_folder: Path):
    run = resolve(load_config(run_folder))
    return abstract_state(run, load_pretrained(run.teacher_folder)[1], create_mesh(run.config.mesh))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(done, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(done / "checkpoints", folder)
    DAMAGE[damage](folder / "8")
    said = []
    with Checkpoints(folder) as checkpoints:
        step, state = checkpoints.newest_whole(lambda number: checkpoints.restore(number, like_of(done)), said.append)
        assert step == int(state.step) == 6
        assert (
            len(said) == 1 and said[0].startswith("checkpoint 8 is damaged (") and said[0].endswith("aside as 8.damaged, going back to 6")
        )
        assert checkpoints.steps() == [6]
        checkpoints.save(8, state, checkpoints.record(6))
        checkpoints.wait()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_whole(checkpoints.record, said.append)[0] == 8 and len(said) == 1
    assert {path.name for path in folder.iterdir()} == {"6", "8", "8.damaged"}


def test_an_array_that_is_not_what_was_written_is_named(done, tmp_path, monkeypatch):
    """What the files' own checks do not see: another value, written in good order."""
    folder, name = tmp_path / "checkpoints", "students/small/trained/params/embeddings/word/embedding"
    shutil.copytree(done / "checkpoints", folder)
    sums = checkpoint.checksums
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(8, like_of(done))
        monkeypatch.setattr(checkpoint, "checksums", lambda tree: sums(tree) | {name: sums(tree)[name] ^ 1})
        checkpoints.save(9, state, checkpoints.record(8))
        checkpoints.wait()
        monkeypatch.undo()
        with pytest.raises(DamagedError, match=f"^{name} is not what was written$"):
            checkpoints.restore(9, like_of(done))


def test_a_run_and_an_export_go_back_to_the_checkpoint_before(done, tmp_path, cli):
    run = at_step(done, 8, tmp_path / "run")
    DAMAGE["flipped bit"](run / "checkpoints" / "8")
    code, out, err = cli("export", run, "--to", tmp_path / "out")
    assert code == 0 and "checkpoint 8 is damaged; exporting step 6" in err and Path(out.strip()).is_dir()
    code, _, err = cli("export", run, "--to", tmp_path / "other", "--step", 8)
    assert code == 2 and err.startswith("error: --step: checkpoint 8 is damaged (") and "there are 6, 8" in err
    assert (run / "checkpoints" / "8").is_dir()  # a command that only reads moves nothing
    code, _, err = cli("distill", run)
    assert code == 0 and err.count("damaged") == 2 and "put aside as 8.damaged, going back to 6" in err and "going on from step 6" in err
    assert_same_end(done, run)
    shutil.rmtree(run / "checkpoints" / "8.damaged")
    for step in "6", "8":
        DAMAGE["truncated"](run / "checkpoints" / step)
    for _ in range(2):
        code, _, err = cli("distill", run)
        assert code == 2 and "every checkpoint (8, 6) is damaged, 8: " in err.splitlines()[-1] and "--overwrite begins" in err
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"6", "8"}


# Disks


@contextlib.contextmanager
def files_of_at_most(size: int):
    """What a full disk does, for files that grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing(done, ground, tmp_path, cli):
    run = at_step(done, 6, tmp_path / "run")
    (tmp_path / "run.yaml").write_text((run / "config.yaml").read_text())
    metrics = (run / "metrics.jsonl").stat().st_size
    places = {500: run, metrics + 100: run, 20_000: run / "checkpoints"}
    for size, folder in places.items():
        with files_of_at_most(size):
            code, _, err = cli("distill", run)
        line = f"error: output: {folder} cannot be written: File too large; what lies there is kept, and the same command goes on"
        assert (code, err.splitlines()[-1]) == (2, line), err
        with Checkpoints(run / "checkpoints") as checkpoints:
            assert checkpoints.newest_whole(checkpoints.record)[0] == 6
    assert cli("distill", run)[0] == 0
    assert_same_end(done, run)
    shutil.rmtree(run / "export")
    with files_of_at_most(20_000):
        code, _, err = cli("distill", run)
    assert code == 2 and err.splitlines()[-1].startswith(f"error: export: {run / 'export'} cannot be written: File too large; ")
    assert cli("distill", run)[0] == 0
    assert_same_end(done, run)
    config = write(tmp_path / "new.yaml", ground.config(tmp_path / "new", data__store=str(tmp_path / "store")))
    with files_of_at_most(2_000):
        code, _, err = cli("prepare", config)
    line = err.splitlines()[-1]
    assert code == 2 and str(tmp_path / "store") in line and "cannot be written: File too large; " in line
    assert cli("prepare", config)[0] == 0


def test_a_folder_that_nobody_may_write(ground, tmp_path, cli):
    code, _, err = cli("distill", write(tmp_path / "config.yaml", ground.config(Path("/sys/jaxdistill/run"))))
    assert code == 2 and err.splitlines()[-1].startswith("error: output: /sys/jaxdistill/run cannot be written: ")


# Signals


@pytest.fixture
def hears_interrupts():
    """A suite that a shell started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_stops_a_training_after_a_checkpoint_of_its_step(done, ground, tmp_path, monkeypatch, cli, hears_interrupts):
    config = write(tmp_path / "config.yaml", ground.config(tmp_path / "run"))
    add, saved = Recorder.add, []
    save = checkpoint.ocp.CheckpointManager.save
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", lambda self, step, **rest: saved.append(step) or save(self, step, **rest))
    for at, number, code in ((3, signal.SIGTERM, 75), (4, signal.SIGTERM, 75), (7, signal.SIGINT, 130)):

        def told(self, step, metrics, at=at, number=number):
            add(self, step, metrics)
            if step == at:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Recorder, "add", told)
        found, _, err = cli("distill", config)
        assert (found, err.splitlines()[-1]) == (code, f"stopped at step {at}; the same command goes on from step {at}"), err
    assert saved == [2, 3, 4, 6, 7]  # none twice
    monkeypatch.setattr(Recorder, "add", add)
    assert cli("distill", config)[0] == 0
    assert_same_end(done, tmp_path / "run")


def test_sigterm_while_text_is_prepared_or_tasks_are_evaluated_keeps_what_is_finished(ground, tmp_path, monkeypatch, cli):
    from jaxdistill.data.prepare import _Job

    config = write(tmp_path / "config.yaml", ground.config(tmp_path / "run", data__store=str(tmp_path / "store")))
    report = _Job.report
    monkeypatch.setattr(_Job, "report", lambda *a, **k: report(*a, **k) or os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = cli("prepare", config)
    assert (code, err.splitlines()[-1]) == (75, "stopped; the same command goes on with what is not done")
    code, _, err = cli("distill", config)
    assert (code, err.splitlines()[-1]) == (75, "stopped; the same command goes on from the newest checkpoint")
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = cli("evaluate", ground.teacher)
    assert (code, err.splitlines()[-1]) == (75, "stopped; the same command goes on with what is not done")


# Losses


@pytest.fixture(scope="module")
def poisoned(ground, tmp_path_factory) -> tuple[dict, int]:
    """A run whose teacher knows no number for one word, which stands in one row of the text; and the step that reads it."""
    folder = tmp_path_factory.mktemp("poisoned")
    config = ground.config(folder / "run", training__steps=16, training__freeze_after=1, training__evaluate_every=16)
    run = resolve(load_config(config))
    store: TokenStore = prepare(run.config.data, tokenizer=run.tokenizer, store=run.store)
    tokens = {split: store.read_rows(split, np.arange(store.num_rows(split)))[0] for split in ("train", "held_out")}
    order = run_order(run, store).rows(np.arange(16 * 8)).tolist()
    for step in range(7, 11):  # the first row of a batch with a word of its own
        for row in order[8 * (step - 1) : 8 * step]:
            own = set(tokens["train"][row].tolist()) - set(np.delete(tokens["train"], row, axis=0).ravel().tolist())
            own -= set(tokens["held_out"].ravel().tolist())
            if own and order.count(row) == 1:
                teacher = folder / "teacher"
                shutil.copytree(ground.teacher, teacher)
                table = load_file(teacher / "model.safetensors")
                table["embeddings.word_embeddings.weight"][own.pop()] = np.nan
                save_file(table, teacher / "model.safetensors")
                return config | {"teacher": str(teacher)}, step
    raise AssertionError("no row has a word of its own")


def test_a_run_goes_back_and_on_with_other_batches(poisoned, tmp_path, cli):
    config, bad = poisoned
    path, run = write(tmp_path / "config.yaml", config), Path(config["output"])
    good, found = (bad - 1) // 2 * 2, bad + 1  # the last checkpoint before, and the step at which it is known
    code, _, err = cli("distill", path)
    assert code == 0, err
    what = "every student has diverged (no finite gradient, or a spike, for 1 updates in a row)"
    assert sum(f"step {found}: {what}: back to step {good}, on other batches" in line for line in err.splitlines()) == 1
    assert [record.get("rollbacks", 0) for record in records(run) if "loss" in record] == [0] * good + [1] * (16 - good)
    assert all(np.isfinite(list(losses(run).values())))
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.record(16)["offset"] == found - good and checkpoints.record(16)["rollbacks"] == 1
    again = at_step(run, 14, tmp_path / "again")  # killed after it
    assert cli("distill", again)[0] == 0
    assert_same_end(run, again)
    shutil.copytree(run, tmp_path / "kept")
    code, _, err = cli("distill", path, "--overwrite", "training.rollbacks=0")
    assert code == 1 and err.splitlines()[-1].startswith(f"error: step {found}: every student has diverged")
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest() == good
    page = (run / "diverged.md").read_text()
    assert f"| {bad} | small | nan | nan | " in page and f"| not finite | number {bad}: 8 of " in page
    assert "## The rows of the batch at which it began" in page and f"Step {bad}, split train: " in page
    code, _, err = cli("distill", path)  # killed before the first checkpoint after it; one rollback is allowed again
    assert code == 0, err
    assert_same_end(tmp_path / "kept", run)
