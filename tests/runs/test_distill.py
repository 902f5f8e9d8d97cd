"""Whole runs: what they write, one compilation, no hidden transfer, the teacher, several students, devices."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import yaml

import jaxdistill
from jaxdistill.batches import training_batches
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.config import load_config
from jaxdistill.data import prepare
from jaxdistill.errors import InputError
from jaxdistill.models import load_pretrained
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state, compile_step, initial_state, place_teacher


@pytest.fixture(scope="module")
def done(ground, tmp_path_factory):
    """A finished run on one device."""
    output = tmp_path_factory.mktemp("done") / "run"
    return jaxdistill.distill(ground.config(output, mesh={"data": 8}, training__tensorboard=True))


def losses(history) -> np.ndarray:
    return np.array([record["loss"] for record in history if "loss" in record])


def leaves(params) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_files_of_a_run(done):
    output = done.output
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "loss.png", "summary.md", "checkpoints", "export", "tensorboard"}
    assert {path.name for path in (output / "export" / "small").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md",
    }  # fmt: skip
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(9))
    keys = {"loss", "small/loss", "small/relation_kl", "small/relation_kl/query", "learning_rate", "tokens", "small/gradient_norm"}
    assert keys <= records[-1].keys()
    assert {"tokens_per_second", "eta_seconds", "small/held_out"} <= records[-1].keys()
    assert records[-1]["small/loss"] == pytest.approx(records[-1]["small/relation_kl"])
    parts = [records[-1][f"small/relation_kl/{kind}"] for kind in ("query", "key", "value")]
    assert records[-1]["small/relation_kl"] == pytest.approx(np.mean(parts))
    assert load_config(output).training.precision == "float32"


def test_it_learns(done):
    held_out = [record["small/held_out"] for record in done.history if "small/held_out" in record]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]


def test_export_is_the_student_and_nothing_else(done, ground):
    config, params = load_pretrained(done.exports["small"])
    assert config.num_layers == 2
    assert params.keys() == {"embeddings", "layers", "pooler"}
    for exported, trained in zip(leaves({k: params[k] for k in ("embeddings", "layers")}), leaves(done.students["small"][1]), strict=True):
        np.testing.assert_array_equal(exported, trained)
    _, teacher = load_pretrained(ground.teacher)
    np.testing.assert_array_equal(params["pooler"]["dense"]["kernel"], teacher["pooler"]["dense"]["kernel"])


def test_teacher_is_not_in_the_checkpoint(done):
    with Checkpoints(done.output / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [6, 8]
        record = checkpoints.record(8)
        tree = checkpoints._manager.item_metadata(8)["state"].tree
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    watched = ("failures", "loss_means", "losses_seen")
    ours = ("step", *(f"students/small/{name}" for name in (*watched, "trained/params/", "optimizer/")))
    assert all(path.startswith(ours) for path in paths)
    assert not any("layers/03" in path for path in paths)
    assert record["layer_map"] == {"small": {"relation_kl": [[2, 4]]}}
    assert record["versions"]["jax"] == jax.__version__
    assert record["step"] == 8 and record["tokens"] == done.history[-1]["tokens"]


def test_a_finished_run_is_left_alone(done, ground):
    files = done.output / "metrics.jsonl", done.exports["small"] / "model.safetensors"
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    again = jaxdistill.distill(done.output)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    for one, other in zip(leaves(done.students["small"][1]), leaves(again.students["small"][1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_devices_and_micro_batches_do_not_change_the_run(done, ground, tmp_path):
    """With dropout on: masks belong to the rows, not to where they are computed."""
    meshes = {"fsdp": {"data": 1, "fsdp": 8}, "tensor": {"data": 4, "tensor": 2}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}
    for name, mesh in meshes.items():
        micro_batches = 2 if name == "tensor" else 1
        other = jaxdistill.distill(ground.config(tmp_path / name, mesh=mesh, training__micro_batches=micro_batches))
        np.testing.assert_allclose(losses(other.history), losses(done.history), rtol=1e-5, err_msg=name)


def test_several_students_train_as_they_would_alone(done, ground, tmp_path):
    students = {"small": {"num_layers": 2}, "copied": {"num_layers": 2, "initialise": "every_k", "intermediate_size": 80}}
    run = jaxdistill.distill(ground.config(tmp_path / "run", mesh={"data": 8}, students=students))
    for one, other in zip(leaves(run.students["small"][1]), leaves(done.students["small"][1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert set(run.exports) == {"small", "copied"}
    last = run.history[-1]
    assert last["loss"] == pytest.approx(last["small/loss"] + last["copied/loss"])


def test_packing_is_a_switch_on_the_same_store(done, ground, tmp_path):
    manifest = ground.text.parent / "store" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    packed = jaxdistill.distill(ground.config(tmp_path / "run", mesh={"data": 8}, data__packing=True))
    assert manifest.stat().st_mtime_ns == before
    assert not np.allclose(losses(packed.history), losses(done.history), rtol=1e-4)


@pytest.fixture(scope="module")
def step(ground, tmp_path_factory):
    """A compiled step of a run with its inputs: (run, step, state, teacher, batches)."""
    run = resolve(load_config(ground.config(tmp_path_factory.mktemp("step") / "run", mesh={"data": 8})))
    store = prepare(run.config.data, tokenizer=run.tokenizer, store=run.store)
    mesh = create_mesh(run.config.mesh)
    _, params = load_pretrained(run.teacher_folder)
    with jax.set_mesh(mesh):
        like = abstract_state(run, params, mesh)
        state = jax.jit(lambda p: initial_state(run, p), out_shardings=jax.tree.map(lambda x: x.sharding, like))(params)
        teacher = place_teacher(run, params, mesh)
        batches = list(training_batches(run, store, mesh, 0))
        compiled = compile_step(run, state, teacher, batches[0])
        yield run, compiled, state, teacher, batches


def test_the_loop_compiles_once_and_transfers_nothing(ground, tmp_path):
    compiled: list[str] = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # The loop runs under transfer_guard("disallow"), so a hidden transfer would have raised.
        jaxdistill.distill(ground.config(tmp_path / "run", mesh={"data": 8}, training__micro_batches=1, optimizer__b1=0.91))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("train_step" in name for name in compiled) == 1, compiled
    assert sum("evaluation_step" in name for name in compiled) == 1, compiled


def test_the_guard_of_the_loop_catches_a_transfer(step):
    _, compiled, state, teacher, batches = step
    on_the_host = jax.tree.map(np.asarray, batches[0])
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        compiled(state, teacher, on_the_host)


def test_the_step_refuses_other_shapes_instead_of_compiling_again(step):
    _, compiled, state, teacher, batches = step
    shorter = jax.tree.map(lambda x: x[:, :, :8], batches[0])
    with pytest.raises(TypeError, match="Argument types differ"):
        compiled(state, teacher, shorter)


def test_the_teacher_is_run_only_as_deep_as_it_is_read(step, ground):
    run, *_ = step
    assert run.teacher.num_layers == 4
    shallow = ground.config(run.output, objective=[{"layer_map": {"strategy": "teacher_layer", "teacher_layer": 2}, "relation_heads": 6}])
    shallow_run = resolve(load_config(shallow))
    _, params = load_pretrained(run.teacher_folder)
    mesh = create_mesh(run.config.mesh)
    assert place_teacher(shallow_run, params, mesh)["layers"].keys() == {"01", "02"}
    assert place_teacher(run, params, mesh)["layers"].keys() == {"01", "02", "03", "04"}


def test_a_middle_layer_of_the_teacher(ground, tmp_path):
    objective = [{"layer_map": {"strategy": "teacher_layer", "teacher_layer": 3}, "relation_heads": 6}]
    result = jaxdistill.distill(ground.config(tmp_path / "run", mesh={"data": 8}, objective=objective, training__steps=2))
    assert np.isfinite(losses(result.history)).all()


def test_every_argument_of_the_step_is_used_and_the_state_is_donated(step):
    _, compiled, state, *_ = step
    text = compiled.as_text()
    num_state = len(jax.tree.leaves(state))
    assert text.count("may-alias") + text.count("must-alias") >= num_state


def test_data_parallel_needs_all_reduce_and_nothing_else(step):
    import re

    _, compiled, *_ = step
    pattern = r"= (?:.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    assert set(re.findall(pattern, compiled.as_text())) == {"all-reduce"}


def test_config_as_file_dict_and_keywords_agree(ground, tmp_path):
    fields = ground.config(tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    assert load_config(path) == load_config(fields) == load_config(**fields) == load_config(path, ["training.steps=8"])


def test_a_run_that_skips_every_update_says_so(ground, tmp_path, capsys):
    """A teacher whose weights hold a NaN: the student keeps its parameters, and the person hears of it."""
    import shutil

    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "teacher"
    shutil.copytree(ground.teacher, broken)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.3.attention.self.query.weight"][0, 0] = np.nan
    save_file(weights, broken / "model.safetensors")
    config = ground.config(tmp_path / "run", teacher=str(broken), mesh={"data": 8}, training__steps=2)
    run = resolve(load_config(config))
    _, params = load_pretrained(broken)
    first = initial_state(run, params).students["small"].trained["params"]
    result = jaxdistill.distill(config)
    for one, other in zip(leaves(first), leaves(result.students["small"][1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)
    assert result.history[-1]["small/skipped"] == 1
    assert "1 updates of small skipped" in capsys.readouterr().err


def test_refused_continuations_name_the_field(done, ground):
    changed = {
        "training.batch_size": ground.config(done.output, mesh={"data": 8}, training__batch_size=16),
        "optimizer.learning_rate": ground.config(done.output, mesh={"data": 8}, optimizer__learning_rate=2e-3),
        "students.small.num_layers": ground.config(done.output, mesh={"data": 8}, students={"small": {"num_layers": 1}}),
        "data.packing": ground.config(done.output, mesh={"data": 8}, data__packing=True),
    }
    before = {path: path.stat().st_mtime_ns for path in done.output.rglob("*")}
    for field, config in changed.items():
        with pytest.raises(InputError, match=rf"^{field}: "):
            jaxdistill.distill(config)
    assert {path: path.stat().st_mtime_ns for path in done.output.rglob("*")} == before
