"""Rubbish in configs, config.json, safetensors and their index: refused in one line, or read; never another exception.

JAXDISTILL_FUZZ=5000 runs that many examples of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rubbish import RUBBISH, WORDS, bytes_changed, mutated
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder

from jaxdistill.config import load_config, load_evaluation
from jaxdistill.errors import InputError
from jaxdistill.models import find_model, load_pretrained, num_parameters
from jaxdistill.models import load_config as load_model_config
from jaxdistill.output import check_output
from jaxdistill.resolve import resolve_stages

EXAMPLES = int(os.environ.get("JAXDISTILL_FUZZ", 40))
quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="JAXDISTILL_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.large_base_example,
        HealthCheck.data_too_large,
    ],
)


@contextlib.contextmanager
def only_clean_errors():
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error) and str(error)
        assert len(str(error)) < 3_000, str(error)[:500]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    backend = wordpiece()
    folder = write_folder(tmp_path_factory.mktemp("fuzz") / "teacher", backend, BERT_SPECIAL)
    write_model(folder, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=2), mlm=True)
    (folder.parent / "text.txt").write_text("\n\n".join(make_texts(5)))
    return folder


def whole_config(teacher: Path) -> dict:
    return {
        "teacher": str(teacher),
        "data": {"sources": [{"path": str(teacher.parent / "text.txt"), "weight": 1.0}], "sequence_length": 16, "held_out": 0.1},
        "students": {"small": {"num_layers": 1, "hidden_size": 24, "num_heads": 4, "optimizer": {"learning_rate": 1e-4}}},
        "objective": [
            {"kind": "relation_kl", "relation_heads": 6, "weight": {"schedule": "linear", "values": [1, 0], "steps": [0, 5]}},
            {"kind": "hidden_mse", "layer_map": {"strategy": "random", "every": 10}},
        ],
        "optimizer": {"learning_rate": 1e-3, "warmup": 0.1},
        "masking": {"rate": 0.2},
        "training": {"steps": 8, "batch_size": 8, "precision": "float32", "seed": 1},
        "stages": {"one": {"training": {"steps": 2}}, "two": {"students": ["sm*"], "objective": ["output_kl"]}},
        "mesh": {"data": -1, "fsdp": 1},
        "kernels": {"relations": "plain"},
        "grid": [{"a": {"embeddings": "pca"}, "b": {"shape": "3L"}}],
        "output": str(teacher.parent / "never"),
    }


def resolved(config) -> None:
    with only_clean_errors():
        config = load_config(config)
        for run in resolve_stages(config, num_devices=1):
            check_output(run.saved, overwrite=False)
            assert load_config(yaml.safe_load(run.saved.to_yaml())) == run.saved


@quick
@given(data=st.data())
def test_configs(teacher, no_network, data):
    whole = whole_config(teacher)
    if data.draw(st.booleans()):
        del whole["grid"], whole["stages"]
    config = data.draw(mutated(whole))
    resolved(config if isinstance(config, dict) else {"teacher": config})
    assert not (teacher.parent / "never").exists()


@quick
@given(data=st.data())
def test_yaml_text(teacher, no_network, tmp_path, data):
    file = tmp_path / "config.yaml"
    text = yaml.safe_dump(whole_config(teacher)).encode()
    file.write_bytes(
        data.draw(
            st.one_of(bytes_changed(text), st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
        )
    )
    resolved(file)


SECTIONS = ["training", "students", "students.small", "objective.0", "grid", "data.sources.0", "stages"]
FIELDS = st.builds("{}.{}={}".format, st.sampled_from(SECTIONS), WORDS, RUBBISH)


@quick
@given(overrides=st.lists(st.one_of(WORDS, st.builds("{}={}".format, WORDS, WORDS), FIELDS), min_size=1, max_size=3))
def test_overrides(teacher, no_network, overrides):
    with only_clean_errors():
        resolve_stages(load_config(whole_config(teacher), overrides), num_devices=1)
    with only_clean_errors():
        load_evaluation(overrides)


def test_aliases_that_would_grow_without_end():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    bomb = "\n".join(lines)
    for text, message in (
        (bomb, "aliases stand for more than"),
        ("a: &a [*a]", "an alias of what it stands in"),
        ("[" * 10**4, "too deep"),
    ):
        with pytest.raises(InputError, match=message):
            load_config({}, [f"data={text}"] if text.startswith("[") else [f"data={{{text.replace(chr(10), ', ')}}}"])
    with pytest.raises(InputError, match="are no config"):
        load_config({}, ["data=" + "x" * (2 << 20)])
    assert load_config(
        {}, ["data=&d {sources: [x]}", "teacher=&t x", "students={a: &s {num_layers: 1}, b: *s}", "output=x"]
    ).students.keys() == {"a", "b"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    write_model(folder, tiny_config(num_layers=1, vocab_size=20, max_position_embeddings=8, hidden_size=8, intermediate_size=8), mlm=True)
    return folder


def loaded(folder: Path, content: dict[str, bytes]) -> None:
    """Load a folder of these files, all of the way."""
    for name, written in content.items():
        (folder / name).write_bytes(written)
    with only_clean_errors():
        num_parameters(load_model_config(folder))
    with only_clean_errors():
        _, params = load_pretrained(folder)
        assert params["embeddings"]["word"]["embedding"].dtype == np.float32


@quick
@given(data=st.data())
@example(data=None)
def test_config_json(model, tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    values = json.loads((model / "config.json").read_text()) | {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "a", "1": "b"},
    }
    if data is None:
        for name in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "type_vocab_size"):
            for size in (10**12, 2**24, 10**5):
                loaded(tmp_path, {"config.json": json.dumps(values | {name: size, "num_attention_heads": 1}).encode()})
        return
    changed = data.draw(st.one_of(mutated(values), bytes_changed((model / "config.json").read_bytes())))
    loaded(tmp_path, {"config.json": changed if isinstance(changed, bytes) else json.dumps(changed).encode()})


DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "", "f32", "\0"])
SIZES = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30]))


@st.composite
def headers(draw, header: dict) -> dict:
    """A safetensors header with wrong types, shapes and places."""
    header = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(header)))
        kind = draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "rubbish"]))
        if kind == "name":
            header[draw(WORDS)] = header.pop(name)
        elif kind == "rubbish" or not isinstance(header[name], dict):
            header[name] = draw(RUBBISH)
        elif kind == "dtype":
            header[name]["dtype"] = draw(DTYPES)
        else:
            header[name][kind] = draw(st.lists(SIZES, max_size=4))
    return header


@quick
@given(data=st.data())
def test_safetensors(model, tmp_path, data):
    whole = (model / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    kind = data.draw(st.sampled_from(["header", "bytes", "length", "text"]))
    if kind == "bytes":
        content = data.draw(bytes_changed(whole))
    elif kind == "length":
        content = (
            struct.pack("<Q", data.draw(st.one_of(st.integers(0, 2 * size), st.sampled_from([2**63, 2**64 - 1, 10**8, 10**9])))) + whole[8:]
        )
    else:
        header = data.draw(headers(json.loads(whole[8 : 8 + size])) if kind == "header" else mutated(json.loads(whole[8 : 8 + size])))
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + whole[8 + size :]
    loaded(tmp_path, {"config.json": (model / "config.json").read_bytes(), "model.safetensors": content})


@quick
@given(data=st.data())
def test_index(model, tmp_path, data):
    weights = {"weight_map": {"a": "model.safetensors", "b": "model-1.safetensors"}, "metadata": {"total_size": 1}}
    names = st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "model.safetensors", "model-1.safetensors", "..", "", "a\0b", "sub/model.safetensors"]
    )
    index = data.draw(st.one_of(mutated(weights), st.builds(lambda name: {"weight_map": {"a": name}}, names)))
    files = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    loaded(tmp_path, files | {"model.safetensors.index.json": json.dumps(index).encode()})


@quick
@given(name=st.one_of(WORDS, st.text(max_size=40), st.builds("{}/{}@{}".format, WORDS, WORDS, WORDS)))
def test_names_of_models(no_network, name):
    with only_clean_errors():
        assert find_model(name).is_dir()
