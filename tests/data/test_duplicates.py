"""Equal documents: found as a dictionary would find them, in pieces of any size."""

import importlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_texts import make_texts

from jaxdistill.config import DataConfig
from jaxdistill.data import DocumentCounts, TextTokenizer, duplicates, prepare
from jaxdistill.data.shards import Shard
from jaxdistill.data.storage import Folder

prepare_module = importlib.import_module("jaxdistill.data.prepare")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), max_size=5), st.integers(1, 6), st.integers(1, 8))
def test_the_first_of_equal_documents_stays(texts, chunk, compared):
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "CHUNK_DOCUMENTS", chunk)
        patch.setattr(duplicates, "RANGE_DOCUMENTS", compared)
        folder = Folder(Path(path))
        shards = [Shard(0, number, len(texts), (), "rows", f"text {number}") for number in range(len(texts))]
        for shard, documents in zip(shards, texts, strict=True):
            assert not duplicates.is_hashed(folder, shard)
            duplicates.write_hashes(folder, shard, documents)
            assert duplicates.is_hashed(folder, shard)
        duplicates.mark_duplicates(folder, shards, "all")
        seen, counts, expected = set(), DocumentCounts(), []
        kept = [list(duplicates.without_duplicates(folder, shard, own, counts)) for shard, own in zip(shards, texts, strict=True)]
        for own in texts:
            expected.append([text for text in own if not (text in seen or seen.add(text))])
        assert kept == expected
        assert counts.duplicates == sum(map(len, texts)) - sum(map(len, expected))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(prepare_module, "PART_BYTES", 2_000)
    monkeypatch.setattr("jaxdistill.data.duplicates.CHUNK_DOCUMENTS", 16)
    monkeypatch.setattr("jaxdistill.data.duplicates.RANGE_DOCUMENTS", 32)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_without_duplicates_is_that_of_a_text_without_them(tmp_path, tokenizer, small):
    first, second = make_texts(60), make_texts(60, seed=1)
    repeated = [write(tmp_path / "a.jsonl", first + first[:7]), write(tmp_path / "b.jsonl", [*second[:30], first[3], "", *second[20:]])]
    calls = []
    data = DataConfig(sources=repeated, sequence_length=32, held_out=0.2, deduplicate=True)
    store = prepare(data, tokenizer=tokenizer, store=tmp_path / "store", progress=lambda **done: calls.append(done))
    assert [source["duplicates"] for source in store.manifest["sources"]] == [7, 11]
    size = sum(Path(path).stat().st_size for path in repeated)
    assert calls[-1] | {"tokens": 0} == {"documents": 120, "tokens": 0, "bytes_done": 2 * size, "bytes_total": 2 * size}
    assert not [name for name in contents(store.folder) if name.endswith(("hashes", "repeats", "documents.json", "duplicates.json"))]
    plain = [write(tmp_path / "c.jsonl", first), write(tmp_path / "d.jsonl", second)]
    expected = prepare(
        data.model_copy(update={"sources": DataConfig(sources=plain).sources}), tokenizer=tokenizer, store=tmp_path / "plain"
    )
    for split in ("train", "held_out"):
        rows = [store.read_rows(split, np.arange(store.num_rows(split))) for store in (store, expected)]
        assert all(np.array_equal(one, other) for one, other in zip(*rows, strict=True))
    assert prepare(data.model_copy(update={"deduplicate": False}), tokenizer=tokenizer, store=tmp_path / "all").num_rows("train") > len(
        rows
    )


class Killed(BaseException):
    pass


def test_a_killed_search_goes_on(tmp_path, tokenizer, small, monkeypatch):
    texts = make_texts(60)
    sources = [write(tmp_path / f"{i}.jsonl", texts[10 * i : 10 * i + 30]) for i in range(3)]
    data = DataConfig(sources=sources, sequence_length=32, held_out=0, deduplicate=True)
    read, killed_at, done = [], None, []
    hashing, marking, encoding = duplicates.write_hashes, duplicates._mark, TextTokenizer.encode

    def step(name, work):
        def run(*args):
            done.append(name)
            if len(done) == killed_at:
                raise Killed
            return work(*args)

        return run

    monkeypatch.setattr(duplicates, "write_hashes", step("hash", hashing))
    monkeypatch.setattr(duplicates, "_mark", step("mark", marking))
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, documents: read.extend(documents) or encoding(self, documents))
    prepare(data, tokenizer=tokenizer, store=tmp_path / "whole")
    expected, steps = contents(tmp_path / "whole"), list(done)
    assert steps == ["hash"] * 3 + ["mark"] * 3
    for killed_at in range(1, len(steps) + 1):
        store = tmp_path / f"killed {killed_at}"
        done.clear()
        with pytest.raises(Killed):
            prepare(data, tokenizer=tokenizer, store=store)
        done.clear()
        killed_at, before = None, killed_at
        prepare(data, tokenizer=tokenizer, store=store)
        assert done == (["hash"] * (3 - before + 1) if before <= 3 else []) + ["mark"] * 3  # what is hashed is not read again for it
        assert contents(store) == expected
    # Another text in the place of one shard: what was marked because of the old one is forgotten.
    store, killed_at = tmp_path / "changed", 6
    done.clear()
    with pytest.raises(Killed):
        prepare(data, tokenizer=tokenizer, store=store)
    killed_at = None
    write(tmp_path / "0.jsonl", make_texts(20, seed=7))
    prepare(data, tokenizer=tokenizer, store=store)
    prepare(data, tokenizer=tokenizer, store=tmp_path / "fresh")
    assert contents(store) == contents(tmp_path / "fresh") != expected
