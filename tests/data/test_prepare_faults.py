"""What goes wrong under `prepare`: sources that vanish or change, full disks, rubbish where records and manifests lie."""

import errno
import importlib
import json
import os

import fsspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_texts import make_texts

from jaxdistill.config import DataConfig
from jaxdistill.data import TextTokenizer, TokenStore, layout, prepare, source_files
from jaxdistill.errors import InputError

prepare_module = importlib.import_module("jaxdistill.data.prepare")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare_module, "PART_BYTES", 2_000)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 500)
    monkeypatch.setattr("jaxdistill.data.shards.SHARD_BYTES", 6_000)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("\n\n".join(make_texts(30, seed=number)))
    return tmp_path / "text"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    seen: list[str] = []
    original = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, texts: seen.extend(texts) or original(self, texts))
    return seen


def data_of(source) -> DataConfig:
    return DataConfig(sources=[str(source)], sequence_length=32, held_out=0.2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def at_document(monkeypatch):
    """Calls a function when a document of so high a number has been read."""
    original = prepare_module.with_text

    def watch(number, happens):
        done = iter(range(10**6))

        def watched(documents, counts):
            for document in original(documents, counts):
                if next(done) == number:
                    happens()
                yield document

        monkeypatch.setattr(prepare_module, "with_text", watched)

    watch.off = lambda: monkeypatch.setattr(prepare_module, "with_text", original)
    return watch


@pytest.mark.parametrize("fault", ["vanishes", "grows", "replaced"])
@pytest.mark.parametrize("place", ["here", "there"])
def test_a_source_that_vanishes_or_changes(tmp_path, texts, tokenizer, at_document, encoded, place, fault):
    prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "whole")
    whole = len(encoded)
    encoded.clear()
    remote = fsspec.filesystem("memory")
    remote.store.clear()
    for path in texts.iterdir():
        remote.pipe_file(f"/texts/{path.name}", path.read_bytes())
    source = texts if place == "here" else "memory://texts"
    file, original = texts / "2.txt", (texts / "2.txt").read_bytes()
    changed = {"vanishes": None, "grows": original + b"\n\nmore", "replaced": b"other text of another time"}[fault]

    def write(data):
        if data is None:
            file.unlink() if place == "here" else remote.rm_file("/texts/2.txt")
        elif place == "here":
            file.write_bytes(data)
        else:
            remote.pipe_file("/texts/2.txt", data)

    at_document(70, lambda: write(changed))  # within 2.txt
    message = r"texts?/2\.txt: (is gone|cannot be read)" if fault == "vanishes" else r"texts?/2\.txt: has changed while it was read"
    with pytest.raises(InputError, match=message) as caught:
        prepare(data_of(source), tokenizer=tokenizer, store=tmp_path / "store")
    assert "\n" not in str(caught.value)
    at_document.off()
    write(original)
    encoded.clear()
    store = prepare(data_of(source), tokenizer=tokenizer, store=tmp_path / "store")
    if place == "here":  # an object has no mtime to set back: all of it may be another
        assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert 0 < len(encoded) < 0.7 * whole and store.manifest["totals"] == TokenStore(tmp_path / "whole").manifest["totals"]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, texts, tokenizer, monkeypatch, encoded):
    prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "whole")
    encoded.clear()
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"store/0.*: cannot be written: No space left on device; what is finished stays") as caught:
        prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store")
    assert "\n" not in str(caught.value) and not list((tmp_path / "store").glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", fsync)
    before = len(encoded)
    encoded.clear()
    prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store")
    assert 0 < len(encoded) < 120 < before + len(encoded)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_verify_makes_damaged_parts_again(tmp_path, texts, tokenizer, encoded):
    store = tmp_path / "store"
    prepare(data_of(texts), tokenizer=tokenizer, store=store)
    expected, name = contents(store), "000-000001-000000.train.segments"
    (store / name).write_bytes(bytes([expected[name][0] ^ 1]) + expected[name][1:])
    encoded.clear()
    prepare(data_of(texts), tokenizer=tokenizer, store=store)
    assert contents(store) != expected and not encoded  # the reader finds it, by the row's checksum
    prepare(data_of(texts), tokenizer=tokenizer, store=store, verify=True)
    assert contents(store) == expected and 0 < len(encoded) < 60


def test_large_files_are_hashed_once(tmp_path, texts, tokenizer, monkeypatch):
    for name, value in (("KEPT_HASH_BYTES", 1), ("SETTLED_SECONDS", -1.0)):
        monkeypatch.setattr(source_files, name, value)
    hashed, digest = [], source_files.hashlib.file_digest
    prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store")

    def count(file, kind):
        hashed.append(os.path.basename(file.name))
        return digest(file, kind)

    monkeypatch.setattr(source_files.hashlib, "file_digest", count)
    first = prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store")
    assert not hashed
    (texts / "1.txt").write_text((texts / "1.txt").read_text().replace("river", "revir"))
    second = prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store")
    assert [name for name in hashed if name.endswith(".txt")] == ["1.txt"] and second.fingerprint != first.fingerprint
    for rubbish in (b"[[[", b"[1]", b'{"a": 1}', b"[" * 100_000, b"\xff"):
        (tmp_path / "store" / "hashes.json").write_bytes(rubbish)
        assert prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store").fingerprint == second.fingerprint


def test_a_language_said_later_is_learnt_without_a_new_store(tmp_path, texts, tokenizer, encoded):
    first = prepare(data_of(texts), tokenizer=tokenizer, store=tmp_path / "store")
    encoded.clear()
    said = DataConfig(sources=[{"path": str(texts), "language": "sw"}], sequence_length=32, held_out=0.2)
    store = prepare(said, tokenizer=tokenizer, store=tmp_path / "store")
    assert store.manifest["sources"][0]["language"] == "sw" and store.fingerprint == first.fingerprint and not encoded


PLACES = ("/etc/passwd", "../../etc/passwd", "..\\x", "lock/../../x", "000-000000-000000.train.tokens/../../../x")


def mutations(value):
    """Ways to spoil a JSON value: the place in it, and what comes there."""
    rubbish = st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(min_value=2**60), st.floats(), st.text(max_size=8), st.sampled_from(PLACES),
        st.lists(st.integers(), max_size=2), st.dictionaries(st.sampled_from(["train", "files", *PLACES]), st.integers(), max_size=2),
    )  # fmt: skip
    return st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=4), rubbish, st.booleans())


def spoil(value, places, rubbish, remove):
    node = value
    for depth, place in enumerate(places):
        if not isinstance(node, (dict, list)) or not node:
            return
        key = list(node)[place % len(node)] if isinstance(node, dict) else place % len(node)
        if depth == len(places) - 1 or not isinstance(node[key], (dict, list)):
            if remove:
                del node[key]
            else:
                node[key] = rubbish
            return
        node = node[key]


@pytest.fixture
def spoilt(tmp_path, texts, tokenizer):
    folder = tmp_path / "outer" / "inner" / "store"
    prepare(data_of(texts), tokenizer=tokenizer, store=folder)
    (tmp_path / "x").write_text("not ours")
    return folder


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations(None), st.sampled_from(["000-000000-000000.json", "000-000001.json", "000-000001-000001.json"]))
@example(([1], False, False), "000-000000-000000.json")  # equal to the 0 of its source
@example(([4, 0], 7, False), "000-000000-000000.json")  # a count like any other
def test_rubbish_records_are_made_again(spoilt, texts, tokenizer, mutation, name):
    expected = contents(spoilt)
    record = json.loads(expected[name])
    spoil(record, *mutation)
    (spoilt / name).write_text(json.dumps(record))
    (spoilt / layout.MANIFEST).unlink()
    prepare(data_of(texts), tokenizer=tokenizer, store=spoilt)
    after = contents(spoilt)
    assert after.keys() == expected.keys() and after[layout.MANIFEST] == expected[layout.MANIFEST]
    for known, data in expected.items():
        (spoilt / known).write_bytes(data)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations(None), st.sampled_from(["000-000000-000000.json", "000-000001.json", "000-000001-000001.json"]))
def test_records_that_somebody_made_up_lead_nowhere(spoilt, texts, tokenizer, mutation, name):
    """Their checksum is no secret."""
    expected = contents(spoilt)
    record = json.loads(expected[name])
    del record["sha256"]
    spoil(record, *mutation)
    (spoilt / name).write_bytes(layout.sealed(record))
    (spoilt / layout.MANIFEST).unlink()
    try:
        prepare(data_of(texts), tokenizer=tokenizer, store=spoilt)
    except InputError as error:
        assert "\n" not in str(error)
    assert (spoilt.parent.parent.parent / "x").read_text() == "not ours"
    for known, data in expected.items():
        (spoilt / known).write_bytes(data)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(mutations(None), st.binary(max_size=40), st.sampled_from([b"[" * 100_000, b"9" * 5_000, b'{"format": 1}'])))
def test_rubbish_manifests_are_one_line(spoilt, texts, tokenizer, mutation):
    expected = contents(spoilt)
    if isinstance(mutation, bytes):
        (spoilt / layout.MANIFEST).write_bytes(mutation)
    else:
        manifest = json.loads(expected[layout.MANIFEST])
        spoil(manifest, *mutation)
        (spoilt / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "TokenStore", lambda store: object.__new__(TokenStore))  # reads more of it: test_manifest.py
        try:
            prepare(data_of(texts), tokenizer=tokenizer, store=spoilt)
        except InputError as error:
            assert "\n" not in str(error)
    assert (spoilt.parent.parent.parent / "x").read_text() == "not ours"
    for known, data in expected.items():
        (spoilt / known).write_bytes(data)
