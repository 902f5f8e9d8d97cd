"""A config with stages as its runs: names, folders, what goes over what, who starts from where, and every refusal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxdistill.config import CheckpointConfig, Config, HiddenMSE, OptimizerConfig, OutputKL, RelationKL, load_config, select_students
from jaxdistill.errors import InputError
from jaxdistill.stages import Stage, stages_of

OUT = "/runs/one"
RATE = {"learning_rate": 1e-3}


def config(stages: dict, **fields) -> Config:
    base = {
        "teacher": "t",
        "data": {"sources": ["a.txt"]},
        "students": {"a": {"num_layers": 2}, "b": {"num_layers": 3}},
        "training": {"steps": 80, "seed": 7},
        "output": OUT,
    }
    return load_config(base | fields, stages=stages)


def runs(stages: dict, **fields) -> dict[str, Config]:
    found = stages_of(config(stages, **fields))
    assert [stage.name for stage in found] == list(stages)
    return {stage.name: stage.config for stage in found}


TWO = {"a": {"num_layers": 2}, "b": {"num_layers": 2, "initialise": {"student": "a"}}}


def start(folder: str) -> CheckpointConfig:
    return CheckpointConfig(checkpoint=folder)


def starts(config: Config) -> dict:
    return {name: student.initialise for name, student in config.students.items()}


def test_a_config_without_stages_is_itself():
    alone = config({})
    assert stages_of(alone) == (Stage("", alone),)
    assert (stages_of(alone)[0].objective, stages_of(alone)[0].students) == ("objective", "students")


def test_names_folders_and_stores():
    found = runs({"first": {}, "second": {}, "third": {}})
    assert [each.output for each in found.values()] == [f"{OUT}/stages/first", f"{OUT}/stages/second", OUT]
    store = {str(Path(each.data.store or Path(each.output) / "tokens")) for each in found.values()}
    assert store == {f"{OUT}/tokens"}  # the text is read once
    assert all(not each.stages for each in found.values())
    given = runs({"first": {}, "last": {}}, data={"sources": ["a.txt"], "store": "/stores/one"})
    assert {each.data.store for each in given.values()} == {"/stores/one"}


def test_one_stage_is_the_run_itself():
    """As it is left when a selection of students empties the others: its folder may move, and its store with it."""
    found = runs({"only": {"training": {"steps": 9}}})["only"]
    assert (found.output, found.training.steps, found.data.store) == (OUT, 9, None)


def test_the_output_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = runs({"first": {}, "last": {}}, output="here")
    assert [each.output for each in found.values()] == [str(tmp_path / "here" / "stages" / "first"), str(tmp_path / "here")]


def test_what_a_stage_says_goes_over_the_run():
    said = {"objective": ["output_kl"], "optimizer": {"learning_rate": 3e-4}, "training": {"steps": 5, "batch_size": 16}}
    said |= {"teacher": "other"}
    found = runs({"plain": {}, "own": said}, objective=["hidden_mse"], optimizer={"b2": 0.9}, teacher_name="the teacher")
    plain, own = found["plain"], found["own"]
    assert plain.objective == (HiddenMSE(),) and own.objective == (OutputKL(),)
    assert plain.optimizer == OptimizerConfig(b2=0.9) and own.optimizer == OptimizerConfig(b2=0.9, learning_rate=3e-4)
    assert (plain.training.steps, own.training.steps, own.training.batch_size) == (80, 5, 16)
    assert (plain.teacher, plain.teacher_name) == ("t", "the teacher")
    assert (own.teacher, own.teacher_name) == ("other", None)  # the name was another teacher's


def test_what_a_stage_says_goes_over_the_students_own():
    students = {
        "a": {"num_layers": 2, "objective": ["hidden_mse"], "optimizer": {"learning_rate": 8e-4, "b2": 0.9}, "input": "masked"},
        "b": {"num_layers": 3, "optimizer": {"weight_decay": 0.0}},
    }
    stages = {"silent": {}, "objective": {"objective": ["output_kl"]}, "rate": {"optimizer": {"learning_rate": 3e-4}}}
    found = runs(stages, students=students)
    silent, objective, rate = (found[name].students["a"] for name in stages)
    assert (silent.objective, silent.input) == ((HiddenMSE(),), "masked")
    # The text that it read was for its own objective; the other one chooses for itself.
    assert (objective.objective, objective.input) == (None, None)
    assert found["objective"].objective == (OutputKL(),)
    assert (rate.objective, rate.input) == ((HiddenMSE(),), "masked")
    for name in ("silent", "objective"):
        assert found[name].optimizer_of("a") == OptimizerConfig(learning_rate=8e-4, b2=0.9)
    # Field by field: of the student's own stays what the stage does not say.
    assert found["rate"].optimizer_of("a") == OptimizerConfig(learning_rate=3e-4, b2=0.9)
    assert found["rate"].optimizer_of("b") == OptimizerConfig(learning_rate=3e-4, weight_decay=0.0)


def test_a_stages_own_students_keep_what_they_say():
    own = {"c": {"num_layers": 1, "objective": ["hidden_mse"], "optimizer": RATE}, "d": {"num_layers": 1}}
    found = runs({"own": {"students": own, "objective": ["output_kl"], "optimizer": {"learning_rate": 3e-4}}})["own"]
    assert set(found.students) == {"c", "d"}
    assert (found.students["c"].objective, found.students["d"].objective, found.objective) == ((HiddenMSE(),), None, (OutputKL(),))
    assert (found.optimizer_of("c").learning_rate, found.optimizer_of("d").learning_rate) == (1e-3, 3e-4)


def test_seeds_differ():
    found = runs({"first": {}, "second": {}, "third": {"training": {"seed": 3}}})
    assert [each.training.seed for each in found.values()] == [7, 8, 3]


def test_the_dtype_of_the_export_is_the_last_ones():
    """Between stages nothing is rounded."""
    found = runs({"first": {}, "second": {}, "third": {}}, export={"dtype": "float16"})
    assert [each.export.dtype for each in found.values()] == ["float32", "float32", "float16"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, ["6L.hs-last", "6L.direct", "4L.hs-last", "4L.direct"]),
        (["*"], ["6L.hs-last", "6L.direct", "4L.hs-last", "4L.direct"]),
        (["*.hs-*"], ["6L.hs-last", "4L.hs-last"]),
        (["4L.direct", "6L.*"], ["6L.hs-last", "6L.direct", "4L.direct"]),  # in the order of the run
        (["[46]L.direct"], ["6L.direct", "4L.direct"]),
    ],
)
def test_patterns(patterns, expected):
    grid = [{"6L": {"num_layers": 6}, "4L": {"num_layers": 4}}, {"hs-last": {}, "direct": {}}]
    found = runs({"first": {}, "second": {"students": patterns}}, students=None, grid=grid)
    assert list(found["second"].students) == expected
    assert starts(found["second"]) == {name: start(f"{OUT}/stages/first/export/{name}") for name in expected}


def test_a_student_goes_on_from_the_stage_that_trained_it_last():
    found = runs({"first": {}, "second": {"students": ["b"]}, "third": {"students": ["a"]}, "fourth": {}})
    assert starts(found["first"]) == {"a": "random", "b": "random"}
    assert starts(found["second"]) == {"b": start(f"{OUT}/stages/first/export/b")}
    assert starts(found["third"]) == {"a": start(f"{OUT}/stages/first/export/a")}  # it skipped the second
    assert starts(found["fourth"]) == {"a": start(f"{OUT}/stages/third/export/a"), "b": start(f"{OUT}/stages/second/export/b")}


def test_a_first_start_is_of_the_first_stage_alone():
    students = {"a": {"num_layers": 2, "hidden_size": 24, "embeddings": "pca"}, "b": {"num_layers": 2, "initialise": "first_k"}}
    found = runs({"first": {"students": ["a"]}, "second": {}}, students=students)
    assert (starts(found["first"]), found["first"].students["a"].embeddings) == ({"a": "random"}, "pca")
    assert starts(found["second"]) == {"a": start(f"{OUT}/stages/first/export/a"), "b": "first_k"}
    assert found["second"].students["a"].embeddings == "random"  # they are in the checkpoint


def test_new_students():
    """Of a stage's own: new ones start as they say; one of the same name goes on unless it says another start."""
    own = {"a": {"num_layers": 2}, "b": {"num_layers": 3, "initialise": "every_k"}, "c": {"num_layers": 1}}
    own |= {"d": {"num_layers": 2, "initialise": {"student": "a"}}}
    found = runs({"first": {}, "second": {"students": own}, "third": {"students": ["c", "d"]}})
    assert starts(found["second"]) == {
        "a": start(f"{OUT}/stages/first/export/a"), "b": "every_k", "c": "random", "d": start(f"{OUT}/stages/first/export/a"),
    }  # fmt: skip
    # A later stage finds them by name, and that d began as another student is over.
    assert starts(found["third"]) == {name: start(f"{OUT}/stages/second/export/{name}") for name in "cd"}


def test_a_student_of_the_run_that_starts_from_another():
    found = runs({"first": {"students": ["a"]}, "second": {"students": ["b"]}, "third": {"students": ["b"]}}, students=TWO)
    assert starts(found["second"]) == {"b": start(f"{OUT}/stages/first/export/a")}
    assert starts(found["third"]) == {"b": start(f"{OUT}/stages/second/export/b")}


def test_an_assistant_is_the_next_teacher():
    stages = {"assistant": {"students": ["b"]}, "student": {"teacher": {"student": "b"}, "students": ["a"]}, "last": {"students": ["a"]}}
    found = runs(stages)
    assert (found["student"].teacher, found["student"].teacher_name) == (f"{OUT}/stages/assistant/export/b", "b (stage assistant)")
    assert (found["last"].teacher, found["last"].teacher_name) == ("t", None)


def test_places_for_messages():
    stages = {"first": {}, "second": {"objective": ["hidden_mse"]}, "third": {"students": {"c": {"num_layers": 1}}}}
    found = [(stage.objective, stage.students) for stage in stages_of(config(stages))]
    assert found == [("objective", "students"), ("stages.second.objective", "students"), ("objective", "stages.third.students")]


def test_the_config_that_a_run_keeps_has_the_same_stages(tmp_path):
    """Every default spelled out, as in RUN/config.yaml: no stage takes one for something that was said."""
    students = {"a": {"num_layers": 2, "optimizer": RATE, "objective": ["hidden_mse"]}, "b": {"num_layers": 3}}
    stages = {
        "first": {},
        "second": {"objective": ["output_kl"], "optimizer": {"b2": 0.9}, "training": {"steps": 5}},
        "third": {"teacher": {"student": "a"}, "students": {"a": {"num_layers": 2}, "c": TWO["b"] | {"num_layers": 1}}},
    }
    written = config(stages, students=students)
    (tmp_path / "config.yaml").write_text(written.to_yaml())
    for read in (load_config(tmp_path / "config.yaml"), load_config(written)):
        assert read == written
        assert stages_of(read) == stages_of(written)


def test_a_selection_drops_the_stages_that_have_none_of_them():
    stages = {"first": {}, "second": {"students": ["b"]}, "third": {"students": ["a", "b"]}}
    found = stages_of(select_students(config(stages), ["a"]))
    assert [(stage.name, list(stage.config.students)) for stage in found] == [("first", ["a"]), ("third", ["a"])]
    assert starts(found[1].config) == {"a": start(f"{OUT}/stages/first/export/a")}


@pytest.mark.parametrize(
    ("stages", "fields", "message"),
    [
        ({}, {"students": TWO}, "students.b.initialise: a student of the stage before, and the config has no stages"),
        ({"first": {}}, {"students": TWO}, "students.b.initialise: a student of the stage before, and this is the first stage"),
        (
            {"first": {"teacher": {"student": "a"}}},
            {},
            "stages.first.teacher: a student of the stage before, and this is the first stage",
        ),
        (
            {"first": {}, "second": {"students": ["a", "x*"]}},
            {},
            "stages.second.students: no student matches 'x*'; known: a, b",
        ),
        (
            {"first": {"students": ["small"]}},
            {"students": {"smaller": {"num_layers": 2}}},
            "stages.first.students: no student matches 'small'; did you mean 'smaller'?",
        ),
        (  # a later stage's student is not known yet
            {"first": {"students": ["c"]}, "second": {"students": {"c": {"num_layers": 1}}}},
            {},
            "stages.first.students: no student matches 'c'; known: a, b",
        ),
        (
            {"first": {"students": ["a"]}, "second": {"students": ["a"], "teacher": {"student": "b"}}},
            {},
            "stages.second.teacher: the stage before, first, has no student 'b'; known: a",
        ),
        (  # of the stage before, not of any before
            {"first": {"students": ["b"]}, "second": {"students": ["a"]}, "third": {"students": ["a"], "teacher": {"student": "b"}}},
            {},
            "stages.third.teacher: the stage before, second, has no student 'b'; known: a",
        ),
        (
            {"first": {}, "second": {"students": {"c": {"num_layers": 2, "initialise": {"student": "teh"}}}}},
            {"students": {"the": {"num_layers": 2}}},
            "stages.second.students.c.initialise: the stage before, first, has no student 'teh'; did you mean 'the'?",
        ),
    ],
)
def test_refusals(stages, fields, message):
    with pytest.raises(InputError) as caught:
        stages_of(config(stages, **fields))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"../first": {}}, "stages: stage name '../first' becomes a folder: use letters"),
        ({"first": {"students": {"a/b": {"num_layers": 1}}}}, "stages.first.students: student name 'a/b' becomes a folder"),
        ({"first": {"students": []}}, "stages.first.students"),
        ({"first": {"training": {"step": 3}}}, "stages.first.training.step: unknown field; did you mean 'steps'?"),
        ({"first": {"optimizer": {"learning_rate": 0}}}, "stages.first.optimizer.learning_rate: Input should be greater than 0"),
        ({"first": {"objektive": ["hidden_mse"]}}, "stages.first.objektive: unknown field; did you mean 'objective'?"),
        ({"first": {"objective": ["hiden_mse"]}}, "stages.first.objective.0.kind: unknown term 'hiden_mse'; did you mean 'hidden_mse'?"),
    ],
)
def test_fields_that_no_stage_has(stages, message):
    with pytest.raises(InputError) as caught:
        config(stages)
    assert str(caught.value).startswith(message), caught.value


def test_a_stage_is_a_value():
    assert {field.name for field in dataclasses.fields(Stage)} == {"name", "config", "objective", "teacher", "students"}
    assert runs({"first": {}})["first"].objective == (RelationKL(),)
