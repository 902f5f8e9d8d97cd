"""Configs: reading, overriding, and one line for what is wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxdistill.config import Config, Schedule, load_config, select_students
from jaxdistill.config.load import apply_overrides
from jaxdistill.errors import InputError

FIELDS = {"teacher": "t", "data": {"sources": ["a.txt"]}, "students": {"s": {"num_layers": 3}}, "output": "o"}


def test_yaml_round_trip():
    config = load_config(FIELDS, ["optimizer.learning_rate=3e-4", "students.s.initialise=[1, 2, 3]"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.students["s"].initialise == (1, 2, 3)
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_numbers_with_an_exponent_need_no_dot(tmp_path):
    path = tmp_path / "c.yaml"
    start = "teacher: t\ndata: {sources: [a.txt]}\nstudents: {s: {num_layers: 3}}\noutput: o\n"
    path.write_text(start + "optimizer: {learning_rate: 5e-4, eps: 1E-6}\n")
    assert load_config(path).optimizer.learning_rate == 5e-4
    assert load_config(path).optimizer.eps == 1e-6


def test_strings_that_look_like_numbers_stay_strings():
    source = {"dataset": "a/b", "revision": "1e2bd456789012345678901234567890abcdabcd"}
    config = load_config(FIELDS | {"data": {"sources": [source]}}, ["teacher=5e3-bert"])
    assert config.teacher == "5e3-bert"
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_keywords_go_over_the_file_section_by_section(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("teacher: t\ndata: {sources: [a.txt]}\nstudents: {s: {num_layers: 3}}\noutput: o\ntraining: {steps: 7, seed: 3}\n")
    config = load_config(path, training={"steps": 9}, optimizer={"learning_rate": np.float32(0.5)})
    assert (config.training.steps, config.training.seed, config.optimizer.learning_rate) == (9, 3, 0.5)


def test_overrides_reach_the_default_objective_and_sources_written_as_strings():
    config = load_config(FIELDS, ["objective.0.relation_heads=12", "data.sources.0.column=body"])
    assert config.objective[0].relation_heads == 12
    assert config.data.sources[0].path == "a.txt" and config.data.sources[0].column == "body"


def test_overrides_reach_into_lists_and_new_sections_and_leave_the_input_alone():
    fields = {**FIELDS, "objective": [{"kind": "relation_kl"}]}
    changed = apply_overrides(fields, ["objective.0.relation_heads=12", "training.steps=5", "data.sources.0={path: b.txt, weight: 2}"])
    assert changed["objective"][0]["relation_heads"] == 12
    assert changed["training"] == {"steps": 5}
    assert changed["data"]["sources"] == [{"path": "b.txt", "weight": 2}]
    assert "training" not in fields and fields["data"]["sources"] == ["a.txt"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[]", "data.sources: "),
        ("data.sources=[{path: a, dataset: b}]", "data.sources.0: give either path"),
        ("data.sources=[{path: a, weight: 1}, b]", "data: give every source a weight, or none"),
        ("data.held_out=1.5", "data.held_out: .*less than 1, got 1.5"),
        ("students={a/b: {num_layers: 1}}", "students: student name 'a/b' becomes a folder"),
        ("students={'..': {num_layers: 1}}", "students: student name"),
        ("objective=[{query: 0, key: 0, value: 0}]", "objective.0: query, key and value all have weight 0"),
        ("objective=[{kind: relation_k}]", "objective.0.kind: .*'relation_kl'"),
        ("training.seed=-1", "training.seed: "),
        ("output=3", "output: .*string, got 3"),
        ("mesh.data=two", "mesh.data: .*integer, got 'two'"),
        ("objective=[hidden_msw]", "objective.0.kind: unknown term 'hidden_msw'; did you mean 'hidden_mse'"),
        ("objective=[3]", "objective.0: a term is a kind, or a mapping with one, got 3"),
        ("students.s.objective=[{kind: hidden_mse, relation_heads: 3}]", "students.s.objective.0.relation_heads: unknown field"),
        (
            "objective=[{layer_map: {strategy: last, every: 3}}]",
            "objective.0.layer_map: layer map 'last' has no option 'every'; .*'random'",
        ),
        ("objective=[{weight: -1}]", "objective.0.weight: a weight is not negative and not always 0, got -1"),
        ("objective=[{weight: 0}]", "objective.0.weight: a weight is not negative and not always 0, got 0"),
        ("objective=[{weight: true}]", "objective.0.weight: "),
        ("objective=[{kind: output_kl, temperature: 0}]", "objective.0.temperature: a temperature is above 0, got 0"),
        (
            "objective=[{kind: output_kl, temperature: {schedule: step, values: [2, -1], steps: [0, 9]}}]",
            "objective.0.temperature: a temperature is above 0, got step 2 at 0, -1 at 9",
        ),
        (
            "objective=[{weight: {values: [1, 0], steps: [0, 9]}}]",
            "objective.0.weight: several values need schedule: linear, cosine or step",
        ),
        (
            "objective=[{weight: {schedule: linear, values: [1, 0], steps: [0]}}]",
            r"objective.0.weight: values \[1.0, 0.0\] and steps \[0\] are not equally many",
        ),
        ("objective=[{weight: {schedule: linear, values: [1, 0], steps: [9, 9]}}]", r"objective.0.weight: steps \[9, 9\] do not increase"),
        ("objective=[{weight: {schedule: linear, values: [1, 0], steps: [-1, 9]}}]", "objective.0.weight.steps.0: "),
        ("objective=[{weight: {schedule: liner, values: [1, 0], steps: [0, 9]}}]", "objective.0.weight.schedule: .*'linear'"),
        ("objective=[{weight: {schedule: linear, value: [1, 0]}}]", "objective.0.weight.value: unknown field; did you mean 'values'"),
        ("masking={mask: 0.8, random: 0.3}", "masking: mask 0.8 and random 0.3 together are over 1"),
        ("students.s.optimizer.learning_rat=1", "students.s.optimizer.learning_rat: unknown field.*'learning_rate'"),
        ("students.s.optimizer.learning_rate=-1", "students.s.optimizer.learning_rate: "),
        ("stages={a/b: {}}", "stages: stage name 'a/b' becomes a folder"),
        ("stages={a: {objektive: [hidden_mse]}}", "stages.a.objektive: unknown field; did you mean 'objective'"),
        ("stages={a: {students: {x/y: {num_layers: 1}}}}", "stages.a.students: student name 'x/y' becomes a folder"),
    ],
)
def test_errors_name_the_field(override, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        load_config(FIELDS, [override])
    assert "\n" not in str(error.value)


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("teacher: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)


# Numbers that change


SCHEDULES = {
    "constant": (Schedule(values=(0.3,)), {0: 0.3, 99: 0.3}),
    "linear": (
        Schedule(schedule="linear", values=(1.0, 0.0, 4.0), steps=(2, 6, 8)),
        {0: 1.0, 2: 1.0, 3: 0.75, 5: 0.25, 6: 0.0, 7: 2.0, 8: 4.0, 50: 4.0},
    ),
    "cosine": (
        Schedule(schedule="cosine", values=(2.0, 0.0), steps=(0, 6)),
        {0: 2.0, 1: 1 + 3**0.5 / 2, 2: 1.5, 3: 1.0, 4: 0.5, 6: 0.0, 7: 0.0},
    ),
    "step": (Schedule(schedule="step", values=(1.0, 2.0, 5.0), steps=(0, 3, 6)), {0: 1.0, 2: 1.0, 3: 2.0, 5: 2.0, 6: 5.0, 9: 5.0}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_as_a_number_and_traced(name):
    schedule, expected = SCHEDULES[name]
    steps = jnp.array(list(expected), jnp.int32)
    assert [schedule.at(step) for step in expected] == pytest.approx(list(expected.values()), abs=1e-12)
    traced = jax.jit(jax.vmap(lambda step: jnp.float32(schedule.at(step))))(steps)
    np.testing.assert_allclose(traced, list(expected.values()), atol=1e-6)


def test_a_traced_step_is_exact_in_a_long_run():
    schedule = Schedule(schedule="step", values=(0.0, 1.0, 0.0), steps=(0, 399_999, 400_000))
    at = jax.jit(schedule.at)
    assert [float(at(jnp.int32(step))) for step in (399_998, 399_999, 400_000)] == [0.0, 1.0, 0.0]


def test_schedules_round_trip_and_show_as_written():
    fields = {"schedule": "cosine", "values": [4, 1], "steps": [0, 1000]}
    objective = [{"kind": "output_kl", "temperature": fields, "weight": 0.5}, {"kind": "hidden_contrastive"}]
    config = load_config(FIELDS, objective=objective)
    assert str(config.objective[0].temperature) == "cosine 4 at 0, 1 at 1000"
    written = yaml.safe_load(config.to_yaml())
    assert Config.model_validate(written) == config
    first, second = written["objective"]
    assert (first["temperature"], first["weight"], second["temperature"]) == (fields, 0.5, 0.07)


# Grids, selections, changes


SHAPES = {"6L": {"num_layers": 6, "optimizer": {"learning_rate": 1e-3}}, "3L": {"num_layers": 3}}
METHODS = {"hs": {"objective": ["hidden_mse"], "optimizer": {"b1": 0.5}}, "od": {"objective": ["output_kl"], "num_heads": 4}}
GRID = {key: value for key, value in FIELDS.items() if key != "students"}


def test_a_grid_is_multiplied_out():
    config = load_config(GRID, grid=[SHAPES, METHODS])
    assert list(config.students) == ["6L.hs", "6L.od", "3L.hs", "3L.od"]
    assert [student.num_layers for student in config.students.values()] == [6, 6, 3, 3]
    assert [student.objective[0].kind for student in config.students.values()] == ["hidden_mse", "output_kl"] * 2
    merged = config.optimizer_of("6L.hs")
    assert (merged.learning_rate, merged.b1) == (1e-3, 0.5)
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config  # without a grid: it is students by now
    assert load_config(config) == config


def test_later_axes_go_over_earlier_ones_and_overrides_reach_the_axes():
    config = load_config(GRID, ["grid.0.b.num_heads=3"], grid=[{"a": {"num_layers": 6}, "b": {"num_layers": 3}}, {"x": {"num_layers": 2}}])
    assert [(student.num_layers, student.num_heads) for student in config.students.values()] == [(2, None), (2, 3)]


def test_a_grid_stands_beside_students():
    config = load_config(FIELDS, grid=[SHAPES])
    assert list(config.students) == ["s", "6L", "3L"]
    assert list(load_config(FIELDS, grid=None).students) == ["s"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "grid: a list of axes is needed"),
        ({"6L": {}}, "grid: a list of axes is needed"),
        ([SHAPES, ["hs"]], "grid.1: an axis is a mapping of names"),
        ([{}], "grid.0: an axis is a mapping of names"),
        ([{"6L": 6}], "grid.0: an axis is a mapping of names to fields of a student"),
        ([{"s": {"num_layers": 1}}], "grid: there are two students 's'"),
        ([{"a": {}, "a.b": {}}, {"b.c": {}, "c": {}}], "grid: there are two students 'a.b.c'"),
        ([{"a/b": {"num_layers": 1}}], "students: student name 'a/b' becomes a folder"),
        ([{"a": {"num_layer": 1}}], "students.a.num_layer: unknown field; did you mean 'num_layers'"),
    ],
)
def test_errors_of_grids(tmp_path, grid, message):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"grid": grid}))
    with pytest.raises(InputError, match=f"^{path}: {message}") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_selection_of_students_and_of_the_stages_that_have_them():
    stages = {
        "first": {"students": ["6L.*", "3L.od"]}, "second": {"students": ["3L.hs"]}, "third": {},
        "fourth": {"students": {"new": {"num_layers": 1}}},
    }  # fmt: skip
    config = load_config(GRID, grid=[SHAPES, METHODS], stages=stages)
    chosen = select_students(config, ["*.od", "6L.o?"])
    assert list(chosen.students) == ["6L.od", "3L.od"]
    assert list(chosen.stages) == ["first", "third"]
    assert chosen.stages["first"].students == ("6L.*", "3L.od")
    (only,) = [stage.students for name, stage in select_students(config, ["3L.od"]).stages.items() if name == "first"]
    assert only == ("3L.od",)
    assert select_students(config, []) is config
    for pattern in ("9L", "6l.hs"):  # names have their case
        with pytest.raises(InputError, match=f"^--student: no student matches '{pattern}'"):
            select_students(config, ["3L.od", pattern])


def test_the_optimizer_of_a_student_is_the_runs_with_its_changes():
    config = load_config(
        FIELDS,
        students={
            "s": {"num_layers": 3},
            "own": {"num_layers": 3, "optimizer": {"learning_rate": 0.5, "clip_norm": 0.0, "schedule": "cosine"}},
        },
        optimizer={"b1": 0.7, "learning_rate": 0.25},
    )
    assert config.optimizer_of("s") == config.optimizer
    own = config.optimizer_of("own")
    assert (own.learning_rate, own.clip_norm, own.schedule, own.b1) == (0.5, 0.0, "cosine", 0.7)
    assert own.model_copy(update={"learning_rate": 0.25, "clip_norm": 1.0, "schedule": "linear"}) == config.optimizer


def test_a_teacher_of_a_kept_stage_is_kept():
    stages = {"first": {"students": ["6L.*"]}, "second": {"students": {"new": {"num_layers": 1}}, "teacher": {"student": "6L.hs"}}}
    config = load_config(GRID, grid=[SHAPES, METHODS], stages=stages)
    chosen = select_students(config, ["new"])
    assert (list(chosen.students), list(chosen.stages)) == (["6L.hs"], ["first", "second"])
    assert list(select_students(config, ["6L.hs"]).stages) == ["first"]
    with pytest.raises(InputError, match=r"^--student: no stage trains 3L\.hs"):
        select_students(config, ["3L.hs"])


def test_an_override_reaches_a_cell_of_the_grid():
    plain = load_config(GRID, grid=[SHAPES, METHODS])
    config = load_config(GRID, ["students.6L.hs.optimizer.learning_rate=0.5", "training.steps=7"], grid=[SHAPES, METHODS])
    assert config.optimizer_of("6L.hs").learning_rate == 0.5
    assert {n: s for n, s in config.students.items() if n != "6L.hs"} == {n: s for n, s in plain.students.items() if n != "6L.hs"}
    assert list(load_config(GRID, ["grid=[{a: {num_layers: 1}}]"], grid=[SHAPES]).students) == ["a"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"students": {"s": {"num_layers": 1, "optimizer": {"clip_norm": None}}}}, "students.s.optimizer: clip_norm: null changes nothing"),
        ({"stages": {"x": {"training": {"dropout": None}}}}, "stages.x.training: dropout: null changes nothing"),
        ({"objective": [{"weight": "1"}]}, "objective.0.weight: a number, or {schedule"),
        ({"objective": [{"layer_map": 3}]}, "objective.0.layer_map: a name, or a mapping"),
    ],
)
def test_errors_that_say_what_would_be_right(fields, message):
    with pytest.raises(InputError) as error:
        load_config(FIELDS | fields)
    assert str(error.value).startswith(message)


def test_short_forms():
    assert load_config(FIELDS, objective="hidden_mse").objective == load_config(FIELDS, objective=[{"kind": "hidden_mse"}]).objective
    assert load_config(FIELDS, stages={"x": None}) == load_config(FIELDS, stages={"x": {}})


@pytest.mark.parametrize(
    ("place", "wrong"),
    [("gs://bucket/run", "output: is a URL, and only folders are written"), ("", "output: is empty; name a folder"), (" ", "is empty")],
)
def test_the_output_is_a_folder(place, wrong):
    with pytest.raises(InputError, match=wrong):
        load_config({"teacher": "x", "data": {"sources": ["x"]}, "students": {"a": {"num_layers": 1}}, "output": place})


def test_the_output_as_a_url_of_this_machine():
    fields = {"teacher": "x", "data": {"sources": ["x"]}, "students": {"a": {"num_layers": 1}}}
    assert load_config(fields | {"output": "file:///tmp/run"}).output == "/tmp/run"
