"""evaluate and finetune as commands: what they write, what they do not do twice, what they refuse."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from task_folders import task_columns, write_split, write_task
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, wordpiece, write_folder

from jaxdistill.config import load_evaluation
from jaxdistill.evaluate import evaluate
from jaxdistill.finetune import Trainer
from jaxdistill.models import load_pretrained
from jaxdistill.results import read_result

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.long]
QUICK = ("protocol.epochs=1", "protocol.batch_sizes=12", "protocol.max_length=32")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    backend = wordpiece()
    folder = write_folder(tmp_path_factory.mktemp("models") / "tiny", backend, BERT_SPECIAL)
    write_model(folder, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=1, max_position_embeddings=64), pooler=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for name in ("rte", "stsb"):
        write_task(folder, name)
    write_split(folder / "qnli", "validation", task_columns("qnli", 6))
    write_split(folder / "snli", "train", task_columns("snli", 24))
    write_split(folder / "snli", "validation", task_columns("snli", 8))
    for language in ("en", "sw"):
        write_split(folder / "xnli" / language, "test", task_columns("xnli", 6))
    return folder


def config(model, data, results, *more):
    return load_evaluation([str(model), f"data={data}", f"results={results}", *QUICK, *more])


def scores(results: Path, name: str = "tiny") -> dict:
    return read_result(results / f"{name}.json")["scores"]


def test_scores_of_several_tasks_and_seeds(model, data, tmp_path, capsys):
    (file,) = evaluate(config(model, data, tmp_path, "tasks=rte,qnli,snli", "protocol.seeds=[0,1]"))
    found = json.loads(file.read_text())
    assert found["name"] == "tiny" and found["model"]["num_layers"] == 1 and found["scores"]["protocol"]["name"] == "udagawa2023"
    tasks = found["scores"]["tasks"]
    assert sorted(tasks) == ["rte", "snli"]
    assert [run["seed"] for run in tasks["rte"]["runs"]] == [0, 1] and tasks["rte"]["examples"]["train"] == 24
    assert sorted(tasks["snli"]["runs"][0]["scores"]) == ["en", "sw", "validation"]
    assert "no split 'train' of qnli" in found["scores"]["missing"]["qnli"]
    assert any("not scored on ar, bg" in note for note in tasks["snli"]["notes"])
    out = capsys.readouterr().out
    assert "missing: qnli" in out and "RTE accuracy" in out and "SNLI sw accuracy" in out and "±" in out


def counted(monkeypatch) -> list[tuple]:
    done = []
    train = Trainer.train

    def counting(self, cells, *arguments):
        done.append((self.data.task.name, *(cell.seed for cell in cells)))
        if len(done) == counting.stop:
            raise KeyboardInterrupt
        return train(self, cells, *arguments)

    counting.stop = 0
    monkeypatch.setattr(Trainer, "train", counting)
    done_at = lambda n: setattr(counting, "stop", n)  # noqa: E731
    return done, done_at


def test_what_is_done_is_not_done_again(model, data, tmp_path, monkeypatch):
    done, stop_at = counted(monkeypatch)
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(model, data, tmp_path, "tasks=rte,stsb", "protocol.seeds=[0,1]"))
    assert done == [("rte", 0), ("rte", 1)] and len(scores(tmp_path)["tasks"]["rte"]["runs"]) == 1
    before = scores(tmp_path)["tasks"]["rte"]["runs"][0]
    stop_at(0)
    done.clear()
    evaluate(config(model, data, tmp_path, "tasks=rte,stsb", "protocol.seeds=[0,1]"))
    assert done == [("rte", 1), ("stsb", 0), ("stsb", 1)]
    assert scores(tmp_path)["tasks"]["rte"]["runs"][0] == before
    done.clear()
    evaluate(config(model, data, tmp_path, "tasks=rte,stsb", "protocol.seeds=[0,1,2]"))  # a further seed is only added
    assert done == [("rte", 2), ("stsb", 2)] and scores(tmp_path)["protocol"]["seeds"] == [0, 1, 2]
    done.clear()
    evaluate(config(model, data, tmp_path, "tasks=rte", "protocol.seeds=[0]"), overwrite=True)
    assert done == [("rte", 0)] and [run["seed"] for run in scores(tmp_path)["tasks"]["rte"]["runs"]] == [0]


def test_a_grid_keeps_every_run_at_its_best_epoch(model, data, tmp_path, monkeypatch):
    values = iter([0.5, 0.9, 0.7, 0.2, 0.1, 0.3])
    monkeypatch.setattr(Trainer, "scores", lambda self, params, split, together=False: [{"accuracy": next(values)}])
    more = ("protocol=wang2023", "protocol.learning_rates=[1e-5,3e-5]", "protocol.epochs=3", "protocol.train_limit=10")
    evaluate(config(model, data, tmp_path, "tasks=rte", *more))
    entry = scores(tmp_path)["tasks"]["rte"]
    assert [(run["learning_rate"], run["epoch"], run["scores"]["validation"]["accuracy"]) for run in entry["runs"]] == [
        (1e-5, 2, 0.9),
        (3e-5, 3, 0.3),
    ]
    assert entry["examples"] == {"train": 10, "train_available": 24, "validation": 14}


def test_seeds_together_give_the_scores_of_seeds_alone(model, data, tmp_path):
    found = []
    for how in ("true", "false"):
        evaluate(config(model, data, tmp_path / how, "tasks=stsb", "protocol.seeds=[0,1]", f"seeds_together={how}"))
        found.append([run["scores"]["validation"]["pearson"] for run in scores(tmp_path / how)["tasks"]["stsb"]["runs"]])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-3)
    assert found[0][0] != found[0][1]


def test_seeds_that_do_not_fit_together_run_one_after_the_other(model, data, tmp_path, monkeypatch, capsys):
    train, tried = Trainer.train, []

    def too_large(self, cells, *arguments):
        tried.append([cell.seed for cell in cells])
        if len(cells) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return train(self, cells, *arguments)

    monkeypatch.setattr(Trainer, "train", too_large)
    evaluate(config(model, data, tmp_path, "tasks=stsb", "protocol.seeds=[0,1]", "seeds_together=true"))
    assert tried == [[0, 1], [0], [1]] and len(scores(tmp_path)["tasks"]["stsb"]["runs"]) == 2
    assert "2 seeds together do not fit" in capsys.readouterr().err


def test_a_diverging_setting_is_said_and_the_others_go_on(model, data, tmp_path, capsys):
    words = ("tasks=stsb", "protocol.learning_rates=[1e30,1e-5]", "protocol.seeds=[0,1]", "protocol.epochs=2")
    evaluate(config(model, data, tmp_path, *words))
    entry = scores(tmp_path)["tasks"]["stsb"]
    assert [run.get("diverged", False) for run in entry["runs"]] == [True, True, False, False]
    captured = capsys.readouterr()
    assert "diverged at learning rate 1e+30, seed 1" in captured.err and "±" in captured.out
    evaluate(config(model, data, tmp_path, *words))
    assert "STS-B is done already" in capsys.readouterr().out


def test_other_data_are_not_mixed(model, data, tmp_path, cli):
    evaluate(config(model, data, tmp_path, "tasks=stsb", "protocol.seeds=0"))
    write_task(tmp_path / "other", "stsb", test=15)
    words = ["tasks=stsb", f"data={tmp_path / 'other'}", f"results={tmp_path}", *QUICK, "protocol.seeds=1"]
    refused(cli, "data: validation of stsb is not what the scores", "evaluate", model, *words)
    refused(cli, "protocol.precision:", "evaluate", model, "precision=bfloat16", *words)


def test_a_language_that_comes_later_is_scored(model, data, tmp_path, monkeypatch):
    done, _ = counted(monkeypatch)
    words = ("tasks=snli", "protocol.seeds=0")
    shutil.copytree(data, tmp_path / "data")
    evaluate(config(model, tmp_path / "data", tmp_path, *words))
    write_split(tmp_path / "data" / "xnli" / "ur", "test", task_columns("xnli", 5))
    evaluate(config(model, tmp_path / "data", tmp_path, *words))
    (run,) = scores(tmp_path)["tasks"]["snli"]["runs"]
    assert len(done) == 2 and sorted(run["scores"]) == ["en", "sw", "ur", "validation"]


def test_overwrite_replaces_what_is_named_and_what_is_of_other_weights(model, data, tmp_path):
    evaluate(config(model, data, tmp_path, "tasks=rte,stsb", "protocol.seeds=0"))
    before = scores(tmp_path)["tasks"]
    evaluate(config(model, data, tmp_path, "tasks=rte", "protocol.seeds=1"), overwrite=True)
    after = scores(tmp_path)["tasks"]
    assert after["stsb"] == before["stsb"] and [run["seed"] for run in after["rte"]["runs"]] == [1]
    other = write_folder(tmp_path / "other", wordpiece(), BERT_SPECIAL)
    write_model(other, tiny_config(vocab_size=wordpiece().get_vocab_size(), num_layers=1, max_position_embeddings=64), seed=5)
    evaluate(config(f"tiny={other}", data, tmp_path, "tasks=stsb", "protocol.seeds=0"), overwrite=True)
    assert list(scores(tmp_path)["tasks"]) == ["stsb"]


def test_two_commands_at_once_keep_what_the_other_found(model, data, tmp_path, monkeypatch):
    """The second one runs in the middle of the first."""
    train, inner = Trainer.train, []

    def nested(self, cells, *arguments):
        if self.data.task.name == "stsb" and not inner:
            inner.append(True)
            evaluate(config(model, data, tmp_path, "tasks=rte", "protocol.seeds=0"))
        return train(self, cells, *arguments)

    monkeypatch.setattr(Trainer, "train", nested)
    evaluate(config(model, data, tmp_path, "tasks=stsb", "protocol.seeds=0"))
    assert sorted(scores(tmp_path)["tasks"]) == ["rte", "stsb"]


@pytest.fixture(scope="module")
def tuned(model, data, tmp_path_factory) -> Path:
    from jaxdistill.finetune import finetune

    output = tmp_path_factory.mktemp("tuned") / "rte"
    return finetune(config(model, data, "unused", "tasks=rte", f"output={output}", "protocol.learning_rates=[1e-3]"))


def test_the_folder_of_a_fine_tuned_model(tuned, model, data, tmp_path):
    shape, params = load_pretrained(tuned)
    assert shape.labels == ("entailment", "not_entailment") and "classifier" in params
    before = load_pretrained(model)[1]
    assert np.abs(params["layers"]["01"]["query"]["kernel"] - before["layers"]["01"]["query"]["kernel"]).max() > 1e-4
    assert "0 entailment, 1 not_entailment" in (tuned / "README.md").read_text()
    evaluate(config(f"tuned={tuned}", data, tmp_path, "tasks=rte", "train=false"))
    evaluate(config(f"tuned={tuned}", data, tmp_path, "tasks=rte", "train=false"))  # done already
    run = scores(tmp_path, "tuned")["tasks"]["rte"]["runs"]
    assert len(run) == 1 and run[0]["seed"] is None
    assert f"validation accuracy | {100 * run[0]['scores']['validation']['accuracy']:.1f} |" in (tuned / "README.md").read_text()


@pytest.mark.torch
def test_pytorch_predicts_the_same(tuned, data):
    import torch
    import transformers

    from jaxdistill.data import load_tokenizer
    from jaxdistill.finetune import Settings
    from jaxdistill.finetune.step import predict_one
    from jaxdistill.tasks import TASKS, encode_rows, packed_batch, read_split

    torch.set_num_threads(1)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tuned, output_loading_info=True)
    assert not any(info.values()), info
    rows = read_split(TASKS["rte"], TASKS["rte"].tests["validation"], str(data))
    tokens = encode_rows(rows, load_tokenizer(tuned), "bert", 64)
    shape, params = load_pretrained(tuned)
    batch = packed_batch(tokens, np.arange(len(tokens)), length=64, num_examples=len(tokens), row_step=1)
    ours = predict_one(Settings.create(shape, "float32", load_evaluation([]).protocol), params, batch)
    for i, (ids, types) in enumerate(zip(tokens.ids, tokens.types, strict=True)):
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor(ids)[None], token_type_ids=torch.tensor(types)[None]).logits[0]
        np.testing.assert_allclose(ours[i], logits, rtol=0, atol=1e-5)
    assert theirs.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_a_head_is_read_by_the_names_of_its_labels(tuned, data, tmp_path, cli):
    values = json.loads((tuned / "config.json").read_text())
    for name, labels in (("turned", ("not_entailment", "entailment")), ("numbered", ("LABEL_0", "LABEL_1")), ("other", ("bad", "good"))):
        shutil.copytree(tuned, tmp_path / name)
        names = {"id2label": {str(i): label for i, label in enumerate(labels)}, "label2id": {label: i for i, label in enumerate(labels)}}
        (tmp_path / name / "config.json").write_text(json.dumps(values | names))
    words = ("tasks=rte", "train=false", *QUICK)
    evaluate(load_evaluation([*(str(tmp_path / n) for n in ("turned", "numbered")), f"data={data}", f"results={tmp_path}", *words]))
    turned, numbered = (scores(tmp_path, n)["tasks"]["rte"]["runs"][0]["scores"]["validation"]["accuracy"] for n in ("turned", "numbered"))
    assert turned == pytest.approx(1 - numbered)
    refused(cli, "has a head for bad, good, rte needs entailment", "evaluate", tmp_path / "other", f"data={data}", *words)


def refused(cli, message: str, *words):
    code, out, err = cli(*words)
    assert code == 2 and err.count("\n") == 1 and message in err, (code, out, err)


@pytest.mark.parametrize(("words", "message"), [
    (["tasks=rtee"], "unknown task 'rtee'; did you mean 'rte'?"),
    (["tasks=qnli"], "no split 'train' of qnli"),
    (["tasks=rte", "data=nowhere"], "data: nowhere is no folder"),
    (["tasks=rte", "protocol=udagawa"], "unknown protocol 'udagawa'; did you mean 'udagawa2023'?"),
    (["tasks=rte", "protocol.epoch=1"], "protocol.epoch: unknown field; did you mean 'epochs'?"),
    (["tasks=rte", "protocol.max_length=100"], "protocol.max_length: 100 is over the 64 positions"),
    (["tasks=rte", "train=false"], "has no classification head, rte needs entailment, not_entailment"),
    (["tasks=rte", "protocol.seeds=[3000000000]"], "protocol.seeds.0: Input should be less than"),
    (["tasks=rte", "protocol={name: wang}"], "unknown protocol 'wang'"),
    (["tasks=rte", "output=here"], "output: is where finetune writes"),
    (["task=rte"], "task=rte: neither a field nor NAME=PATH of a model; did you mean 'tasks'?"),
])  # fmt: skip
def test_bad_input_of_evaluate(words, message, cli, model, data, tmp_path):
    refused(cli, message, "evaluate", model, f"data={data}", f"results={tmp_path}", *QUICK, *words)
    assert not list(tmp_path.iterdir())


def test_bad_tasks(cli, model, tmp_path):
    columns = task_columns("rte", 4)
    cases = {
        "no column 'sentence1'": {"sentence2": columns["sentence2"], "label": columns["label"]},
        "has label 7": columns | {"label": [0, 1, 7, 1]},
        "no row in split 'train'": {name: values[:0] for name, values in columns.items()},
    }
    for i, (message, broken) in enumerate(cases.items()):
        write_split(tmp_path / str(i) / "rte", "train", broken)
        write_split(tmp_path / str(i) / "rte", "validation", columns)
        refused(cli, message, "evaluate", model, "tasks=rte", f"data={tmp_path / str(i)}", f"results={tmp_path / 'results'}", *QUICK)
    assert not (tmp_path / "results").exists()


def test_bad_models(cli, model, data, tmp_path):
    words = ["tasks=rte", f"data={data}", f"results={tmp_path / 'results'}", *QUICK]
    refused(cli, "models: which?", "evaluate", *words)
    refused(cli, "no such model folder", "evaluate", tmp_path / "nowhere", *words)
    shutil.copytree(model, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    refused(cli, "no tokenizer files there", "evaluate", tmp_path / "bare", *words)
    refused(cli, "there is a model 'tiny' already", "evaluate", model, f"tiny={model}", *words)
    shutil.copytree(model, tmp_path / "a b")
    shutil.copytree(model, tmp_path / "a_b")
    refused(cli, "its results would lie in a_b.json as those of a b", "evaluate", tmp_path / "a b", tmp_path / "a_b", *words)
    assert not (tmp_path / "results").exists()


def test_other_results_are_not_mixed(cli, model, data, tmp_path):
    words = [f"data={data}", f"results={tmp_path}", *QUICK]
    evaluate(load_evaluation([str(model), "tasks=stsb", "protocol.seeds=[0]", *words]))
    before = (tmp_path / "tiny.json").read_bytes()
    refused(cli, "protocol.epochs:", "evaluate", model, "tasks=stsb", *words, "protocol.epochs=2")
    other = write_folder(tmp_path / "other", wordpiece(), BERT_SPECIAL)
    write_model(other, tiny_config(vocab_size=wordpiece().get_vocab_size(), num_layers=1, max_position_embeddings=64), seed=5)
    refused(cli, "results of a model with other weights", "evaluate", f"tiny={other}", "tasks=stsb", *words)
    (tmp_path / "tiny.json").write_text("{")
    refused(cli, "cannot be read as results", "evaluate", model, "tasks=stsb", *words)
    (tmp_path / "tiny.json").write_bytes(before)


@pytest.mark.parametrize(("words", "message"), [
    (["tasks=rte"], "output: which folder"),
    (["tasks=rte,stsb", "output={new}"], "one model for one task, got 2"),
    (["output={new}"], "one model for one task, got 9"),
    (["tasks=rte", "output={there}"], "exists; give another folder, or --overwrite"),
    (["tasks=rte", "output={there}", "--overwrite"], "exists and is not a model folder"),
    (["tasks=rte", "train=false", "output={new}"], "train: finetune trains"),
    (["tasks=qnli", "output={new}"], "no split 'train' of qnli"),
])  # fmt: skip
def test_bad_input_of_finetune(words, message, cli, model, data, tmp_path):
    (tmp_path / "there").mkdir()
    places = {"new": tmp_path / "new", "there": tmp_path / "there"}
    refused(cli, message, "finetune", model, f"data={data}", *QUICK, *(word.format(**places) for word in words))
    assert not (tmp_path / "new").exists() and not list((tmp_path / "there").iterdir())


def test_a_model_is_not_fine_tuned_over_itself(cli, model, data):
    before = (model / "model.safetensors").read_bytes()
    words = [f"data={data}", *QUICK, "tasks=rte", f"output={model}", "--overwrite"]
    refused(cli, "is the model that is fine-tuned", "finetune", model, *words)
    assert (model / "model.safetensors").read_bytes() == before
