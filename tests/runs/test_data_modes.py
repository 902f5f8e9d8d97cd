"""Whole runs on the ways in which rows can come: languages with shares, a damaged store, a store at a URL, a stream."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from commands import command, finish
from safetensors.numpy import load_file
from tiny_texts import make_texts
from waiting import wait_for

import jaxdistill
from jaxdistill.config import load_config
from jaxdistill.data import TokenStore, language_shares, row_order
from jaxdistill.errors import InputError
from jaxdistill.resolve import resolve

pytestmark = pytest.mark.usefixtures("compiled_once")
QUICK = {"training__evaluate_every": 100, "training__micro_batches": 2, "training__batch_size": 16}  # on 8 devices


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[dict]:
    """Three of two languages, 10 to 1."""
    folder = tmp_path_factory.mktemp("languages")
    for name, count in (("en-0", 120), ("sw", 16), ("en-1", 40)):
        (folder / f"{name}.txt").write_text("\n\n".join(make_texts(count, seed=count)))
    return [{"path": str(folder / f"{name}.txt"), "language": name[:2]} for name in ("en-0", "sw", "en-1")]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "export" / "small" / "model.safetensors")


def assert_equal(found: Path, expected: Path) -> None:
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array, err_msg=name)


def back_to(folder: Path, step: int) -> None:
    """As if it had been killed after this checkpoint."""
    for path in (folder / "checkpoints").iterdir():
        if path.name != str(step):
            shutil.rmtree(path)
    shutil.rmtree(folder / "export")


def test_tokens_of_languages(ground, sources, tmp_path, cli):
    """Exact over devices and micro-batches and after a resume between two records; shares are those that prepare shows."""
    changes = {"data__sources": sources, "data__store": None, "data__sampling_exponent": 0.3, "training__log_every": 4}
    config = ground.config(tmp_path / "run", **changes, **QUICK, training__checkpoint_every=3, training__steps=8)
    jaxdistill.distill(config)
    expected = records(tmp_path / "run")
    assert [record["step"] for record in expected] == [0, 4, 8]
    for record in expected[1:]:
        assert record["tokens/en"] + record["tokens/sw"] == record["tokens"] > 0
    last = expected[-1]

    run = resolve(load_config(tmp_path / "run"))
    store = TokenStore(run.store)
    sizes = store.source_rows("train")
    numbers = row_order(run.config.data, sizes, 0).rows(np.arange(8 * 16))
    tokens = (store.read_rows("train", numbers)[1] > 0).sum(axis=1)
    swahili = (numbers >= sizes[0]) & (numbers < sizes[0] + sizes[1])
    assert (last["tokens/sw"], last["tokens/en"]) == (tokens[swahili].sum(), tokens[~swahili].sum())

    folder = Path(shutil.copytree(tmp_path / "run", tmp_path / "killed"))
    back_to(folder, 6)
    jaxdistill.distill(folder)
    assert_equal(folder, tmp_path / "run")
    assert [{k: v for k, v in record.items() if k.startswith("tokens") and "second" not in k} for record in records(folder)] == [
        {k: v for k, v in record.items() if k.startswith("tokens") and "second" not in k} for record in expected
    ]

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    share = 100 * language_shares(run.config.data, sizes)[1].drawn / sum(sizes)
    for verb in ("prepare", "inspect"):
        code, out, _ = cli(verb, path)
        assert code == 0 and "Languages" in out and f"{share:.2f} %" in out, out
    code, out, _ = cli("inspect", path, f"output={tmp_path / 'other'}")
    assert code == 0 and "shares are known after `prepare`" in out


@pytest.fixture(scope="module")
def plain(ground, tmp_path_factory) -> tuple[Path, dict]:
    """A finished run of 4 steps on a store of its own, and its config."""
    root = tmp_path_factory.mktemp("plain")
    config = ground.config(root / "run", data__store=str(root / "store"), **QUICK, training__steps=4)
    jaxdistill.distill(config)
    return root / "run", config


def test_a_flipped_bit_in_the_store(plain, tmp_path, cli):
    """One line, exit 2; `prepare --verify` repairs the store, and the run goes on to the same parameters."""
    run, config = plain
    store, folder = (Path(shutil.copytree(run.parent / name, tmp_path / name)) for name in ("store", "run"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"data": config["data"] | {"store": str(store)}, "output": str(folder)}))
    back_to(folder, 2)
    tokens = store / "000-000000-000000.train.tokens"
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes(byte ^ 16 if i % 32 == 8 else byte for i, byte in enumerate(whole)))  # one of every row of 16 tokens
    code, _, err = cli("distill", path)
    assert code == 2 and "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"error: {tokens}: row ") and "prepare CONFIG --verify" in line
    assert (folder / "checkpoints" / "2").is_dir()
    code, _, err = cli("prepare", path, "--verify")
    assert code == 0 and tokens.read_bytes() == whole, err
    assert f"{store}: 1 of 1 parts were damaged or missing and were made again: 000-000000-000000" in err
    code, _, err = cli("distill", path)
    assert code == 0 and "going on from step 2" in err
    assert_equal(folder, run)


def test_a_store_at_a_url(plain, tmp_path):
    """A run on it is the run on the folder, and may go on from the one with the other; the text need not be there."""
    run, config = plain
    memory = fsspec.filesystem("memory")
    for path in (run.parent / "store").iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    remote = config | {"data": config["data"] | {"store": "memory://bucket", "sources": ["/nowhere/text.jsonl"]}}
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    back_to(folder, 2)
    jaxdistill.distill(remote | {"output": str(folder)})
    assert_equal(folder, run)
    memory.rm("/bucket/000-000000-000000.train.crc")
    with pytest.raises(InputError, match=r"memory://bucket/000-000000-000000\.train\.crc: missing"):
        jaxdistill.distill(remote | {"output": str(tmp_path / "other")})


def streaming(ground, sources, output: Path, **changes) -> dict:
    weighted = [source | {"weight": 1 + i} for i, source in enumerate(sources)]
    fields = {"data__sources": weighted, "data__streaming": True, "data__window": 40, "data__store": None}
    return ground.config(output, **fields, **changes)


def test_a_stream_goes_on_bit_equal(ground, sources, tmp_path, cli):
    """Nothing but an index is written; a changed text or window is refused."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(streaming(ground, sources, tmp_path / "run", **QUICK, training__steps=8)))
    code, _, err = cli("distill", path)
    assert code == 0, err
    last = records(tmp_path / "run")[-1]
    assert last["tokens/en"] + last["tokens/sw"] == last["tokens"] > 0 and last["small/held_out"] > 0
    (index,) = (tmp_path / "run" / "tokens").iterdir()
    assert index.name.startswith("stream-") and index.stat().st_size < 2_000
    folder = Path(shutil.copytree(tmp_path / "run", tmp_path / "killed"))
    back_to(folder, 6)
    jaxdistill.distill(folder)
    assert_equal(folder, tmp_path / "run")
    code, _, err = cli("prepare", path)
    assert code == 2 and "data.streaming: the text is read while the run goes on, there is nothing to prepare" in err
    back_to(folder, 8)
    code, _, err = cli("distill", folder, "data.window=60")
    assert code == 2 and "data.window: the run in" in err
    moved = tmp_path / "moved.txt"
    moved.write_text(Path(sources[0]["path"]).read_text() + "more")
    code, _, err = cli("distill", folder, f"data.sources.0.path={moved}")
    assert code == 2 and "data.sources: text or tokenizer changed since the run in" in err


@pytest.mark.long
def test_a_stream_is_killed(ground, sources, tmp_path):
    paths = {}
    for name in ("whole", "killed"):
        paths[name] = tmp_path / f"{name}.yaml"
        options = {"training__steps": 16, "training__checkpoint_every": 3, "training__evaluate_every": 100}
        paths[name].write_text(yaml.safe_dump(streaming(ground, sources, tmp_path / name, **options)))
    assert finish(command("distill", paths["whole"]))[0] == 0
    process = command("distill", paths["killed"])
    checkpoints = tmp_path / "killed" / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = finish(command("distill", paths["killed"]))
    assert code == 0 and "going on from step" in err, err
    assert_equal(tmp_path / "killed", tmp_path / "whole")
