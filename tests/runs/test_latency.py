"""`jaxdistill latency`: every field is there and the input is checked first; how fast this machine is no test can know."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_config, write_model

from jaxdistill.features import Feature
from jaxdistill.flops import forward_flops_per_token
from jaxdistill.models import encode, load_pretrained, num_parameters
from jaxdistill.results import read_result

pytestmark = pytest.mark.usefixtures("compiled_once")

latency = importlib.import_module("jaxdistill.latency")
FIELDS = {
    "framework", "device", "threads", "batch_size", "length", "repeats", "mean_seconds", "deviation_seconds", "examples_per_second",
    "memory_bytes", "dtype",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("latency")
    write_model(root / "teacher", tiny_config(), pooler=True)
    write_model(root / "student", tiny_config(num_layers=1), mlm=True)
    return root


def nobody():
    return latency.Model("nobody", "", Path(), tiny_config(), {})


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(latency, "SHORTEST_RUN", 0.0)


def check_section(section, config, framework, dtype_bytes):
    features = [Feature("hidden", config.num_layers)]
    assert section["parameters"] == num_parameters(config)
    assert section["flops_per_example"] == 8 * forward_flops_per_token(config, 8, features)
    assert section["weights_bytes"] == dtype_bytes * num_parameters(config)
    assert section["versions"]["jax"] and section["processor"]
    found = section["measurements"]
    assert [(one["framework"], one["batch_size"]) for one in found] == [(framework, 2), (framework, 1)]
    for one in found:
        assert set(one) == FIELDS
        assert (one["device"], one["length"], one["repeats"]) == ("cpu", 8, 3) and one["threads"] >= 1
        assert one["mean_seconds"] > 0 and one["deviation_seconds"] >= 0
        assert one["examples_per_second"] == pytest.approx(one["batch_size"] / one["mean_seconds"])


OPTIONS = ("--batch-size", "2", "--batch-size", "1", "--length", "8", "--repeats", "3")


def test_jax(cli, models, tmp_path):
    folders = (models / "teacher", f"mine={models / 'student'}")
    code, out, err = cli("latency", *folders, *OPTIONS, "--framework", "jax", "--results", tmp_path)
    assert code == 0, err
    for name, num_layers in (("teacher", 3), ("mine", 1)):
        result = read_result(tmp_path / f"{name}.json")
        check_section(result["latency"], tiny_config(num_layers=num_layers), "jax", 4)
        assert all(one["memory_bytes"] > 0 for one in result["latency"]["measurements"])
    rows = [line.split() for line in out.splitlines() if "jax" in line]
    assert [row[0] for row in rows] == ["teacher", "mine"] * 2
    assert rows[0][-1] == rows[2][-1] == "1.00x"


def test_bfloat16(cli, models, tmp_path):
    options = ("--framework", "jax", "--dtype", "bfloat16", "--batch-size", "1", "--length", "8", "--repeats", "2")
    code, _, err = cli("latency", models / "student", *options, "--results", tmp_path)
    assert code == 0, err
    section = read_result(tmp_path / "student.json")["latency"]
    assert (section["dtype"], section["weights_bytes"]) == ("bfloat16", 2 * num_parameters(tiny_config(num_layers=1)))
    for batch_size in ("2", "2", "1"):  # beside what was measured before; the same again in its place
        code, _, err = cli(
            "latency",
            models / "student",
            "--framework",
            "jax",
            "--batch-size",
            batch_size,
            "--length",
            "8",
            "--repeats",
            "2",
            "--results",
            tmp_path,
        )
        assert code == 0, err
    found = read_result(tmp_path / "student.json")["latency"]["measurements"]
    assert [(one["dtype"], one["batch_size"]) for one in found] == [("bfloat16", 1), ("float32", 2), ("float32", 1)]


@pytest.mark.torch
def test_pytorch(cli, models, tmp_path):
    code, _, err = cli("latency", models / "student", *OPTIONS, "--framework", "pytorch", "--results", tmp_path)
    assert code == 0, err
    section = read_result(tmp_path / "student.json")["latency"]
    check_section(section, tiny_config(num_layers=1), "pytorch", 4)
    assert section["versions"]["torch"] and section["measurements"][0]["memory_bytes"] is None


@pytest.mark.torch
def test_both_frameworks_compute_the_same(models):
    """Else the two columns would time different things: here the last hidden state of one batch, no more and no less."""
    found = latency._check_models({"student": str(models / "student")}, 8, models)
    outputs = [np.asarray(next(make(found, (2,), 8, "float32"))[0][0].run()) for make in latency._PASSES.values()]
    config, params = load_pretrained(models / "student")
    reference = np.asarray(encode(config, params, *latency.example_batch(config, 2, 8)).hidden[1])
    for output in outputs:
        assert output.shape == (2, 8, 48)
        np.testing.assert_allclose(output, reference, rtol=1e-3, atol=1e-4)


def test_default_is_every_framework_there_is(monkeypatch):
    assert latency._chosen_frameworks([]) == (("jax", "pytorch") if find_spec("torch") else ("jax",))
    monkeypatch.setattr(latency, "find_spec", lambda name: None)
    assert latency._chosen_frameworks([]) == ("jax",)


def test_models_take_turns(monkeypatch):
    calls = []
    passes = [latency.Pass(nobody(), lambda name=name: calls.append(name), "cpu", 1, lambda: None) for name in "ab"]
    monkeypatch.setattr(latency, "WARM_UP_PASSES", 1)
    latency._measure(passes, repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [len(each.seconds) for each in passes] == [2, 2]


def test_mean_and_sample_deviation():
    measured = latency.Pass(nobody(), print, "gpu", None, lambda: 7, seconds=[0.1, 0.2, 0.6])
    found = latency._measurement(measured, "jax", 4, 16)
    assert found["mean_seconds"] == pytest.approx(0.3) and found["deviation_seconds"] == pytest.approx(0.07**0.5)
    assert found["examples_per_second"] == pytest.approx(4 / 0.3) and found["memory_bytes"] == 7


def test_a_run_is_as_many_calls_as_it_takes(monkeypatch):
    clock = iter(np.arange(0.0, 9.0, 0.25).tolist())
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    calls = []
    assert latency.seconds_per_call(lambda: calls.append(1), shortest=1.0) == 0.25
    assert len(calls) == 4


def test_no_padding_in_the_example():
    config = tiny_config("roberta", vocab_size=11)
    ids, mask = latency.example_batch(config, 50, 20)
    assert set(np.unique(ids)) == set(range(11)) - {config.pad_token_id} and mask.min() == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["/no/model"], ["/no/model: no such model folder"]),
        (["{teacher}", "{other}/teacher"], ["there is a model 'teacher' already", "NAME="]),
        (["{teacher}", "--framework", "pytorhc"], ["unknown framework 'pytorhc'", "did you mean 'pytorch'"]),
        (["{teacher}", "--length", "41"], ["--length: 41 is over the 40 positions of teacher"]),
        (["{teacher}", "--length", "0"], ["--length: at least 1 token"]),
        (["{teacher}", "--repeats", "1"], ["--repeats:", "at least 2"]),
        (["{teacher}", "--batch-size", "0"], ["--batch-size: at least 1, got 0"]),
        (["{teacher}", "--dtype", "int8"], ["--dtype: unknown type 'int8'"]),
        (["{teacher}", "{damaged}", "--length", "8"], ["no model.safetensors"]),
    ],
)
def test_wrong_input(cli, models, tmp_path, arguments, parts):
    write_model(tmp_path / "other" / "teacher", tiny_config(num_layers=1))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_bytes((models / "teacher" / "config.json").read_bytes())
    places = {"teacher": models / "teacher", "other": tmp_path / "other", "damaged": tmp_path / "damaged"}
    code, out, err = cli("latency", *(argument.format(**places) for argument in arguments), "--results", tmp_path / "results")
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "results").exists()


def test_without_pytorch(cli, models, monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "find_spec", lambda name: None)
    code, _, err = cli("latency", models / "teacher", "--framework", "pytorch", "--results", tmp_path)
    assert code == 2 and "PyTorch is not installed here" in err


def test_results_of_other_weights_are_refused_before_measuring(cli, models, tmp_path):
    (tmp_path / "teacher.json").write_text(json.dumps({"format": "jaxdistill results", "model": {"weights_sha256": "0", "source": "x"}}))
    code, out, err = cli("latency", models / "teacher", "--length", "8", "--results", tmp_path)
    assert (code, out) == (2, "") and "results of a model with other weights (x)" in err
