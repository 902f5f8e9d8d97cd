import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from tiny_texts import make_texts

from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data import TextTokenizer, TokenStore, layout, prepare, storage
from jaxdistill.data.split import is_held_out
from jaxdistill.errors import InputError

# `jaxdistill.data.prepare` as an attribute is the function.
prepare_module = importlib.import_module("jaxdistill.data.prepare")
PART_BYTES = 4_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare_module, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 1_000)


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    sources = [write_texts(tmp_path / f"{seed}.jsonl", make_texts(120, seed=seed)) for seed in (0, 1)]
    return DataConfig(sources=sources, sequence_length=32, held_out=0.2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unpacked(store: TokenStore, split: str) -> list[int]:
    """Every id of a split in order, without special tokens and padding."""
    tokens, segments = store.read_rows(split, np.arange(store.num_rows(split)))
    special = [store.manifest["tokenizer"][name] for name in ("cls_id", "sep_id")]
    return tokens[(segments > 0) & ~np.isin(tokens, special)].tolist()


@pytest.fixture
def encoded_texts(monkeypatch) -> list[str]:
    """Every text that gets tokenised from here on."""
    seen: list[str] = []
    original = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, texts: seen.extend(texts) or original(self, texts))
    return seen


def test_the_store_holds_every_token_once(tmp_path, data, any_tokenizer):
    calls = []
    store = prepare(data, tokenizer=any_tokenizer, store=tmp_path / "store", progress=lambda **done: calls.append(done))
    texts = make_texts(120, seed=0) + make_texts(120, seed=1)
    expected: dict[str, list[int]] = {"train": [], "held_out": []}
    for text, ids in zip(texts, any_tokenizer.encode(texts), strict=True):
        expected["held_out" if is_held_out(text.encode(), 0.2) else "train"] += ids.tolist()
    totals = store.manifest["totals"]
    for split, ids in expected.items():
        assert unpacked(store, split) == ids
        assert totals["tokens"][split] == len(ids)
        assert totals["rows"][split] == store.num_rows(split) == sum(store.source_rows(split))
        assert totals["documents"][split] == sum((split == "held_out") == is_held_out(text.encode(), 0.2) for text in texts)
    assert totals["bytes"] == sum(len(text.encode()) for text in texts)
    assert len(store.manifest["parts"]) > 6
    size = sum(Path(source.path).stat().st_size for source in data.sources)
    last = {"documents": 240, "tokens": sum(totals["tokens"].values()), "bytes_done": size, "bytes_total": size}
    assert calls[-1] == last and len(calls) > 20


def test_every_row_has_a_checksum(tmp_path, data, any_tokenizer):
    store = prepare(data, tokenizer=any_tokenizer, store=tmp_path / "store")
    for part in store.manifest["parts"]:
        for split in ("train", "held_out"):
            if part["rows"][split]:
                files = {kind: store.folder / layout.row_file(part, split, kind) for kind in ("tokens", "segments", "crc")}
                assert {path.name for path in files.values()} <= set(part["files"])
                tokens = np.fromfile(files["tokens"], store.manifest["dtype"]).reshape(-1, 32)
                segments = np.fromfile(files["segments"], "<u2").reshape(-1, 32)
                expected = [zlib.crc32(one.tobytes() + other.tobytes()) for one, other in zip(tokens, segments, strict=True)]
                assert np.fromfile(files["crc"], "<u4").tolist() == expected and len(expected) == part["rows"][split]


def test_a_source_has_its_language(tmp_path, data, tokenizer):
    sources = (data.sources[0].model_copy(update={"language": "sw"}), data.sources[1])
    store = prepare(data.model_copy(update={"sources": sources}), tokenizer=tokenizer, store=tmp_path / "store")
    assert [source["language"] for source in store.manifest["sources"]] == ["sw", None]


def test_wide_ids(tmp_path, data, tokenizer):
    wide = TextTokenizer(**{**vars(tokenizer), "vocab_size": 2**16 + 1})
    narrow_store = prepare(data, tokenizer=tokenizer, store=tmp_path / "narrow")
    wide_store = prepare(data, tokenizer=wide, store=tmp_path / "wide")
    assert (narrow_store.manifest["dtype"], wide_store.manifest["dtype"]) == ("<u2", "<u4")
    assert unpacked(narrow_store, "train") == unpacked(wide_store, "train")


def test_part_size_and_order_do_not_move_documents_between_the_splits(tmp_path, data, tokenizer, monkeypatch):
    first = prepare(data, tokenizer=tokenizer, store=tmp_path / "first").manifest["totals"]
    for part_bytes, batch_bytes in ((100, 50), (10**9, 10**9)):
        monkeypatch.setattr(prepare_module, "PART_BYTES", part_bytes)
        monkeypatch.setattr(prepare_module, "BATCH_BYTES", batch_bytes)
        flipped = data.model_copy(update={"sources": data.sources[::-1]})
        totals = prepare(flipped, tokenizer=tokenizer, store=tmp_path / str(part_bytes)).manifest["totals"]
        assert totals["documents"] == first["documents"] and totals["tokens"] == first["tokens"]


def test_the_held_out_share():
    texts = [text.encode() for text in make_texts(4000, longest=5)]
    for share in (0.0, 0.01, 0.3):
        count = sum(is_held_out(text, share) for text in texts)
        assert abs(count - share * 4000) <= 4 * (share * (1 - share) * 4000) ** 0.5
    assert all(is_held_out(text, 0.3) for text in texts if is_held_out(text, 0.1))  # a larger share only adds


def test_skipped_and_replaced_documents_are_counted_per_source(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"one \xff\n\ntwo\n\n\xc2\xa0\n\nthree")
    write_texts(tmp_path / "b.jsonl", ["", "four", "five"])
    data = DataConfig(sources=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], sequence_length=8, held_out=0)
    manifest = prepare(data, tokenizer=tokenizer, store=tmp_path / "store").manifest
    found = [(each["documents"]["train"], each["skipped"], each["invalid_utf8"]) for each in manifest["sources"]]
    assert found == [(3, 1, 1), (2, 1, 0)]
    assert (manifest["totals"]["skipped"], manifest["totals"]["invalid_utf8"]) == (2, 1)


def test_an_unchanged_store_is_used_again(tmp_path, data, tokenizer, encoded_texts):
    first = prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    before = contents(tmp_path / "store")
    encoded_texts.clear()
    (tmp_path / "store").chmod(0o555)  # a finished store may lie on a disk that is read-only
    weighted = tuple(source.model_copy(update={"weight": 2.0}) for source in data.sources)
    again = prepare(data.model_copy(update={"sources": weighted, "packing": True}), tokenizer=tokenizer, store=tmp_path / "store")
    (tmp_path / "store").chmod(0o755)
    assert not encoded_texts and again.fingerprint == first.fingerprint
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("change", ["file", "tokenizer", "sequence_length", "held_out", "column", "order"])
def test_a_changed_input_makes_a_new_store(tmp_path, data, tokenizer, tokenizers_by_kind, encoded_texts, change):
    texts = [*make_texts(30, seed=5)]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": text[::-1]}) + "\n" for text in texts))
    data = data.model_copy(update={"sources": (*data.sources, SourceConfig(path=str(path)))})
    first = prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    if change == "file":
        path.write_text(path.read_text().replace("river", "revir"))
    elif change == "tokenizer":
        tokenizer = tokenizers_by_kind["bpe"]
    elif change == "column":
        data = data.model_copy(update={"sources": (*data.sources[:2], SourceConfig(path=str(path), column="title"))})
    elif change == "order":
        data = data.model_copy(update={"sources": data.sources[::-1]})
    else:
        data = data.model_copy(update={change: {"sequence_length": 64, "held_out": 0.3}[change]})
    encoded_texts.clear()
    second = prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    # A source that is where it was and what it was is not tokenised again.
    assert len(encoded_texts) == {"file": 30, "column": 30, "order": 150}.get(change, 270)
    assert second.fingerprint != first.fingerprint
    prepare(data, tokenizer=tokenizer, store=tmp_path / "fresh")
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")  # nothing of the old one is left


KILLED = """
import importlib, os, pickle, signal, sys
module = importlib.import_module("jaxdistill.data.prepare")
data, tokenizer, store, part_bytes, writes = pickle.load(sys.stdin.buffer)
module.PART_BYTES, module.BATCH_BYTES = part_bytes, 1_000
replace = os.replace
def replace_or_die(*paths):
    global writes
    writes -= 1
    if writes == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_or_die
module.prepare(data, tokenizer=tokenizer, store=store)
"""


def test_a_killed_prepare_goes_on_where_it_was(tmp_path, data, tokenizer, encoded_texts):
    prepare(data, tokenizer=tokenizer, store=tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    encoded_texts.clear()
    for writes in (13, 17):  # inside of a part each time, with a finished part before it
        job = pickle.dumps((data, tokenizer, tmp_path / "killed", PART_BYTES, writes))
        done = subprocess.run([sys.executable, "-W", "error", "-c", KILLED], input=job, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert any(name.endswith(".tmp") for name in contents(tmp_path / "killed"))
        with pytest.raises(InputError, match="no complete token store there"):
            TokenStore(tmp_path / "killed")
    calls = []
    prepare(data, tokenizer=tokenizer, store=tmp_path / "killed", progress=lambda **done: calls.append(done))
    assert contents(tmp_path / "killed") == expected
    assert 20 < len(encoded_texts) < 200  # the finished parts were not tokenised again
    assert calls[-1]["documents"] == 240


def test_a_damaged_part_is_not_kept(tmp_path, data, tokenizer, encoded_texts):
    prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    expected = contents(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    (tmp_path / "store" / "000-000000-000001.train.tokens").write_bytes(b"\0" * len(expected["000-000000-000001.train.tokens"]))
    (tmp_path / "store" / "001-000000-000000.train.segments").unlink()
    encoded_texts.clear()
    prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    assert contents(tmp_path / "store") == expected
    assert 0 < len(encoded_texts) < 120


def test_a_second_process_waits(tmp_path, data, tokenizer, encoded_texts, caplog):
    folder = tmp_path / "store"
    folder.mkdir()
    second = threading.Thread(target=prepare, args=(data,), kwargs={"tokenizer": tokenizer, "store": folder})
    waiting = threading.Event()
    storage.logger.addFilter(lambda record: waiting.set() or True)
    with storage.open_folder(folder).locked():
        second.start()
        assert waiting.wait(10)
        assert not encoded_texts and os.listdir(folder) == ["lock"]
    second.join(20)
    storage.logger.filters.clear()
    assert "another process is preparing this token store; waiting" in caplog.text
    assert TokenStore(folder).num_rows("train") > 0


def refused(data, tokenizer, folder, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare(data, tokenizer=tokenizer, store=folder)
    assert "\n" not in str(caught.value)


def test_texts_that_make_no_store(tmp_path, tokenizer):
    empty, one, fine = (
        write_texts(tmp_path / name, texts)
        for name, texts in (("empty.jsonl", ["", " ", "\u200b"]), ("one.jsonl", ["river"]), ("fine.jsonl", make_texts(50)))
    )
    store = tmp_path / "store"
    for data, message in (
        (DataConfig(sources=[empty], held_out=0), r"data\.sources\.0 \(.*empty\.jsonl\): no text in it: 1 documents, 2 empty ones"),
        (DataConfig(sources=[fine, empty], held_out=0), r"data\.sources\.1 \(.*empty\.jsonl\): no text in it"),
        (DataConfig(sources=[one], held_out=0.001), r"none of the 1 documents falls into the share 0\.001; raise it or set it to 0 \(bl"),
        (DataConfig(sources=[one], held_out=0.999), r"all of the 1 documents fall into the share 0\.999; lower it or set it to 0"),
        (DataConfig(sources=[str(tmp_path / "none.jsonl")]), r"none\.jsonl: no such file"),
    ):
        refused(data, tokenizer, store, message)
        assert not store.exists()


def test_what_was_made_before_an_error_stays(tmp_path, tokenizer, encoded_texts):
    fine, broken = write_texts(tmp_path / "fine.jsonl", make_texts(50)), write_texts(tmp_path / "broken.jsonl", make_texts(200, seed=1))
    with open(broken, "a") as file:
        file.write("{")
    data = DataConfig(sources=[fine, broken])
    refused(data, tokenizer, tmp_path / "store", r"broken\.jsonl:201: not JSON")
    assert (tmp_path / "store" / "000-000000.json").exists() and not (tmp_path / "store" / "001-000000.json").exists()
    write_texts(tmp_path / "broken.jsonl", make_texts(200, seed=1))
    encoded_texts.clear()
    prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    assert len(encoded_texts) == 200  # of the mended file alone
    prepare(data, tokenizer=tokenizer, store=tmp_path / "fresh")
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


def test_folders_that_are_no_store(tmp_path, data, tokenizer):
    folder = tmp_path / "store"
    folder.mkdir()
    for name, message in (
        ("thesis.txt", "holds 'thesis.txt', which is no part of a token store"),
        ("000-000000-000000.train.tokens.bak", "which is no part of a token store"),
        ("manifest.json", r"manifest\.json: not the manifest of a token store"),
    ):
        (folder / name).write_text("{}")
        refused(data, tokenizer, folder, message)
        assert contents(folder) == {name: b"{}"}
        (folder / name).unlink()
    (tmp_path / "file").write_text("x")
    refused(data, tokenizer, tmp_path / "file", "file: cannot be made a folder")
    refused(data, tokenizer, tmp_path / "file" / "below", "below: cannot be made a folder")


def test_a_foreign_file_beside_a_store_stops_the_rebuild(tmp_path, data, tokenizer):
    folder = tmp_path / "store"
    prepare(data, tokenizer=tokenizer, store=folder)
    (folder / "notes.md").write_text("x")
    before = contents(folder)
    prepare(data, tokenizer=tokenizer, store=folder)  # to use it again is fine
    refused(data.model_copy(update={"sequence_length": 64}), tokenizer, folder, "holds 'notes.md'")
    assert contents(folder) == before


class HubStream:
    """A dataset of the Hub of some shards; `broken` shards end with an error of the network."""

    def __init__(self, shards: list[list[str]], broken: tuple[int, ...] = ()):
        self.shards, self.broken, self.num_shards, self.column_names = shards, broken, len(shards), None
        self.read: list[int] = []

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        self.read.append(index)
        yield from ({"text": text} for text in self.shards[index])
        if index in self.broken:
            raise ConnectionError("no route to https://host/file?X-Amz-Signature=5ec2e7")


@pytest.fixture
def hub(monkeypatch):
    """Serves a `HubStream`; the sources that it was asked for."""
    asked = []

    def serve(stream):
        monkeypatch.setattr("jaxdistill.data.sources._resolved_revision", lambda source: "ab" * 20)
        for module in ("shards", "prepare"):
            module = importlib.import_module(f"jaxdistill.data.{module}")
            monkeypatch.setattr(module, "hub_stream", lambda source: asked.append(source) or stream)
        return stream

    serve.asked = asked
    return serve


def test_shards_of_the_hub(tmp_path, tokenizer, hub, encoded_texts):
    shards = [make_texts(20, seed=seed) for seed in range(4)]
    data = DataConfig(sources=[{"dataset": "d", "revision": "main"}], held_out=0)
    stream, calls = hub(HubStream(shards, broken=(2,))), []
    with pytest.raises(InputError, match=r"d, shard 2: .* broke off at row 20: no route to https://host/file\?X-Amz-Signature=\*\*\*;"):
        prepare(data, tokenizer=tokenizer, store=tmp_path / "store", progress=lambda **done: calls.append(done["bytes_total"]))
    assert {source.revision for source in hub.asked} == {"ab" * 20} and set(calls) == {None}  # the commit, whatever becomes of main
    stream = hub(HubStream(shards))
    encoded_texts.clear()
    store = prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    assert stream.read == [2, 3]  # the finished ones are not downloaded again
    assert store.manifest["totals"]["documents"]["train"] == 80
    whole = prepare(data, tokenizer=tokenizer, store=tmp_path / "whole")
    assert contents(store.folder) == contents(whole.folder)


def test_tokenizers_may_fork_and_stay_parallel(tmp_path, data, tokenizer, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    prepare(data, tokenizer=tokenizer, store=tmp_path / "store")
    assert os.environ.pop("TOKENIZERS_PARALLELISM") == "true"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    prepare(data, tokenizer=tokenizer, store=tmp_path / "other")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"  # who says so has a reason
