"""Rows of a task: every layout that is promised, and one clear line for what is wrong."""

import numpy as np
import pytest
from task_folders import task_columns, write_lines, write_split, write_task

from jaxdistill.errors import InputError
from jaxdistill.tasks import GLUE, TASKS, MissingSplit, find_tasks, read_split


def read(data, name="rte", split="validation"):
    return read_split(TASKS[name], TASKS[name].tests[split], str(data))


def refused(message, *arguments, error=InputError):
    with pytest.raises(error, match=message) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["rte", "glue/rte"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_layouts(place, kind, tmp_path):
    columns = task_columns("rte", 5)
    if kind == "parquet":
        write_split(tmp_path / place, "validation", columns)
    else:
        write_lines(tmp_path / place / "validation.jsonl", columns)
    rows = read(tmp_path)
    assert rows.texts == (columns["sentence1"], columns["sentence2"])
    assert rows.labels.dtype == np.int32 and rows.labels.tolist() == columns["label"] and len(rows) == 5


@pytest.mark.parametrize("data", ["snli", "."])
def test_a_dataset_without_configurations(data, tmp_path):
    write_split(tmp_path / "snli", "validation", task_columns("snli", 4))
    assert len(read(tmp_path / data, "snli")) == 4


def test_several_files_make_one_split(tmp_path):
    for i in range(3):
        write_lines(tmp_path / "rte" / f"validation-0000{i}-of-00003.jsonl", task_columns("rte", 4, i))
    assert read(tmp_path).labels.tolist() == [label for i in range(3) for label in task_columns("rte", 4, i)["label"]]


def test_of_two_forms_one_is_read(tmp_path):
    write_split(tmp_path / "rte", "validation", task_columns("rte", 4))
    write_lines(tmp_path / "rte" / "validation.jsonl", task_columns("rte", 4))
    assert len(read(tmp_path)) == 4


def test_files_of_one_split_have_the_same_columns(tmp_path):
    write_lines(tmp_path / "rte" / "validation-0.jsonl", task_columns("rte", 3))
    write_lines(tmp_path / "rte" / "validation-1.jsonl", {name: v for name, v in task_columns("rte", 3).items() if name != "label"})
    refused(r"validation-1\.jsonl: columns sentence1, sentence2, and validation-0\.jsonl has sentence1, sentence2, label", tmp_path)


def test_regression_and_mnli(tmp_path):
    write_task(tmp_path, "stsb")
    write_task(tmp_path, "mnli")
    assert read(tmp_path, "stsb").labels.dtype == np.float32
    assert list(TASKS["mnli"].tests) == ["validation_matched", "validation_mismatched"]
    one, other = (read(tmp_path, "mnli", split).texts[0][0] for split in TASKS["mnli"].tests)
    assert one != other


def test_rows_without_a_gold_label_are_left_out_and_counted(tmp_path):
    columns = task_columns("snli", 6)
    columns["label"][1] = columns["label"][4] = -1
    write_split(tmp_path / "snli", "validation", columns)
    rows = read(tmp_path, "snli")
    assert (len(rows), rows.unlabelled) == (4, 2)
    assert rows.texts[0] == [text for i, text in enumerate(columns["premise"]) if i not in (1, 4)]


def test_missing(tmp_path):
    write_split(tmp_path / "rte", "train", task_columns("rte", 4))
    refused(r"no split 'validation' of rte \(glue/rte/validation-\*\.parquet", tmp_path, error=MissingSplit)
    refused("no folder; give one in the layout of nyu-mll/glue", tmp_path / "nowhere")


def test_columns(tmp_path):
    columns = task_columns("rte", 4)
    columns["text"] = columns.pop("sentence2")
    write_split(tmp_path / "rte", "validation", columns)
    refused(r"no column 'sentence2' for rte, which has sentence1, sentence2, label; found sentence1, label, text", tmp_path)


@pytest.mark.parametrize(("name", "label", "message"), [
    ("rte", 2, r"row 3 has label 2; rte has 0 entailment, 1 not_entailment"),
    ("rte", -2, "row 3 has label -2"),
    ("stsb", 5.5, r"row 3 has label 5\.5; stsb has numbers from 0 to 5"),
    ("stsb", float("nan"), "row 3 has label nan"),
])  # fmt: skip
def test_label_outside_of_the_range(name, label, message, tmp_path):
    columns = task_columns(name, 6)
    columns["label"][3] = label
    write_split(tmp_path / name, "validation", columns)
    refused(message, tmp_path, name)


@pytest.mark.parametrize("label", ["yes", 1.0, None, True])
def test_labels_of_another_kind(label, tmp_path):
    columns = task_columns("rte", 4)
    write_lines(tmp_path / "rte" / "validation.jsonl", columns | {"label": [0, 1, label, 1]})
    refused("row 2 has label", tmp_path)


def test_text_that_is_none(tmp_path):
    columns = task_columns("rte", 4)
    columns["sentence1"][2] = None
    write_split(tmp_path / "rte", "validation", columns)
    refused("row 2 of 'sentence1' holds NoneType, not text", tmp_path)


def test_empty_and_hidden_splits(tmp_path):
    write_split(tmp_path / "rte", "validation", {name: values[:0] for name, values in task_columns("rte", 2).items()})
    refused("no row in split 'validation' of rte", tmp_path)
    write_split(tmp_path / "rte", "validation", task_columns("rte", 4) | {"label": [-1] * 4})
    refused(r"no labelled row \(all are -1", tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "validation.jsonl").write_text('{"sentence1": "a"}\n{"other": 1}\n')
    refused(r"validation\.jsonl:2: not a JSON object with the fields of the first line", tmp_path)
    (tmp_path / "rte" / "validation-0.parquet").write_text("no parquet")
    refused("cannot be read as parquet", tmp_path)


def test_the_hub_out_of_reach(no_network):
    with pytest.raises(InputError, match=r"nyu-mll/glue/rte/train: the dataset of the Hub cannot be read: .*or give a folder"):
        read_split(TASKS["rte"], TASKS["rte"].train, None)


def test_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_dict(task_columns("snli", 3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_split(TASKS["snli"], TASKS["snli"].train, None)) == 3
    assert len(read_split(TASKS["snli"], TASKS["snli"].tests["sw"], None)) == 3
    assert asked == [("stanfordnlp/snli", None, "train"), ("facebook/xnli", "sw", "test")]


def test_names():
    assert [task.name for task in find_tasks(("glue",))] == list(GLUE) and len(GLUE) == 9
    assert [task.name for task in find_tasks(("rte", "glue"))][:2] == ["rte", "cola"]
    with pytest.raises(InputError, match=r"tasks\.1: unknown task 'rtee'; did you mean 'rte'\?"):
        find_tasks(("cola", "rtee"))
