"""What SECURITY.md promises, read off the code and tried: nothing that is read can run, no place outside is written."""

from __future__ import annotations

import ast
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, wordpiece, write_folder

from jaxdistill.config import load_config
from jaxdistill.data import load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.export import export_student
from jaxdistill.models import load_pretrained
from jaxdistill.redaction import redacted

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("jaxdistill", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile", "zipfile", "code", "pty"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    "os.system", "os.popen", "torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", 
    "shutil.unpack_archive", "subprocess.getoutput", "subprocess.getstatusoutput", "ctypes.pythonapi",
}  # fmt: skip


def offences(source: str, path: str = "x.py") -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{where} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        found += [f"{where} imports {name}" for name in names if name == "subprocess" and path.startswith("jaxdistill")]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in FORBIDDEN_CALLS | FORBIDDEN_METHODS:
            found.append(f"{where} calls {called}")
        if called == "yaml.load" and not (len(node.args) == 2 and ast.unparse(node.args[1]) == "_Loader"):
            found.append(f"{where} reads YAML by another loader")
        for option, allowed in {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}.items():
            if option in options and not (isinstance(options[option], ast.Constant) and options[option].value is allowed):
                found.append(f"{where} says {option}={ast.unparse(options[option])}")
        if called.endswith("from_pretrained") and path.startswith("jaxdistill") and "trust_remote_code" not in options:
            found.append(f"{where} leaves trust_remote_code to transformers")
    return found


def test_nothing_that_is_read_can_run():
    assert len(CODE) > 100
    assert [one for path in CODE for one in offences(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from marshal import loads", "eval(x)", "np.load(f, allow_pickle=True)", "os.system(x)",
     "subprocess.run(x, shell=True)", "yaml.load(f, yaml.Loader)", "yaml.load(f)", "torch.load(f)", "f(trust_remote_code=x)"],
)  # fmt: skip
def test_the_reader_of_the_code_sees_it(source):
    assert offences(source)


def test_the_loader_of_yaml_makes_plain_values_only(tmp_path):
    import yaml

    from jaxdistill.config.load import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    file = tmp_path / "config.yaml"
    for tag in ("!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system", "!!python/object/new:os.system [x]"):
        file.write_text(f"teacher: {tag}\n")
        with pytest.raises(InputError, match="not valid YAML: could not determine a constructor"):
            load_config(file)


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    folder = write_folder(tmp_path / "model", wordpiece(), BERT_SPECIAL)
    (folder / "own.py").write_text("open('owned', 'w')\nclass Own: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_tokenizer(folder)  # by its tokenizer.json, where transformers has a class of its own for that
    except InputError as error:
        assert "the tokenizer there cannot be loaded" in str(error)
    assert not Path("owned").exists() and not (folder / "owned").exists()


def test_code_that_a_model_names_is_not_passed_on(tmp_path):
    folder, ours = write_folder(tmp_path / "theirs", wordpiece(), BERT_SPECIAL), tmp_path / "ours"
    write_model(folder, tiny_config(num_layers=1))
    junk = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "is_local": True, "local_files_only": True}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | junk))
    (folder / "own.py").write_text("class Own: pass\n")
    export_student(ours, *load_pretrained(folder), tokenizer=folder, dtype="float32", card="# A student")
    settings = json.loads((ours / "tokenizer_config.json").read_text())
    assert not junk.keys() & settings.keys() and settings["mask_token"] == "[MASK]"
    assert not junk.keys() & json.loads((ours / "config.json").read_text()).keys()
    assert not [path for path in ours.iterdir() if path.suffix == ".py" or b"own.Own" in path.read_bytes()]


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "", ".hidden", "a\nb", "x" * 101, "a b", "ü"])
def test_names_become_folders_only_inside_the_run(name):
    for fields in ({"students": {name: {"num_layers": 1}}}, {"students": {"a": {"num_layers": 1}}, "stages": {name: {}}}):
        with pytest.raises(InputError, match="becomes a folder"):
            load_config({"teacher": "x", "data": {"sources": ["x"]}, "output": "x"} | fields)


def test_weights_that_are_not_floating_point(tmp_path):
    write_model(tmp_path, tiny_config(num_layers=1))
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"embeddings.LayerNorm.bias": np.zeros(48, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"embeddings\.LayerNorm\.bias holds I8; weights are read as F64, F32, F16, BF16, not quantised"):
        load_pretrained(tmp_path)


def test_a_header_that_promises_what_is_not_there(tmp_path):
    write_model(tmp_path, tiny_config(num_layers=1))
    huge = {"embeddings.LayerNorm.bias": {"dtype": "F32", "shape": [10**12, 10**3], "data_offsets": [0, 4 * 10**15]}}
    overlapping = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    outside = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [2**63, 2**63 + 8]}}
    for header in (huge, overlapping, outside):
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
        with pytest.raises(InputError, match="damaged or truncated safetensors file"):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(InputError, match="damaged or truncated safetensors file"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("s3://key:secret@bucket/x y", "s3://***@bucket/x y"),
        ("https:/me:pass@host", "https:/***@host"),
        ("https://token@host/x", "https://***@host/x"),
        ("s3://AKIA0:a/b+c/d=@bucket/x", "s3://***@bucket/x"),
        ("s3://key:p@ss@bucket/x", "s3://***@bucket/x"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("https://host/#access_token=abc", "https://host/#access_token=***"),
        ("u?AWSAccessKeyId=a&Signature=b&monkey=1", "u?AWSAccessKeyId=***&Signature=***&monkey=1"),
        ("hf_transformersdocumentation", "hf_transformersdocumentation"),
        ("x?a=1&token=abc&b=2", "x?a=1&token=***&b=2"),
        ("u?X-Amz-Signature=q&X-Amz-Security-Token=r", "u?X-Amz-Signature=***&X-Amz-Security-Token=***"),
        ("Bearer hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "Bearer ***"),
        ("a token-of-mine here", "a *** here"),
        ("abfs://container@account.dfs/x", "abfs://container@account.dfs/x"),
        ("hf://datasets/a/b@main", "hf://datasets/a/b@main"),
        ("git@host:a/b", "git@host:a/b"),
        ("owner/name@refs/pr/1", "owner/name@refs/pr/1"),
        ("the token=x of a sentence", "the token=x of a sentence"),
    ],
)
def test_what_is_blotted_out(text, shown, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "token-of-mine")
    assert redacted(text) == shown and str(InputError(text)) == shown
