"""The file of results: what is damaged is refused in one line, what two commands write at once is kept."""

import json

import pytest

from jaxdistill.errors import InputError
from jaxdistill.results import FORMAT, is_result, read_result, result_file, update_section, write_section

MODEL = {"weights_sha256": "a", "parameters": 1}
RUN = {"seed": 0, "scores": {"validation": {"accuracy": 0.5}}}


def damaged(tmp_path, **sections):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": FORMAT, "name": "x", "model": MODEL} | sections))
    return path


@pytest.mark.parametrize(("sections", "place"), [
    ({"model": []}, "model"),
    ({"scores": []}, "scores"),
    ({"scores": {"tasks": []}}, "scores.tasks"),
    ({"scores": {"tasks": None}}, "scores.tasks"),
    ({"scores": {"tasks": {"rte": {"runs": [{"seed": 0, "scores": []}]}}}}, "scores.tasks.rte.runs.0.scores"),
    ({"scores": {"tasks": {"rte": {"runs": [{"seed": "one", "scores": {}}]}}}}, "scores.tasks.rte.runs.0.seed"),
    ({"scores": {"tasks": {}, "missing": []}}, "scores.missing"),
    ({"scores": {"tasks": {}, "protocol": "udagawa2023"}}, "scores.protocol"),
    ({"scores": {"tasks": {}, "protocol": {"learning_rates": 1}}}, "scores.protocol.learning_rates"),
    ({"scores": {"tasks": {}, "protocol": {"epochs_of": []}}}, "scores.protocol.epochs_of"),
    ({"latency": {"measurements": None}}, "latency.measurements"),
    ({"lost": {"heatmaps": "none"}}, "lost.heatmaps"),
    ({"lost": {"heatmaps": ["none"]}}, "lost.heatmaps.0"),
    ({"lost": {"tables": ["none"]}}, "lost.tables.0"),
])  # fmt: skip
def test_damaged_sections(sections, place, tmp_path):
    with pytest.raises(InputError, match=rf"x\.json: {place}.*: not as the commands write it") as caught:
        read_result(damaged(tmp_path, **sections))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "another"}'])
def test_files_of_something_else(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.json: "):
        read_result(path)
    assert is_result(path) is (text == "{")  # it may be one that is broken: that is said, not passed over


def test_a_whole_file_reads_back(tmp_path):
    path = damaged(tmp_path, scores={"tasks": {"rte": {"runs": [RUN]}}}, latency={"measurements": [{}]}, lost={})
    assert read_result(path)["scores"]["tasks"]["rte"]["runs"] == [RUN]


def test_sections_stay_beside_each_other(tmp_path):
    write_section(tmp_path, "x", MODEL, "latency", {"measurements": []})
    write_section(tmp_path, "x", MODEL, "lost", {"answers": ["a"]})
    update_section(tmp_path, "x", MODEL, "lost", lambda before: before | {"answers": [*before["answers"], "b"]})
    value = read_result(tmp_path / "x.json")
    assert value["latency"] == {"measurements": []} and value["lost"]["answers"] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "x.json"]


def test_other_weights(tmp_path):
    write_section(tmp_path, "x", MODEL, "latency", {"measurements": []})
    other = MODEL | {"weights_sha256": "b"}
    with pytest.raises(InputError, match="results of a model with other weights"):
        write_section(tmp_path, "x", other, "lost", {})
    update_section(tmp_path, "x", other, "lost", lambda before: {}, replace=True)
    assert "latency" not in read_result(tmp_path / "x.json")


def test_names_of_files(tmp_path):
    assert result_file(tmp_path, "modèle-1.0").name == "modèle-1.0.json"
    assert result_file(tmp_path, "a/b c").name == "a_b_c.json"
