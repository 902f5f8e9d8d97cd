"""A task's rows as a run reads them: padding, labels, splits, limits, and the hash that tells two of them apart."""

import dataclasses
import json
import math

import numpy as np
import pytest
from task_folders import task_columns, write_split, write_task
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, ROBERTA_SPECIAL, byte_level_bpe, wordpiece, write_folder

from jaxdistill.config import TaskConfig, load_config
from jaxdistill.data import RowSource, load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.resolve import resolve_stages
from jaxdistill.tasks import TASKS, TaskTokens, encode_rows, find_task, num_training_rows, open_task, read_split

LENGTH = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    for task in ("rte", "sst2", "stsb"):
        write_task(folder, task, train=30, test=7, longest=14)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = {"bert": (wordpiece, BERT_SPECIAL), "roberta": (byte_level_bpe, ROBERTA_SPECIAL)}
    return {family: load_tokenizer(write_folder(folder / family, make(), special)) for family, (make, special) in kinds.items()}


def open_one(data, tokenizers, family="bert", **fields):
    return open_task(
        TaskConfig(**{"name": "rte", "data": data} | fields), tokenizer=tokenizers[family], family=family, sequence_length=LENGTH
    )


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", ["rte", "sst2", "stsb"])
def test_rows_are_the_examples_padded_on_the_right(data, tokenizers, family, name):
    store, task = open_one(data, tokenizers, family, name=name), TASKS[name]
    assert isinstance(store, RowSource)
    assert (store.num_rows("train"), store.num_rows("held_out"), store.source_rows("train")) == (30, 7, (30,))
    for split, there in (("train", task.train), ("held_out", task.tests["validation"])):
        rows = encode_rows(read_split(task, there, data), tokenizers[family], family, LENGTH)
        numbers = np.array([5, 0, 5, 6])
        batch = store.read_batch(split, numbers)
        assert {field: (array.shape, array.dtype) for field, array in batch.items()} == {
            **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask", "segment_ids"), ((4, LENGTH), np.int32)),
            "labels": ((4,), np.float32 if name == "stsb" else np.int32),
        }  # fmt: skip
        for i, number in enumerate(numbers):
            size = len(rows.ids[number])
            assert batch["input_ids"][i].tolist() == rows.ids[number].tolist() + [tokenizers[family].pad_id] * (LENGTH - size)
            assert batch["token_type_ids"][i].tolist() == rows.types[number].tolist() + [0] * (LENGTH - size)
            assert batch["segment_ids"][i].tolist() == batch["attention_mask"][i].tolist() == [1] * size + [0] * (LENGTH - size)
            assert batch["labels"][i] == rows.labels[number]
        assert (batch["token_type_ids"].max() == 1) == (family == "bert" and name != "sst2")
    for number in (-1, 7):
        with pytest.raises(IndexError, match="of held_out go from 0 to 6"):
            store.read_batch("held_out", np.array([0, number]))


def test_a_limit_takes_the_rows_that_evaluate_takes(data, tokenizers):
    whole, some = open_one(data, tokenizers), open_one(data, tokenizers, train_limit=4)
    assert (some.num_rows("train"), some.num_rows("held_out")) == (4, 7)
    sample = read_split(TASKS["rte"], TASKS["rte"].train, data).sample(4)
    rows = encode_rows(sample, tokenizers["bert"], "bert", LENGTH)
    found = some.read_batch("train", np.arange(4))
    assert found["labels"].tolist() == sample.labels.tolist()
    assert [ids[mask > 0].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)] == [
        ids.tolist() for ids in rows.ids
    ]
    assert open_one(data, tokenizers, train_limit=99).fingerprint == whole.fingerprint
    assert [num_training_rows(TaskConfig(name="rte", data=data, train_limit=limit)) for limit in (None, 4, 99)] == [30, 4, 30]


def test_the_fingerprint_is_of_everything_that_batches_depend_on(data, tokenizers, tmp_path):
    store = open_one(data, tokenizers)
    assert open_one(data, tokenizers).fingerprint == store.fingerprint
    splits = store._splits

    def changed(split="train", length=LENGTH, pad_id=0, **arrays) -> str:
        return type(store)(
            splits | {split: dataclasses.replace(splits[split], **arrays)}, pad_id=pad_id, sequence_length=length
        ).fingerprint

    train = splits["train"]
    assert changed() == store.fingerprint
    other = [x.copy() for x in train.ids]
    other[3][1] += 1
    moved = [np.concatenate(train.ids[:2])[:5], np.concatenate(train.ids[:2])[5:], *train.ids[2:]]  # the same numbers, cut elsewhere
    found = {
        changed(ids=other), changed(ids=moved), changed(labels=train.labels[::-1]), changed(labels=train.labels.astype(np.float32)),
        changed(types=[1 - x for x in train.types]), changed("held_out", labels=1 - splits["held_out"].labels), changed(length=LENGTH + 1),
        changed(pad_id=1), store.fingerprint,
    }  # fmt: skip
    assert len(found) == 9


def test_what_cannot_be_read(data, tokenizers, tmp_path):
    for fields, message in (
        ({"name": "rtee"}, r"^data\.task\.name: unknown task 'rtee'; did you mean 'rte'\?"),
        ({"name": "glue"}, r"^data\.task\.name: unknown task 'glue'"),  # a suite is not one task
        ({"data": str(tmp_path / "none")}, r"^data\.task\.data: .*none is no folder"),
        ({"data": str(tmp_path)}, r"^data\.task\.data: .*no split 'train' of rte"),
    ):
        with pytest.raises(InputError, match=message):
            open_one(**{"data": data, "tokenizers": tokenizers} | fields)
    write_split(tmp_path / "rte", "train", task_columns("rte", 3))
    with pytest.raises(InputError, match=r"^data\.task\.data: .*no split 'validation' of rte"):
        open_one(str(tmp_path), tokenizers)
    assert num_training_rows(TaskConfig(name="rte", data=str(tmp_path))) == 3


def test_names_of_outputs():
    assert (find_task("sst2").outputs, find_task("stsb").outputs) == (("negative", "positive"), ("score",))
    assert TaskTokens.__dataclass_fields__.keys() == {"ids", "types", "labels"}  # all that the fingerprint has to cover


@pytest.fixture(scope="module")
def fields(data, tmp_path_factory) -> dict:
    backend = wordpiece()
    folder = write_folder(tmp_path_factory.mktemp("teacher") / "rte", backend, BERT_SPECIAL)
    write_model(folder, tiny_config(vocab_size=backend.get_vocab_size(), labels=TASKS["rte"].labels))
    return {
        "teacher": str(folder), "data": {"task": {"name": "rte", "data": data}, "sequence_length": LENGTH}, "output": "never-written",
        "students": {"small": {"num_layers": 2}}, "objective": [{"kind": "label_kl"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("training", "stages", "expected"),
    [
        ({"epochs": 3, "batch_size": 8}, {}, [math.ceil(90 / 8)]),
        ({"epochs": 0.5, "batch_size": 8}, {}, [2]),
        ({"epochs": 0.01, "batch_size": 8}, {}, [1]),
        ({"steps": 7}, {}, [7]),
        ({}, {}, [10_000]),
        ({"epochs": 2, "batch_size": 8}, {"a": {}, "b": {"training": {"epochs": 1}}, "c": {"training": {"steps": 5}}}, [8, 4, 5]),
        ({"epochs": 2, "batch_size": 8}, {"a": {"training": {"batch_size": 16}}, "b": {"training": {"log_every": 3}}}, [4, 8]),
        ({"steps": 9, "batch_size": 8}, {"a": {"training": {"epochs": 2, "batch_size": 16}}, "b": {}}, [4, 9]),
    ],
)
def test_epochs_become_steps(fields, training, stages, expected):
    """As many steps as see every row so often, rounded up, by the batch size of the stage; the saved config has steps alone."""
    runs = resolve_stages(load_config(fields, training=training, stages=stages), num_devices=1)
    assert [run.config.training.steps for run in runs] == expected
    assert "epochs" not in runs[-1].saved.to_yaml()
    again = resolve_stages(load_config(json.loads(json.dumps(runs[-1].saved.model_dump(mode="json", exclude_none=True)))), num_devices=1)
    assert [run.config.training.steps for run in again] == expected


def test_epochs_of_a_text(fields):
    for place, changes in (
        ("training", {"training": {"epochs": 1}}),
        (r"stages\.b\.training", {"stages": {"a": {}, "b": {"training": {"epochs": 1}}}}),
    ):
        text = {key: value for key, value in fields.items() if key != "objective"} | {"data": {"sources": ["a.txt"]}}
        with pytest.raises(
            InputError, match=rf"^{place}\.epochs: only a task's rows can be counted beforehand; give steps, or data\.task$"
        ):
            resolve_stages(load_config(text | changes), num_devices=1)
