"""Configs: reading, overriding, and one line for what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from jaxdistill.config import Config, load_config
from jaxdistill.config.load import apply_overrides
from jaxdistill.errors import InputError

FIELDS = {"teacher": "t", "data": {"sources": ["a.txt"]}, "students": {"s": {"num_layers": 3}}, "output": "o"}


def test_yaml_round_trip():
    config = load_config(FIELDS, ["optimizer.learning_rate=3e-4", "students.s.initialise=[1, 2, 3]"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.students["s"].initialise == (1, 2, 3)
    import yaml

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
    import yaml

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
