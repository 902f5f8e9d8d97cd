"""Runs on a task: a fine-tuned teacher, its examples, terms on its labels, in two stages; and what they leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from task_folders import task_columns, write_split, write_task
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, ROBERTA_SPECIAL, byte_level_bpe, wordpiece, write_folder

import jaxdistill
from jaxdistill.config import load_config
from jaxdistill.data import load_tokenizer
from jaxdistill.features import Feature
from jaxdistill.models import forward, load_pretrained
from jaxdistill.resolve import resolve_stages
from jaxdistill.tasks import TASKS, open_task

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.long]

LENGTH, TRAIN, DEV = 24, 42, 13  # one row in three is cut, and the batch of an evaluation is filled up
KINDS = {"bert": (wordpiece, BERT_SPECIAL), "roberta": (byte_level_bpe, ROBERTA_SPECIAL)}
LABELS = [{"kind": "label_kl", "temperature": 2.0}, {"kind": "label_cross_entropy", "weight": 0.5}, {"kind": "label_mse", "weight": 0.1}]
STUDENTS = {"copied": {"num_layers": 1, "initialise": [3]}, "vanilla": {"num_layers": 1, "initialise": "first_k"}}
STAGES = {
    "intermediate": {"students": ["copied"], "objective": ["attention_kl"], "training": {"epochs": 1.4}},
    "prediction": {"objective": LABELS},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for task in ("rte", "sst2", "stsb"):
        write_task(folder, task, train=TRAIN, test=DEV, longest=14)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(family, task) -> a folder of 3 layers with the head of the task; the task "" has none, "mlm" has one for words."""
    root, found = tmp_path_factory.mktemp("teachers"), {}
    for family, task in (("bert", "rte"), ("bert", "stsb"), ("roberta", "stsb"), ("bert", ""), ("bert", "mnli"), ("bert", "mlm")):
        make, special = KINDS[family]
        backend = make()
        labels = TASKS[task].outputs if task in TASKS else ()
        found[family, task] = write_folder(root / f"{family}-{task or 'base'}", backend, special)
        config = tiny_config(family, vocab_size=backend.get_vocab_size(), num_layers=3, max_position_embeddings=64, labels=labels)
        write_model(found[family, task], config, pooler=family == "bert", mlm=task == "mlm")
    return found


@pytest.fixture(scope="module")
def make(data, teachers):
    """A config of two stages on RTE; changes as in `Ground.config`."""

    def config(output: Path, family: str = "bert", task: str = "rte", **changes) -> dict:
        fields = {
            "teacher": str(teachers[family, changes.pop("tuned_on", task)]),
            "data": {"task": {"name": task, "data": str(data)}, "sequence_length": LENGTH},
            "students": STUDENTS, "stages": STAGES, "optimizer": {"learning_rate": 1e-3}, "mesh": {"data": 8}, "output": str(output),
            "training": {
                "epochs": 2, "batch_size": 16, "log_every": 1, "evaluate_every": 3, "checkpoint_every": 3, "keep_checkpoints": 9,
                "tensorboard": False,
            },
        }  # fmt: skip
        for field, value in changes.items():
            section, _, name = field.partition("__")
            fields |= {section: fields[section] | {name: value}} if name else {section: value}
        return fields

    return config


ALONE = {"stages": {}, "objective": LABELS}


@pytest.fixture(scope="module")
def done(make, tmp_path_factory):
    return jaxdistill.distill(make(tmp_path_factory.mktemp("task") / "run"))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_of(data: Path, teacher: Path, family: str = "bert", task: str = "rte"):
    config = load_config({"teacher": "t", "data": {"task": {"name": task, "data": str(data)}}, "students": {"s": {}}, "output": "o"})
    return open_task(config.data.task, tokenizer=load_tokenizer(teacher), family=family, sequence_length=LENGTH)


def logits_of(folder: Path, batch: dict) -> np.ndarray:
    config, params = load_pretrained(folder)
    arrays = (jnp.asarray(batch[name]) for name in ("input_ids", "attention_mask", "token_type_ids"))
    last = Feature("label_logits", config.num_layers)
    return np.asarray(forward(config, params, *arrays, features=frozenset([last]))[last])


def test_epochs_are_steps_of_all_rows(done):
    """1.4 and 2 epochs of 42 rows, 16 a step: 4 and 6 steps."""
    assert [record["step"] for record in records(done.output / "stages" / "intermediate") if "loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in records(done.output) if "loss" in record] == list(range(1, 7))
    saved = load_config(done.output)
    assert (saved.training.steps, saved.training.epochs) == (6, None)
    assert (saved.stages["intermediate"].training.steps, saved.stages["intermediate"].training.epochs) == (4, None)
    assert not (done.output / "tokens").exists()


def test_what_each_stage_leaves(done):
    """The first stage a base model, the second one for classification; a student without the first starts from its own layers."""
    first, last = done.output / "stages" / "intermediate" / "export", done.output / "export"
    assert [path.name for path in first.iterdir()] == ["copied"] and {path.name for path in last.iterdir()} == set(STUDENTS)
    assert load_pretrained(first / "copied")[1].keys() == {"embeddings", "layers", "pooler"}
    assert json.loads((first / "copied" / "config.json").read_text())["architectures"] == ["BertModel"]
    for name in STUDENTS:
        config, params = load_pretrained(last / name)
        assert params.keys() == {"embeddings", "layers", "pooler", "classifier"} and config.labels == ("entailment", "not_entailment")
        values = json.loads((last / name / "config.json").read_text())
        assert (values["architectures"], values["problem_type"]) == (["BertForSequenceClassification"], "single_label_classification")
        assert values["id2label"] == {"0": "entailment", "1": "not_entailment"}
    card = (last / "copied" / "README.md").read_text()
    assert "| task | RTE (rte), one example a row |" in card and "AutoModelForSequenceClassification.from_pretrained" in card
    assert "A finished model for RTE: its outputs are the labels entailment, not_entailment." in card and "to fine-tune" not in card
    assert "clean text, after intermediate" in card and "label_kl: 2 labels (entailment, not_entailment) of the teacher, T 2" in card
    assert "An encoder to fine-tune." in (first / "copied" / "README.md").read_text()


def test_the_head_is_the_students_own_and_trained(done, teachers):
    """Neither the teacher's pooler nor its classifier comes along, and both move from where they began."""
    for name in ("copied", "vanilla"):
        own, taught = done.students[name][1], load_pretrained(teachers["bert", "rte"])[1]
        for head in (("pooler", "dense"), ("classifier", "output")):
            assert not np.allclose(own[head[0]][head[1]]["kernel"], taught[head[0]][head[1]]["kernel"], atol=0.05)
            assert np.abs(own[head[0]][head[1]]["bias"]).max() > 1e-4  # it began at zero


@pytest.fixture(scope="module")
def regression(make, tmp_path_factory):
    """STS-B with RoBERTa, labels alone."""
    objective = ["label_mse", {"kind": "label_cross_entropy", "weight": 0.5}]
    changes = {"stages": {}, "objective": objective, "students": {"copied": STUDENTS["copied"]}, "training__steps": 2}
    return jaxdistill.distill(make(tmp_path_factory.mktemp("stsb") / "run", "roberta", "stsb", **changes, training__epochs=None))


@pytest.mark.torch
@pytest.mark.parametrize(("family", "task"), [("bert", "rte"), ("roberta", "stsb")])
def test_transformers_predicts_what_we_predict(request, data, teachers, family, task):
    import torch
    import transformers

    folder = request.getfixturevalue("done" if task == "rte" else "regression").exports["copied"]
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = rows_of(data, teachers[family, task], family, task).read_batch("held_out", np.arange(DEV))
    types = {"token_type_ids": torch.tensor(batch["token_type_ids"], dtype=torch.long)} if family == "bert" else {}
    with torch.no_grad():
        ids, mask = (torch.tensor(batch[name], dtype=torch.long) for name in ("input_ids", "attention_mask"))
        theirs = model.eval()(input_ids=ids, attention_mask=mask, **types).logits.numpy()
    assert theirs.shape == (DEV, TASKS[task].num_labels) and np.ptp(theirs, axis=0).min() > 1e-3
    np.testing.assert_allclose(logits_of(folder, batch), theirs, atol=1e-5)


def test_held_out_values_by_hand(done, data, teachers):
    """13 rows in a batch of 16: those that fill it up count for nothing, and pairs are read with their token types."""
    batch = rows_of(data, teachers["bert", "rte"]).read_batch("held_out", np.arange(DEV))
    assert batch["token_type_ids"].any()
    theirs = logits_of(teachers["bert", "rte"], batch).astype(np.float64)
    last = records(done.output)[-1]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    for name in STUDENTS:
        ours = logits_of(done.exports[name], batch).astype(np.float64)
        soft, hard = log_softmax(theirs / 2), log_softmax(ours)
        expected = {
            "label_kl": 4 * np.mean(np.sum(np.exp(soft) * (soft - log_softmax(ours / 2)), axis=1)),
            "label_cross_entropy": -np.mean(hard[np.arange(DEV), batch["labels"]]),
            "label_mse": np.mean((ours - theirs) ** 2),
        }
        for term, value in expected.items():
            assert last[f"{name}/held_out/{term}"] == pytest.approx(value, rel=1e-4), (name, term)
        whole = expected["label_kl"] + 0.5 * expected["label_cross_entropy"] + 0.1 * expected["label_mse"]
        assert last[f"{name}/held_out"] == pytest.approx(whole, rel=1e-4)


def exported(folder: Path) -> dict[str, np.ndarray]:
    return {
        f"{path.parent.name}/{name}": array for path in folder.glob("export/*/model.safetensors") for name, array in load_file(path).items()
    }


@pytest.mark.parametrize("stage", ["intermediate", "prediction"])
def test_a_run_that_was_killed_ends_bit_equal(done, make, tmp_path, stage):
    """In either stage after its third step: going on from there gives the same numbers, whether by folder or by config."""
    folder = Path(shutil.copytree(done.output, tmp_path / "run"))
    cut = folder / "stages" / "intermediate" if stage == "intermediate" else folder
    for path in (cut / "checkpoints").iterdir():
        if path.name != "3":
            shutil.rmtree(path)
    shutil.rmtree(cut / "export")
    if stage == "intermediate":  # of the last stage nothing was there yet
        for name in ("checkpoints", "export"):
            shutil.rmtree(folder / name)
        (folder / "metrics.jsonl").unlink()
    again = jaxdistill.distill(folder if stage == "intermediate" else make(folder))
    assert [record["step"] for record in records(again.output) if "loss" in record] == list(range(1, 7))
    expected, found = exported(done.output), exported(folder)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_rows_that_changed_are_not_gone_on_with(done, data, tmp_path, cli):
    folder = Path(shutil.copytree(done.output, tmp_path / "run"))
    moved = Path(shutil.copytree(data, tmp_path / "glue"))
    shutil.rmtree(folder / "export")
    assert cli("distill", folder, f"data.task.data={moved}")[0] == 0  # the same rows elsewhere
    columns = task_columns("rte", TRAIN, 1, 14)
    write_split(moved / "rte", "train", columns | {"label": [1 - columns["label"][0], *columns["label"][1:]]})  # one label
    code, _, err = cli("distill", folder, f"data.task.data={moved}")
    assert code == 2 and "error: data.task: its rows or the tokenizer changed since the run in" in err


def test_alone_in_micro_batches_is_as_beside_others(done, make, tmp_path):
    """The student without a first stage, by itself, in two pieces with their own shares of the rows: the same numbers to rounding."""
    changes = {"students": {"vanilla": STUDENTS["vanilla"]}, "training__seed": 1, "training__micro_batches": 2}
    alone = jaxdistill.distill(make(tmp_path / "run", **ALONE, **changes))
    for one, other in zip(records(alone.output), records(done.output), strict=True):
        names = [name for name in one if name.startswith("vanilla/")]
        assert {"vanilla/label_kl", "vanilla/label_mse"} <= set(names) or "vanilla/held_out" in names
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_regression(regression, data, teachers):
    """Squared errors of the teacher's value and of the label, one output."""
    folder = regression.exports["copied"]
    values = json.loads((folder / "config.json").read_text())
    assert (values["problem_type"], values["id2label"]) == ("regression", {"0": "score"})
    batch = rows_of(data, teachers["roberta", "stsb"], "roberta", "stsb").read_batch("held_out", np.arange(DEV))
    ours, theirs = (logits_of(model, batch)[:, 0] for model in (folder, teachers["roberta", "stsb"]))
    last = records(regression.output)[-1]
    assert last["copied/held_out/label_mse"] == pytest.approx(np.mean((ours - theirs) ** 2), rel=1e-4)
    assert last["copied/held_out/label_cross_entropy"] == pytest.approx(np.mean((ours - batch["labels"]) ** 2), rel=1e-4)
    assert "its outputs are one number" in (folder / "README.md").read_text()


def test_a_student_teaches_the_next(make, tmp_path):
    """A student of one stage, which has the labels of the task, may teach the next; hard labels need no head in the first."""
    stages = {
        "assistant": {"students": {"assistant": {"num_layers": 2}}, "objective": ["label_cross_entropy"]},
        "last": {"teacher": {"student": "assistant"}, "students": ["vanilla"], "objective": ["label_kl"]},
    }
    students = {"vanilla": {"num_layers": 1}}
    first, last = resolve_stages(load_config(make(tmp_path / "run", tuned_on="", stages=stages, students=students)))
    assert first.teacher_features == frozenset() and last.teacher_features == {Feature("label_logits", 2)}
    assert last.teacher.labels == last.students[0].config.labels == ("entailment", "not_entailment")


def test_masked_text_of_a_task(make, tmp_path):
    """The words of the task's examples, with a teacher that predicts words."""
    changes = {"stages": {}, "objective": ["output_kl", "mlm_cross_entropy"], "students": {"vanilla": STUDENTS["vanilla"]}}
    done = jaxdistill.distill(make(tmp_path / "run", tuned_on="mlm", **changes, training__steps=1, training__epochs=None))
    assert (done.exports["vanilla"] / "mlm" / "model.safetensors").is_file()
    assert np.isfinite(records(done.output)[-1]["vanilla/held_out/mlm_cross_entropy"])


def test_inspect_and_what_a_run_says(make, tmp_path, cli):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make(tmp_path / "run")))
    code, out, err = cli("inspect", path)
    assert code == 0 and not (tmp_path / "run").exists(), err
    shown = " ".join(out.split())
    assert "head (M)" in shown and "label_cross_entropy" in shown and "classifier/output/kernel" in shown
    run = resolve_stages(load_config(path))[-1]
    from jaxdistill.distill import describe

    lines = list(describe(run, load_pretrained(run.teacher_folder)[1], goes_on=False))
    assert "task RTE: rows are its examples, held out is its split validation" in lines
    assert "  0.5 x label_cross_entropy: 2 labels (entailment, not_entailment) of the task" in lines


REFUSED = [
    ({"data__task": "rtee"}, "data.task.name: unknown task 'rtee'; did you mean 'rte'?"),
    ({"data__task": {"name": "rte", "data": "/no/such/folder"}}, "data.task.data: /no/such/folder is no folder"),
    ({"data__task": {"name": "rte", "data": "/no/such/folder"}, "training__epochs": None}, "data.task.data: /no/such/folder is no folder"),
    ({"data__sources": ["a.txt"]}, "data: give either sources (a text) or task (a task's examples), not both"),
    ({"data": {"sequence_length": 16}}, "data: give either sources (a text) or task (a task's examples)"),
    ({"data__packing": True}, "data: packing: a row of a task holds one example"),
    ({"data__held_out": 0.2}, "data: held_out: means nothing for a task"),
    ({"data__store": "tokens"}, "data: store: means nothing for a task"),
    ({"data__sequence_length": 65}, "data.sequence_length: 65 is over the 64 positions of the teacher"),
    ({"training__steps": 5}, "training: steps 5 and epochs 2 both say how long"),
    ({"tuned_on": ""}, "stages.prediction.objective.0: label_kl reads the teacher's logits of the labels, and this teacher has no classif"),
    ({"tuned_on": "mnli"}, "stages.prediction.objective.0: label_kl compares 2 labels (entailment, not_entailment), and the teacher has 3"),
    ({"task": "stsb"}, "stages.prediction.objective.0: label_kl compares probabilities, and the task of data.task is a regression; take"),
    ({"stages": {}, "objective": ["output_kl"]}, "objective.0: output_kl reads the teacher's logits, and this teacher has no MLM head"),
    ({"stages": {}, "objective": ["label_kl", "mlm_cross_entropy"]}, "objective: terms of a task's labels and of masked text in one"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(make, tmp_path, cli, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make(tmp_path / "run", **changes)))
    code, out, err = cli("distill", path)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"error: {message}" in err.replace(f"{path}: ", "")
    assert not (tmp_path / "run").exists()


def test_a_task_needs_no_store(make, tmp_path, cli):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make(tmp_path / "run")))
    code, _, err = cli("prepare", path)
    assert code == 2 and "data.task: a task is read when the run starts, there is nothing to prepare" in err
