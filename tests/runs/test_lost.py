"""`jaxdistill lost` on a run made by hand: what it writes, and what it refuses."""

import json
import shutil

import matplotlib.image
import numpy as np
import pytest
import yaml
from tiny_models import tiny_config, write_model
from tiny_texts import ROBERTA_SPECIAL, byte_level_bpe, make_texts, write_folder

from jaxdistill.config import load_config
from jaxdistill.data import load_tokenizer
from jaxdistill.lost import SHIPPED, _sources
from jaxdistill.results import read_result

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.long]


def write_student(folder, tokenizer, *, num_layers=2, mlm=False, **shape):
    """A model folder with the tokenizer of another folder."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    shape = {"vocab_size": load_tokenizer(tokenizer).vocab_size, "max_position_embeddings": 64} | shape
    write_model(folder, tiny_config(num_layers=num_layers, **shape), seed=num_layers)
    if mlm:
        write_model(folder / "mlm", tiny_config(num_layers=num_layers, **shape), seed=num_layers, mlm=True)
    return folder


@pytest.fixture(scope="module")
def run(ground_with_head, tmp_path_factory):
    """A run of two students, of which one has an MLM head as its teacher has."""
    folder = tmp_path_factory.mktemp("lost") / "run"
    write_student(folder / "export" / "small", ground_with_head.teacher, hidden_size=36, num_heads=3, mlm=True)
    write_student(folder / "export" / "tiny", ground_with_head.teacher, num_layers=1)
    config = ground_with_head.config(folder, data__held_out=0.3)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_run_against_its_own_teacher(cli, run, ground_with_head, tmp_path):
    results = tmp_path / "results"
    code, out, err = cli("lost", run, "--length", "16", "--rows", "24", "--results", results)
    assert code == 0, err
    sections = {name: read_result(results / f"{name}.json")["lost"] for name in ("small", "tiny")}
    small, tiny = sections.values()
    assert small["teacher"] == "teacher_with_head" and small["text"]["source"] == "text.jsonl"
    assert 10 < small["text"]["rows"] <= 24 and small["text"]["tokens"] > 5 * small["text"]["rows"]
    assert {"mlm_top1", "mlm_top5"} <= set(small["numbers"]) and "mlm_top1" not in tiny["numbers"]
    assert 0 < small["numbers"]["cka_last"] < 1 and small["numbers"]["attention_heads"] == 16
    for name, section in sections.items():
        assert set(section) == {"teacher", "teacher_sha256", "text", "numbers", "answers", "heatmaps", "tables"}
        pictures = sorted(path.name for path in (results / "lost" / name).iterdir())
        assert len(pictures) == len(section["heatmaps"]) == 7
        assert all(matplotlib.image.imread(results / "lost" / name / picture).size for picture in pictures)
        assert all(f"- {answer}" in out for answer in section["answers"])
    assert np.shape(small["heatmaps"][0]["values"]) == (3, 5)
    assert "By length and language" in out


def test_the_teacher_itself_loses_nothing(cli, ground, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [{"words": text, "tongue": "de" if i % 3 else "en"} for i, text in enumerate(make_texts(60)) if len(text) > 30]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--text", text, "--column", "words", "--language-column", "tongue", "--rows", "20", "--length", "32"]
    options += ["--teacher", ground.teacher, "--results", tmp_path, "--output", tmp_path / "p"]
    code, _, err = cli("lost", f"same={ground.teacher}", *options)
    assert code == 0, err
    section = read_result(tmp_path / "same.json")["lost"]
    numbers = section["numbers"]
    for name in ("cka_last", "cka_embeddings", "cka_last_debiased", "relation_overlap", "attention_best_overlap", "similarity_mean"):
        assert numbers[name] == pytest.approx(1.0, abs=1e-3), name
    assert numbers["relation_kl"] == pytest.approx(0.0, abs=1e-3)
    assert numbers["attention_heads_with_counterpart"] == numbers["attention_heads"] == 16
    languages = next(table for table in section["tables"] if table["title"] == "By language")
    assert [row[:2] for row in languages["rows"]] == [["de", 10], ["en", 10]]
    assert "By language" in " ".join(section["answers"])
    assert (tmp_path / "p" / "same" / "cka-of-hidden-states.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{small}", "--text", "/no/such/text"], ["/no/such/text: no such file or folder"]),
        (["{small}", "--text", "{text}", "--language-column", "lang"], ["no field 'lang'"]),
        (["{small}", "--text", "{text}", "--column", "body"], ["no field 'body'"]),
        (["{small}", "--column", "body"], ["--column:", "none is given"]),
        (["{small}", "--teacher", "/no/model"], ["/no/model: no such model folder"]),
        (["/no/model"], ["/no/model: no such model folder"]),
        (["{alone}"], ["--teacher:", "lies in no run", "give it"]),
        (["{alone}", "--teacher", "{other}"], ["its tokenizer", "is not that of the teacher", "same tokens"]),
        (["{bare}", "--teacher", "{alone}"], ["no tokenizer files there"]),
        (["{small}", "--rows", "2"], ["--rows: at least 3, got 2"]),
        (["{small}", "--length", "65"], ["--length: 65 is not within 8 and the 64 positions"]),
        (["name={run}"], ["a run of 2 students"]),
    ],
)
def test_wrong_input(cli, run, ground, tmp_path_factory, tmp_path, arguments, parts):
    root = tmp_path_factory.getbasetemp() / "lost_models"
    if not root.exists():
        write_student(root / "alone", ground.teacher)
        write_student(root / "other", write_folder(root / "bpe", byte_level_bpe(), ROBERTA_SPECIAL))
        write_model(root / "bare", tiny_config())
    places = {"run": run, "small": run / "export" / "small", "text": ground.text} | {p.name: p for p in root.iterdir()}
    length = () if "--length" in arguments else ("--length", "16")
    code, out, err = cli("lost", *(argument.format(**places) for argument in arguments), *length, "--results", tmp_path / "results")
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "results").exists()


def test_results_of_other_weights_are_refused_before_measuring(cli, run, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({"format": "jaxdistill results", "model": {"weights_sha256": "0", "source": "x"}}))
    code, out, err = cli("lost", run / "export" / "small", "--length", "16", "--results", tmp_path)
    assert (code, out) == (2, "") and "results of a model with other weights (x)" in err


def test_a_run_on_a_task_has_no_text_of_its_own():
    task = {"teacher": "t", "data": {"task": "sst2"}, "students": {"x": {"num_layers": 1}}, "objective": ["label_kl"], "output": "o"}
    sources, held_out = _sources(load_config(task | {"training": {"epochs": 1}}), {"text": None, "column": None})
    assert sources[0].path == str(SHIPPED) and held_out is None
