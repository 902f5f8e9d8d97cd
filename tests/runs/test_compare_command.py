"""`compare` from the command line: what it reads, what it writes, and what it refuses in one line."""

import json

import pytest
import yaml
from tiny_models import tiny_config, write_model

from jaxdistill.results import describe_model

MODEL = {"source": "x", "family": "bert", "num_layers": 2, "parameters": 1000}
RUN = {"learning_rate": 2e-5, "batch_size": 32, "epochs": 3}


def write(path, name="one", score=0.6, **model):
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [RUN | {"seed": seed, "scores": {"validation": {"accuracy": score + seed / 50}}} for seed in range(3)]
    scores = {"protocol": {"name": "p"}, "tasks": {"rte": {"examples": {}, "runs": listed, "notes": []}}, "missing": {"cola": "no data"}}
    value = {"format": "jaxdistill results", "name": name, "model": MODEL | {"weights_sha256": name} | model, "scores": scores}
    path.write_text(json.dumps(value))
    return path


def test_results_and_a_published_table(cli, tmp_path):
    write(tmp_path / "results" / "a.json", "one")
    write(tmp_path / "results" / "b.json", "two", 0.5, parameters=2000)
    output = tmp_path / "seen"
    code, out, err = cli("compare", tmp_path / "results", "udagawa2023:3L:monolingual", "--output", output, "--reference", "one")
    assert (code, err) == (0, "")
    assert "one (reference)" in out and "62.0 ± 2.0" in out and "3L HS uniform monolingual" in out and str(output / "index.html") in out
    assert {path.name for path in output.iterdir()} == {"comparison.md", "comparison.csv", "index.html"}
    assert "two,measured,rte,validation,accuracy,52,2,3,,,one,-10" in (output / "comparison.csv").read_text()
    assert "one: no CoLA: no data" in (output / "comparison.md").read_text()


def test_a_run_and_a_model_folder_are_looked_up_by_their_weights(cli, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    write_model(run / "export" / "scored", tiny_config())
    write_model(run / "export" / "unscored", tiny_config(), seed=1)
    write_model(plain, tiny_config(), seed=2)
    (run / "config.yaml").write_text(yaml.safe_dump({"teacher": "bert-base-uncased", "students": {"scored": {}, "unscored": {}}}))
    for name, folder in (("scored", run / "export" / "scored"), ("plain", plain)):
        write(tmp_path / "found" / f"{name}.json", name, **describe_model(folder))
    code, _, err = cli("compare", run, plain, "--results", tmp_path / "found", "--output", tmp_path / "seen")
    assert (code, err) == (0, "")
    text = (tmp_path / "seen" / "comparison.md").read_text()
    main = text.partition("## Difference")[0]
    rows = {line.split("|")[1].strip(): line for line in main.splitlines() if line.startswith("| ")}
    assert "62.0 ± 2.0" in rows["plain"] and "62.0 ± 2.0" in rows["scored (reference)"]
    assert "| - |" in rows["unscored"]
    assert "unscored: no results of these weights in found/: parameters only" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["udagawa2032"], "neither a file or folder here nor a published table; did you mean 'udagawa2023'?"),
        (["udagawa2023:9L"], "no row of udagawa2023 has '9L'"),
        (["empty"], "empty: neither results (*.json), nor a run (config.yaml and export/), nor a model"),
        (["unfinished"], "unfinished: a run without exported students"),
        (["broken"], "broken.json: cannot be read as results"),
        (["foreign/foreign.json"], "foreign.json: not a file of results"),
        (["good", "--reference", "on"], "--reference on: no such model among those measured here; did you mean 'one'?"),
        (["good", "--output", "there"], "there: holds index.html; name another --output, or give --overwrite"),
        (["good", "--output", "good/a.json"], "good/a.json: a file, not a folder"),
        (["hollow"], "hollow.json: model.parameters: not a number"),
    ],
)
def test_what_is_wrong_is_one_line(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "unfinished", "broken", "foreign", "there", "hollow"):
        (tmp_path / name).mkdir()
    write(tmp_path / "good" / "a.json")
    (tmp_path / "unfinished" / "config.yaml").write_text("teacher: x\n")
    (tmp_path / "broken" / "broken.json").write_text('{"format": ')
    (tmp_path / "foreign" / "foreign.json").write_text("{}")
    (tmp_path / "hollow" / "hollow.json").write_text('{"format": "jaxdistill results", "name": "x", "model": {}}')
    (tmp_path / "there" / "index.html").write_text("mine")
    before = {path for path in tmp_path.rglob("*")}
    code, out, err = cli("compare", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and message in err
    assert {path for path in tmp_path.rglob("*")} == before
    assert (tmp_path / "there" / "index.html").read_text() == "mine"


def test_overwrite(cli, tmp_path):
    write(tmp_path / "good" / "a.json")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.html").write_text("mine")
    code, _, err = cli("compare", tmp_path / "good", "--output", tmp_path / "there", "--overwrite")
    assert (code, err) == (0, "")
    assert "<h1>Comparison</h1>" in (tmp_path / "there" / "index.html").read_text()
