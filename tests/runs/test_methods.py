"""Every kind of term in one run, both inputs, dropout on: devices, projections, resuming, exports, frozen students."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from commands import command, finish
from safetensors.numpy import load_file
from tiny_models import tiny_rows

import jaxdistill
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.cli import main
from jaxdistill.config import MeshConfig, load_config
from jaxdistill.errors import InputError
from jaxdistill.models import load_pretrained
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state, initial_state
from jaxdistill.update import TrainState

pytestmark = pytest.mark.usefixtures("compiled_once")

NARROW = {"num_layers": 2, "hidden_size": 24, "num_heads": 4}
VALUES = {"query": 0.0, "key": 0.0, "value": 1.0}
# Every kind of term, in as few students as widths, heads and inputs allow: each costs its compilation.
STUDENTS = {
    "vectors": NARROW | {
        "objective": [
            {"relation_heads": 6, "cross": {"query-key": 0.5}},
            {"kind": "direct_mse"},
            {"kind": "hidden_mse", "layer_map": {"strategy": "random", "every": 2}},
        ]
    },
    "hidden": NARROW | {
        "objective": [
            {"kind": "hidden_mse", "layer_map": {"strategy": "uniform_consecutive", "embeddings": True}},
            {"kind": "hidden_mse", "layer_map": "learned"},
            {"kind": "hidden_contrastive", "memory_bank": 12, "projection_size": 16},
        ]
    },
    "equal": {
        "num_layers": 2,
        "initialise": "every_k",
        "objective": [
            {"kind": "hidden_mse", "tokens": "cls", "projection": "always"},
            {"kind": "attention_kl"},
            {"kind": "attention_mse"},
            VALUES | {"relation_heads": "native"},
            VALUES | {"kind": "relation_mse", "relation_heads": 3, "weight": 1e-3},
        ],
    },
    "output": NARROW | {
        "embeddings": "svd",
        "objective": [
            {"kind": "output_kl", "temperature": {"schedule": "linear", "values": [4, 1], "steps": [0, 6]}},
            {"kind": "output_kl", "positions": "masked"},
            {"kind": "mlm_cross_entropy"},
            {"kind": "hidden_cosine"},
        ],
    },
}  # fmt: skip
TERMS = {
    "vectors": {
        "relation_kl": {"query", "key", "value", "query_key"},
        "direct_mse": {"query", "key", "value"},
        "hidden_mse": {"1", "2"},
    },
    "hidden": {"hidden_mse": {"0-0", "1-1", "1-2", "2-3", "2-4"}, "hidden_mse_2": {"1", "2"}, "hidden_contrastive": set()},
    "equal": {"hidden_mse": set(), "attention_kl": set(), "attention_mse": set(), "relation_kl": set(), "relation_mse": set()},
    "output": {"output_kl": set(), "output_kl_2": set(), "mlm_cross_entropy": set(), "hidden_cosine": set()},
}
PROJECTIONS = {
    "vectors": {"direct_mse.query", "direct_mse.key", "direct_mse.value", "hidden_mse.1", "hidden_mse.2"},
    "hidden": {*(f"hidden_mse.{pair}" for pair in TERMS["hidden"]["hidden_mse"]), "hidden_mse_2.1", "hidden_mse_2.2", "hidden_contrastive"},
    "equal": {"hidden_mse"},
    "output": {"hidden_cosine"},
}
# Its first update is finite, no gradient after it is.
WILD = {"wild": {"num_layers": 1, "objective": [{"kind": "hidden_mse"}], "optimizer": {"learning_rate": 1e30}}}


def make_config(ground, output: Path, *names: str, **changes) -> dict:
    """20 steps of these students (none: all, and one that diverges), a checkpoint every 10."""
    students = {name: STUDENTS[name] for name in names} or STUDENTS | WILD
    fields = {"training__steps": 20, "training__evaluate_every": 10, "training__checkpoint_every": 10, "training__both_inputs": True}
    fields |= {"training__freeze_after": 3}
    return ground.config(output, **{"mesh": {"data": 8}, "students": students} | fields | changes)


@pytest.fixture(scope="module")
def reported(ground_with_head, tmp_path_factory):
    """(run, stdout, stderr) of all the students on 8 devices."""
    config = make_config(ground_with_head, tmp_path_factory.mktemp("methods") / "run")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        run = jaxdistill.distill(config)
    return run, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def done(reported):
    return reported[0]


def losses(history: list[dict], name: str) -> np.ndarray:
    """Every term at every step, then the held-out ones."""
    parts = [f"/{term}" for term in TERMS[name]]
    trained = [[record[f"{name}{part}"] for part in ("/loss", *parts)] for record in history if "loss" in record]
    held_out = [[record[f"{name}/held_out{part}"] for part in ("", *parts)] for record in history if f"{name}/held_out" in record]
    assert (len(trained), len(held_out)) == (20, 3)
    return np.array(trained + held_out)


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_and_params(folder: Path):
    run = resolve(load_config(folder, ["mesh={}"]), num_devices=1)
    return run, load_pretrained(run.teacher_folder)[1]


def state_at(folder: Path, step: int) -> TrainState:
    run, params = run_and_params(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(step, abstract_state(run, params, create_mesh(MeshConfig(), jax.devices()[:1])))


def assert_equal(one, other, atol: float = 0.0) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def copy_back_to(folder: Path, step: int, to: Path) -> Path:
    """A run as it was at that step."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    shutil.rmtree(to / "export")
    return to


def test_every_kind_learns_and_is_measured(done):
    trained = [record for record in done.history if "loss" in record]
    held_out = [record for record in done.history if "vectors/held_out" in record]
    assert [record["step"] for record in trained] == list(range(1, 21))
    assert [record["step"] for record in held_out] == [0, 10, 20]
    for name, terms in TERMS.items():
        metrics = {term + part for term, parts in terms.items() for part in ("", *(f"/{part}" for part in parts))}
        own = {f"{name}/{metric}" for metric in metrics} | {
            f"{name}/{key}" for key in ("loss", "gradient_norm", "skipped", "learning_rate")
        }
        measured = {f"{name}/held_out"} | {f"{name}/held_out/{metric}" for metric in metrics}
        assert {key for key in trained[0] if key.startswith(f"{name}/")} == own
        assert {key for key in held_out[0] if key.startswith(f"{name}/")} == measured
        assert all(np.isfinite([record[key] for key in own]).all() and record[f"{name}/skipped"] == 0 for record in trained)
        assert all(np.isfinite([record[key] for key in measured]).all() for record in held_out)
        assert held_out[-1][f"{name}/held_out"] < held_out[0][f"{name}/held_out"]


def test_one_device_and_micro_batches_change_nothing(done, ground_with_head, tmp_path):
    """Negatives come from the global batch and the bank, masked places and dropout belong to the rows."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(ground_with_head, tmp_path / "run", mesh={}, training__micro_batches=2)))
    code, _, err = finish(command("distill", path))
    assert code == 0, err
    found = records_of(tmp_path / "run")
    for name in STUDENTS:
        np.testing.assert_allclose(losses(found, name), losses(done.history, name), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["vectors", "output"])
def test_a_student_trains_as_it_would_alone(done, ground_with_head, tmp_path, name):
    """Also beside one that diverges."""
    alone = jaxdistill.distill(make_config(ground_with_head, tmp_path / "run", name, training__both_inputs=False))
    assert_equal(alone.students[name][1], done.students[name][1], atol=1e-5)


# Projections


def test_projections_are_trained(done):
    run, params = run_and_params(done.output)
    first = initial_state(run, params).students
    last = state_at(done.output, 20).students
    assert {name: set(state.trained["projections"]) for name, state in last.items() if name in STUDENTS} == PROJECTIONS
    for name in PROJECTIONS:
        before, after = (states[name].trained["projections"] for states in (first, last))
        squares = last[name].optimizer[1].nu["projections"]
        for (path, one), other, square in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), jax.tree.leaves(squares), strict=True
        ):
            what = name + jax.tree_util.keystr(path)
            assert np.max(np.abs(np.asarray(other - one))) > 1e-3, what
            assert np.count_nonzero(square) > 0.9 * square.size, what  # weight decay alone would change it as well


def test_resumed_bit_equal(done, tmp_path, capsys):
    """Projections and memory banks too; a frozen student stays frozen."""
    again = jaxdistill.distill(copy_back_to(done.output, 10, tmp_path / "run"))
    captured = capsys.readouterr()
    assert "going on from step 10" in captured.err and captured.err.count("wild has diverged and is frozen") == 1
    assert "wild (diverged, frozen at step" in " ".join(captured.out.split())
    before, after = state_at(done.output, 20), state_at(again.output, 20)
    assert_equal(after, before)
    bank = before.students["hidden"].memory["hidden_contrastive"]
    assert bank["vectors"].shape == (12, 48) and bool(bank["mask"].all()) and np.count_nonzero(bank["vectors"]) > 0
    assert [record["step"] for record in again.history] == [record["step"] for record in done.history]
    for name in STUDENTS:
        np.testing.assert_array_equal(losses(again.history, name), losses(done.history, name))


# Exports


def names_of_bert(num_layers: int) -> set[str]:
    """The tensors of transformers' BertModel without its pooler."""
    block = ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
    block += [f"attention.self.{kind}" for kind in ("query", "key", "value")]
    modules = ["embeddings.LayerNorm", *(f"encoder.layer.{i}.{module}" for i in range(num_layers) for module in block)]
    tables = {f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    return tables | {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


HEAD = {f"cls.predictions.transform.{module}.{leaf}" for module in ("dense", "LayerNorm") for leaf in ("weight", "bias")}


def test_exports_hold_the_model_alone(done):
    for name, folder in done.exports.items():
        files = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
        assert files == {"model.safetensors"} | ({"mlm/model.safetensors"} if name == "output" else set())
        assert set(load_file(folder / "model.safetensors")) == names_of_bert(1 if name == "wild" else 2) | {
            "pooler.dense.weight",
            "pooler.dense.bias",
        }
    head = set(load_file(done.exports["output"] / "mlm" / "model.safetensors"))
    assert head == {f"bert.{name}" for name in names_of_bert(2)} | HEAD | {"cls.predictions.bias"}


@pytest.mark.torch
def test_transformers_loads_every_export(done):
    import torch
    import transformers

    from jaxdistill.features import Feature
    from jaxdistill.models import forward

    def load(kind: str, folder: Path, **options):
        model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model.eval()

    for folder in done.exports.values():
        load("AutoModel", folder)
    model = load("AutoModelForMaskedLM", done.exports["output"], subfolder="mlm")
    config, params = done.students["output"]
    ids, mask = tiny_rows(config, ((0, 16), (0, 9), (7, 9)), 16)
    last = Feature("logits", 2)
    ours = forward(config, params, jnp.asarray(ids), jnp.asarray(mask), features=frozenset([last]), dtype="float32")[last].dense()
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours)[mask > 0], theirs[mask > 0], rtol=1e-5, atol=1e-5)


# Inputs


def test_inputs_and_teacher_passes(ground_with_head, tmp_path):
    def passes(*names, **changes):
        return resolve(load_config(make_config(ground_with_head, tmp_path / "run", *names, **changes))).teacher_passes.keys()

    assert passes("output", "vectors") == {"clean", "masked"}
    assert passes("output", training__both_inputs=False) == {"masked"}
    assert passes("vectors", "hidden", training__both_inputs=False) == {"clean"}
    masked = {"output": STUDENTS["output"], "vectors": STUDENTS["vectors"] | {"input": "masked"}}
    assert passes(students=masked, training__both_inputs=False) == {"masked"}
    clean = NARROW | {"objective": ["output_kl"], "input": "clean"}  # every token has a distribution
    assert passes(students={"output": clean}, training__both_inputs=False) == {"clean"}


def test_mixed_inputs_are_refused_without_the_switch(ground_with_head, tmp_path):
    config = make_config(ground_with_head, tmp_path / "run", "vectors", "output", training__both_inputs=False)
    with pytest.raises(InputError, match=r"^students: output needs masked text and vectors clean text, .* training\.both_inputs to true"):
        resolve(load_config(config))
    for term in ("mlm_cross_entropy", {"kind": "output_kl", "positions": "masked"}):
        student = NARROW | {"objective": [term], "input": "clean"}
        with pytest.raises(InputError, match=r"^students\.own\.input: a term of its objective counts the masked places, .* take masked"):
            resolve(load_config(make_config(ground_with_head, tmp_path / "run", students={"own": student})))


# Students that diverge


def test_a_diverged_student_is_frozen_and_reported(reported):
    run, out, err = reported
    trained = {record["step"]: record for record in run.history if "loss" in record}
    assert [trained[step]["wild/skipped"] for step in range(1, 21)] == [0] + [1] * 19
    assert "step 4: wild has diverged and is frozen: its gradient was not finite 3 times in a row" in err
    assert err.count("has diverged") == 1
    assert "wild (diverged, frozen at step 4)" in " ".join(out.split())
    assert "| wild (diverged, frozen at step 4) |" in (run.output / "summary.md").read_text()
    for step in range(5, 21):
        assert trained[step]["loss"] == pytest.approx(sum(trained[step][f"{name}/loss"] for name in STUDENTS))


def test_a_frozen_student_keeps_its_last_finite_parameters(done):
    for value in load_file(done.exports["wild"] / "model.safetensors").values():
        assert np.isfinite(value).all()
    earlier, last = (state_at(done.output, step).students["wild"] for step in (10, 20))
    assert (int(earlier.failures), int(last.failures)) == (9, 19)  # since the second step
    assert_equal(last.trained, earlier.trained)


def test_all_diverged(ground_with_head, tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(ground_with_head, tmp_path / "run", students=WILD, training__freeze_after=3)))
    monkeypatch.setattr(sys, "argv", ["jaxdistill", "distill", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    times = "every student has diverged (no finite gradient, or a spike, for 3 updates in a row)"
    assert sum(f"step 5: {times}: back to step 0, on other batches" in line for line in lines) == 1
    assert stopped.value.code == 1
    assert len(errors) == 1 and errors[0].startswith(f"error: step 5: {times}, 1 rollbacks to a good checkpoint did not help; ")
    assert not (tmp_path / "run" / "export").exists()
    page = (tmp_path / "run" / "diverged.md").read_text()
    assert page.startswith(f"# Step 5: {times}\n\nPrecision float32, batches of 8 rows.\n")
    assert "1. It failed from the first updates" in page
    steps = [line for line in page.splitlines() if "| wild |" in line]
    assert [line.split(" | ")[5] for line in steps] == ["done", "not finite", "not finite", "not finite"]
    for number, line in enumerate(steps, 6):  # five were read before
        assert f"number {number}: 8 of {ground_with_head.text}" in line
    records = records_of(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4] and {record["rollbacks"] for record in records[1:]} == {1}
