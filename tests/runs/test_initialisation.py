"""What a run's students start from: the parameters before the first step, as the run itself makes them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, wordpiece, write_folder

import jaxdistill
from jaxdistill.checkpoint import Checkpoints, Position
from jaxdistill.config import load_config
from jaxdistill.distill import begin
from jaxdistill.errors import InputError
from jaxdistill.models import init_params, load_pretrained
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.students import projected_embeddings, student_key

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.long]

SIZES = {"num_heads": 4, "intermediate_size": 80}
MLM = [{"kind": "mlm_cross_entropy"}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """12 layers with an MLM head, every parameter random."""
    backend = wordpiece()
    folder = write_folder(tmp_path_factory.mktemp("deep") / "teacher", backend, BERT_SPECIAL)
    write_model(folder, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=12, max_position_embeddings=64), seed=1, mlm=True)
    return folder


@pytest.fixture(scope="module")
def config(ground, teacher, tmp_path_factory):
    """A config of these students on the deep teacher; nothing is trained."""
    output = tmp_path_factory.mktemp("none") / "run"

    def make(students: dict, **changes) -> dict:
        return ground.config(output, teacher=str(teacher), mesh={"data": 8}, students=students, **changes)

    return make


def first_params(fields: dict) -> dict[str, dict]:
    run = resolve(load_config(fields))
    _, teacher_params = load_pretrained(run.teacher_folder)
    mesh = create_mesh(run.config.mesh)
    folder = run.output.parent / "no checkpoints"
    with jax.set_mesh(mesh), Checkpoints(folder) as none:
        state, at = begin(run, none, mesh, teacher_params, print)
    assert (at, int(state.step)) == (Position(), 0)
    return jax.tree.map(np.asarray, {name: student.trained["params"] for name, student in state.students.items()})


def assert_equal(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def encoder(params: dict) -> dict:
    return {name: params[name] for name in ("embeddings", "layers")}


# From the teacher


STARTS = {
    "first": ({"initialise": "first_k", "num_layers": 3}, (1, 2, 3)),
    "every": ({"initialise": "every_k", "num_layers": 3}, (4, 8, 12)),
    "distilbert": ({"initialise": "distilbert", "num_layers": 6}, (1, 3, 5, 8, 10, 12)),
    "explicit": ({"initialise": [12, 1, 12], "num_layers": 3}, (12, 1, 12)),
}


@pytest.fixture(scope="module")
def copied(config) -> dict[str, dict]:
    """All of them in one run; half with a head."""
    students = {name: SIZES | fields for name, (fields, _) in STARTS.items()}
    students |= {f"{name}-head": {**student, "objective": MLM} for name, student in students.items() if name in ("first", "distilbert")}
    return first_params(config(students, training__both_inputs=True))


@pytest.mark.parametrize("name", STARTS)
def test_teacher_layers(copied, teacher, name):
    _, theirs = load_pretrained(teacher)
    layers = {f"{i:02d}": theirs["layers"][f"{layer:02d}"] for i, layer in enumerate(STARTS[name][1], 1)}
    assert_equal(copied[name], {"embeddings": theirs["embeddings"], "layers": layers})


@pytest.mark.parametrize("name", ["first", "distilbert"])
def test_the_teachers_head_comes_along_where_one_is_needed(copied, teacher, name):
    _, theirs = load_pretrained(teacher)
    assert_equal(copied[f"{name}-head"], copied[name] | {"mlm": theirs["mlm"]})


# From its embeddings


def test_projected_embeddings(config, teacher):
    narrow = {"num_layers": 2, "hidden_size": 24, "num_heads": 4}
    found = first_params(config({name: narrow | {"embeddings": name} for name in ("pca", "svd", "random")}))
    _, theirs = load_pretrained(teacher)
    for how in ("pca", "svd"):
        tables, _ = jax.jit(partial(projected_embeddings, hidden_size=24, how=how))(theirs["embeddings"])
        for table, value in tables.items():
            np.testing.assert_allclose(found[how]["embeddings"][table]["embedding"], value["embedding"], atol=1e-5)
        # Blocks and norm are those of a student of this name that starts at random.
        shape = resolve(load_config(config({how: narrow}))).students[0].config
        random = jax.jit(partial(init_params, shape))(student_key(0, how))
        np.testing.assert_allclose(*(each["layers"]["02"]["query"]["kernel"] for each in (found[how], random)), atol=1e-7)
        np.testing.assert_array_equal(found[how]["embeddings"]["norm"]["scale"], np.ones(24, np.float32))
    words = {how: params["embeddings"]["word"]["embedding"] for how, params in found.items()}
    assert np.abs(words["pca"].mean(axis=0)).max() < 1e-5 < np.abs(words["svd"].mean(axis=0)).max()
    assert words["random"].std() < 0.03 < words["svd"].std()


# From a checkpoint


@pytest.fixture(scope="module")
def trained(ground, teacher, tmp_path_factory):
    """A finished run of two students, one with a head."""
    students = {"small": {"num_layers": 2}, "headed": {"num_layers": 2, "objective": MLM, "input": "masked"}}
    output = tmp_path_factory.mktemp("trained") / "run"
    changes = {"teacher": str(teacher), "mesh": {"data": 8}, "training__steps": 2, "training__both_inputs": True, "data__held_out": 0.0}
    return jaxdistill.distill(ground.config(output, students=students, data__store=None, **changes))


def from_(checkpoint: Path, student: str | None = None, **fields) -> dict:
    start = {"checkpoint": str(checkpoint)} | ({"student": student} if student else {})
    return {"num_layers": 2, "initialise": start} | fields


def test_a_model_folder(config, trained, tmp_path):
    base, masked = trained.exports["headed"], trained.exports["headed"] / "mlm"
    students = {
        "base": from_(base),
        "with-head": from_(masked, objective=MLM),
        "head-left": from_(masked),
        "base-with-head": from_(base, objective=MLM),
        "no-head-there": from_(trained.exports["small"], objective=MLM),
    }
    found = first_params(config(students, training__both_inputs=True))
    ended = trained.students["headed"][1]
    for name in ("base", "head-left"):
        assert_equal(found[name], encoder(ended))
    # A head that is wanted comes along, from the folder or from its mlm/.
    assert_equal(found["with-head"], ended)
    assert_equal(found["base-with-head"], ended)
    assert_equal(encoder(found["no-head-there"]), encoder(trained.students["small"][1]))
    kernel = found["no-head-there"]["mlm"]["dense"]["kernel"]  # a random one, neither a student's nor the teacher's
    assert 0.01 < kernel.std() < 0.03 and not np.allclose(kernel, ended["mlm"]["dense"]["kernel"], atol=1e-3)


def test_a_run_folder(config, trained):
    """The student that is named, else the one of the same name, else the only one."""
    found = first_params(config({"other": from_(trained.output, "small"), "small": from_(trained.output)}))
    for name in ("other", "small"):
        assert_equal(found[name], encoder(trained.students["small"][1]))


def test_the_only_student_of_a_run_folder_needs_no_name(config, trained, tmp_path):
    alone = Path(shutil.copytree(trained.output, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "headed")))
    assert_equal(first_params(config({"another": from_(alone)}))["another"], encoder(trained.students["small"][1]))


def test_a_teachers_own_folder_is_a_checkpoint_as_well(config, teacher):
    """A student of the teacher's shape: the teacher itself."""
    students = {"same": from_(teacher, num_layers=12), "head": from_(teacher, num_layers=12, objective=MLM)}
    found = first_params(config({name: SIZES | student for name, student in students.items()}, training__both_inputs=True))
    _, theirs = load_pretrained(teacher)
    assert_equal(found["same"], encoder(theirs))
    assert_equal(found["head"], theirs)


def test_what_does_not_fit_is_refused(config, trained, tmp_path):
    output, folder = trained.output, trained.exports["small"]
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(output / "config.yaml", unfinished)
    place = r"^students\.a\.initialise"
    for student, message in (
        (from_(folder, num_layers=3), rf"{place}: the checkpoint has another shape: num_layers is 2, the student's 3$"),
        (
            from_(output, "small", hidden_size=24),
            rf"{place}: the checkpoint has another shape: hidden_size is 48, the student's 24; intermediate_size is 80, the student's 96$",
        ),
        (from_(output, "smal"), rf"{place}: the run in {output} has exported no student 'smal'; did you mean 'small'\?$"),
        (from_(output), rf"{place}: the run in {output} has exported no student 'a'; known: headed, small$"),
        (from_(unfinished, "small"), rf"{place}: the run in {unfinished} has exported no student 'small'"),
        (from_(folder, "small"), rf"{place}\.student: {folder} is not the folder of a run$"),
        (from_(tmp_path / "none"), "none: no such model folder"),
        (from_(tmp_path / "empty"), "empty: not a model folder"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            resolve(load_config(config({"a": student})))
        assert "\n" not in str(caught.value)


def test_a_run_that_started_from_a_checkpoint_needs_it_no_more(ground, teacher, trained, tmp_path):
    """Its place may change between the parts of a run: it is read once, at the start."""
    changes = {"teacher": str(teacher), "mesh": {"data": 8}, "training__steps": 2, "data__held_out": 0.0, "data__store": None}
    first = Path(shutil.copytree(trained.exports["small"], tmp_path / "first"))
    run = jaxdistill.distill(ground.config(tmp_path / "run", students={"small": from_(first)}, **changes))
    moved = first.rename(tmp_path / "moved")
    again = jaxdistill.distill(ground.config(tmp_path / "run", students={"small": from_(moved)}, **changes))
    assert_equal(again.students["small"][1], run.students["small"][1])
