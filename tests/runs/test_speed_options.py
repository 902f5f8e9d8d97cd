"""Options that make a run faster or smaller: what they change of it, and what they refuse."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdistill
from jaxdistill.config import load_config
from jaxdistill.errors import InputError
from jaxdistill.implementations import chosen, fuses_attention
from jaxdistill.models import load_config as load_shape
from jaxdistill.models import load_pretrained
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import initial_state, place_teacher

pytestmark = pytest.mark.usefixtures("compiled_once")


def losses(result) -> np.ndarray:
    return np.array([record["loss"] for record in result.history if "loss" in record])


@pytest.fixture(scope="module")
def plain(ground, tmp_path_factory):
    return jaxdistill.distill(ground.config(tmp_path_factory.mktemp("plain") / "run", mesh={"data": 8}, training__steps=3))


@pytest.mark.parametrize("what", ["attention", "elementwise", "blocks"])
def test_rematerialisation_changes_no_run(plain, ground, tmp_path, what):
    """With dropout on, which has to be drawn alike when it is drawn again."""
    config = ground.config(tmp_path / "run", mesh={"data": 8}, training__steps=3, training__rematerialise=what)
    np.testing.assert_allclose(losses(jaxdistill.distill(config)), losses(plain), rtol=1e-5)


def test_a_teacher_in_int8_is_near_the_teacher_on_every_mesh(plain, ground, tmp_path):
    runs = {}
    for name, mesh in {"data": {"data": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}.items():
        config = ground.config(tmp_path / name, mesh=mesh, training__steps=3, training__teacher_weights="int8")
        runs[name] = losses(jaxdistill.distill(config))
    np.testing.assert_allclose(runs["mixed"], runs["data"], rtol=1e-5)
    difference = np.abs(runs["data"] / losses(plain) - 1)
    assert 1e-6 < difference.max() < 0.05


def test_int8_is_of_the_teacher_that_is_run_and_not_of_what_a_student_copies(ground, tmp_path):
    students = {"copied": {"num_layers": 2, "initialise": "every_k", "intermediate_size": 80}}
    config = ground.config(tmp_path / "run", mesh={"data": 2, "tensor": 4}, students=students, training__teacher_weights="int8")
    run = resolve(load_config(config))
    _, params = load_pretrained(run.teacher_folder)
    mesh = create_mesh(run.config.mesh)
    with jax.set_mesh(mesh):
        teacher = place_teacher(run, params, mesh)
    kernel = teacher["layers"]["02"]["query"]["kernel"]
    assert kernel.dtype == jnp.int8 and kernel.sharding.spec == jax.P("fsdp", "tensor")
    assert teacher["layers"]["02"]["query"]["kernel_scale"].sharding.spec == jax.P("tensor")
    state = jax.jit(partial(initial_state, run))(params)
    copied = state.students["copied"].trained["params"]["layers"]
    for ours, theirs in (("01", "02"), ("02", "04")):
        np.testing.assert_array_equal(copied[ours]["query"]["kernel"], params["layers"][theirs]["query"]["kernel"])


def resolved(ground, tmp_path, *, platform="gpu", **changes):
    """The teacher has heads of 12, the student of 16, which fused attention takes."""
    shape = {"students": {"small": {"num_layers": 2, "num_heads": 3}}, "objective": [{"kind": "hidden_mse", "layer_map": "last_layer"}]}
    return resolve(load_config(ground.config(tmp_path / "run", **shape, **changes)), num_devices=1, platform=platform)


def test_attention_dropout_is_said_for_itself(ground, tmp_path):
    for changes, rates in (
        ({}, (0.1, 0.1)),
        ({"training__dropout": 0.3}, (0.3, 0.3)),
        ({"training__attention_dropout": 0.0}, (0.1, 0.0)),
        ({"training__dropout": 0.3, "training__attention_dropout": 0.2}, (0.3, 0.2)),
    ):
        student = resolved(ground, tmp_path, **changes).students[0].config
        assert (student.hidden_dropout, student.attention_dropout) == rates


def test_a_student_with_attention_dropout_on_a_gpu_is_told_what_to_set(ground, tmp_path):
    (warning,) = resolved(ground, tmp_path).warnings
    assert warning.startswith("students.small: its attention is computed plainly")
    assert warning.endswith("set training.attention_dropout to 0") and "\n" not in warning
    for changes in ({"training__attention_dropout": 0.0}, {"kernels__attention": "plain"}, {"training__precision": "float32"}):
        assert resolved(ground, tmp_path, **changes).warnings == ()
    assert resolved(ground, tmp_path, platform="cpu").warnings == ()


@pytest.mark.parametrize(
    ("name", "platform", "changes", "message"),
    [
        ("cudnn", "cpu", {}, "kernels.attention: teacher: cudnn is for NVIDIA GPUs, and the devices are of kind cpu"),
        ("cudnn", "gpu", {"training__precision": "float32"}, "kernels.attention: teacher: cudnn multiplies in bfloat16"),
        ("cudnn", "gpu", {}, "kernels.attention: teacher: cudnn wants heads of a multiple of 8 up to 128, not of 12"),
        ("splash", "tpu", {}, "kernels.attention: teacher: splash wants rows of a multiple of 128, and data.sequence_length is 16"),
        ("splash", "gpu", {}, "kernels.attention: teacher: splash is for TPUs"),
    ],
)
def test_a_forced_kernel_that_cannot_be(ground, tmp_path, name, platform, changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        resolved(ground, tmp_path, platform=platform, kernels__attention=name, **changes)


def test_a_forced_kernel_and_a_students_dropout(ground, tmp_path, monkeypatch):
    # Of the teacher's folder: heads that cudnn takes.
    monkeypatch.setattr("jaxdistill.resolve.load_config", lambda folder: dataclasses.replace(load_shape(folder), num_heads=6))
    with pytest.raises(InputError, match=r"^kernels.attention: students.small: cudnn .* set training.attention_dropout to 0$"):
        resolved(ground, tmp_path, kernels__attention="cudnn")
    run = resolved(ground, tmp_path, kernels__attention="cudnn", training__attention_dropout=0.0)
    assert run.settings.kernels.attention == "cudnn" and run.warnings == ()


def attention(run):
    (field, said, names), *_ = chosen(run.settings, run.config, run.students, run.mesh)
    assert (field, said) == ("attention", run.config.kernels.attention)
    return names


def test_which_attention_is_taken(ground, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdistill.resolve.load_config", lambda folder: dataclasses.replace(load_shape(folder), num_heads=6))
    assert attention(resolved(ground, tmp_path)) == {"teacher": "cudnn", "small": "plain"}
    run = resolved(ground, tmp_path, training__attention_dropout=0.0)
    assert attention(run) == {"teacher": "cudnn", "small": "cudnn"}
    assert attention(resolved(ground, tmp_path, platform="cpu")) == {"teacher": "plain", "small": "plain"}


@pytest.mark.parametrize(
    ("capability", "fused"), [("7.5", False), ("8.0", True), ("9.0", True), ("12.0", True), ("gfx90a", False), (None, False)]
)
def test_gpus_that_are_too_old_for_fused_attention(ground, tmp_path, monkeypatch, capability, fused):
    device = SimpleNamespace(platform="gpu", **({"compute_capability": capability} if capability else {}))
    assert fuses_attention(device) == fused and fuses_attention(jax.devices()[0])
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run = resolve(load_config(ground.config(tmp_path / "run", training__attention_dropout=0.0)), num_devices=1)
    assert run.settings.kernels.attention == ("auto" if fused else "plain")
    assert run.settings.kernels.relations == ("auto" if fused else "attend")
    assert [warning[:25] for warning in run.warnings] == ([] if fused else ["kernels.attention: plain,", "kernels.relations: attend"])
