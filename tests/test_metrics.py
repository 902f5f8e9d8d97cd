"""Numbers by hand; what a resumed run finds in the file."""

import json
import math
import sys
import types

import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.metrics import MetricsWriter, Throughput, merge, model_flops_utilisation, read_history


def writer(folder, *, tensorboard=False, wandb=None, resume_step=0, is_main=True):
    return MetricsWriter(folder, tensorboard=tensorboard, wandb=wandb, config={"seed": 0}, resume_step=resume_step, is_main=is_main)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_merge_divides_once():
    merged = merge([{"a/loss": (6.0, 2.0), "b/loss": (1.0, 1.0)}, {"a/loss": (np.float32(2.0), np.int32(6))}, {"c": (0.0, 0.0)}])
    assert merged["a/loss"] == 1.0  # (6 + 2) / (2 + 6); the mean of the means would be 1.67
    assert merged["b/loss"] == 1.0
    assert math.isnan(merged["c"])
    assert merge([]) == {}


def test_model_flops_utilisation():
    assert model_flops_utilisation(6e8, 1e5, 2e14) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="peak_flops"):
        model_flops_utilisation(1.0, 1.0, 0.0)


def test_throughput_leaves_out_the_compilation_and_the_pauses():
    clock = Clock()
    throughput = Throughput(total_steps=100, clock=clock)
    throughput.add(1000)
    clock.now += 60  # compiles
    assert throughput.read(1) == {}
    throughput.start(1)
    for _ in range(10):
        clock.now += 1
        throughput.add(500)
    with throughput.paused():
        clock.now += 10
    # 5000 tokens in 10 s of training; 20 s for 10 steps with the pause, and 89 steps are left.
    assert throughput.read(11) == {"tokens_per_second": 500.0, "eta_seconds": 178.0}
    clock.now += 2
    throughput.add(500)
    assert throughput.read(12)["tokens_per_second"] == 250.0  # since the last reading only
    assert throughput.read(100).get("eta_seconds") == 0.0


def test_a_pause_counts_even_if_the_evaluation_fails():
    clock = Clock()
    throughput = Throughput(10, clock)
    throughput.start(0)
    with pytest.raises(KeyError), throughput.paused():
        clock.now += 5
        raise KeyError
    clock.now += 1
    throughput.add(7)
    assert throughput.read(1)["tokens_per_second"] == 7.0


def test_records_are_on_disk_at_once_and_read_back(tmp_path):
    with writer(tmp_path / "run") as metrics:
        metrics.write({"step": np.int64(1), "loss": np.float32(0.5), "note": "é"})
        assert read_history(tmp_path / "run") == [{"step": 1, "loss": 0.5, "note": "é"}]
        metrics.write({"step": 2, "loss": None})
    assert read_history(tmp_path / "run")[1] == {"step": 2, "loss": None}


def test_the_file_is_json_even_when_the_loss_is_not_finite(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write({"step": 1, "loss": math.nan, "a/loss": np.float32(-np.inf), "b/loss": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "a/loss": None, "b/loss": 1.0, "not_finite": {"loss": "nan", "a/loss": "-inf"}}
    (record,) = read_history(tmp_path)
    assert math.isnan(record["loss"]) and record["a/loss"] == -math.inf and "not_finite" not in record


@pytest.mark.parametrize("torn", [b"", b'{"step": 50, "lo', b'{"note": "\xc3', b"12", b"\0\0\0"])
def test_resume_drops_what_is_written_again_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    with writer(tmp_path) as metrics:
        for step in (10, 20, 30, 40):
            metrics.write({"step": step, "loss": float(step)})
    with path.open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_history(tmp_path)] == [10, 20, 30, 40]
    with writer(tmp_path, resume_step=20) as metrics:
        assert path.read_bytes() == b'{"step": 10, "loss": 10.0}\n{"step": 20, "loss": 20.0}\n'
        metrics.write({"step": 30, "loss": 3.0})
    assert [record["loss"] for record in read_history(tmp_path)] == [10.0, 20.0, 3.0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with writer(tmp_path, resume_step=2) as metrics:
        metrics.write({"step": 3})
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2, 3]


def test_a_run_that_starts_over_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 10}\n')
    with writer(tmp_path, resume_step=0):
        pass
    assert read_history(tmp_path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl line 2: not a JSON object"):
        read_history(tmp_path)
    with pytest.raises(InputError, match="line 2"), writer(tmp_path, resume_step=3):
        pass
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3  # nothing was dropped


def test_history_of_a_folder_without_one(tmp_path):
    with pytest.raises(InputError, match="give the folder of a run"):
        read_history(tmp_path)


def test_a_record_needs_its_step(tmp_path):
    with writer(tmp_path) as metrics, pytest.raises(KeyError):
        metrics.write({"loss": 1.0})


def test_only_the_main_process_writes(tmp_path):
    with writer(tmp_path / "run", tensorboard=True, wandb="project", is_main=False) as metrics:
        metrics.write({"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def events(folder):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard(tmp_path, caplog):
    with writer(tmp_path, tensorboard=True) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "a/loss": np.float32(step) / 2, "note": "text", "tokens": 7, "b/loss": math.nan})
    with writer(tmp_path, tensorboard=True, resume_step=2) as metrics:  # within the same second: a file of its own
        metrics.write({"step": 3, "a/loss": 9.0})
    found = events(tmp_path / "tensorboard")
    scalars = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
    assert [(step, value) for step, tag, value in scalars if tag == "a/loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 9.0)]
    assert {tag for _, tag, _ in scalars} == {"a/loss", "b/loss", "tokens"}
    purged = [event.step for event in found if event.HasField("session_log")]
    assert purged == [0, 3]  # TensorBoard hides what the first run logged from step 3 on
    assert not caplog.records


def test_wandb_that_is_not_installed_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'jaxdistill\[wandb\]'"):
        writer(tmp_path / "run", wandb="project")
    assert list(tmp_path.iterdir()) == []


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, name, step_metric=None):
            calls.append(("define", name, step_metric))

        def log(self, record):
            calls.append(("log", record))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**options):
        calls.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with writer(tmp_path, wandb="project") as metrics:
        metrics.write({"step": 1, "loss": 1.0})
    assert calls[0][1]["project"] == "project" and calls[0][1]["config"] == {"seed": 0}
    assert calls[1:] == [("define", "step", None), ("define", "*", "step"), ("log", {"step": 1, "loss": 1.0}), ("finish", 0)]
    with pytest.raises(KeyError), writer(tmp_path, wandb="project", resume_step=1):
        raise KeyError
    with writer(tmp_path, wandb="project"):
        pass
    first, resumed, over = (options["id"] for kind, options, *_ in calls if kind == "init")
    assert first == resumed != over
    assert [call[1] for call in calls if call[0] == "finish"] == [0, 1, 0]
