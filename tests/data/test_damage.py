"""A store in which something is not as it was written: found at the row that is read, repaired by prepare --verify."""

import importlib
import itertools
import json

import fsspec
import numpy as np
import pytest
from tiny_texts import make_texts

from jaxdistill.config import DataConfig
from jaxdistill.data import RowOrder, TokenStore, batches, prepare
from jaxdistill.errors import InputError

prepare_module = importlib.import_module("jaxdistill.data.prepare")


@pytest.fixture
def data(tmp_path, monkeypatch) -> DataConfig:
    monkeypatch.setattr(prepare_module, "PART_BYTES", 3_000)
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(120)))
    return DataConfig(sources=[str(tmp_path / "text.txt")], sequence_length=32, held_out=0.2)


@pytest.fixture
def store(tmp_path, data, tokenizer) -> TokenStore:
    return prepare(data, tokenizer=tokenizer, store=tmp_path / "store")


def flip(path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind, width", [("tokens", 64), ("segments", 64), ("crc", 4)])
def test_any_bit_of_a_row_is_noticed_and_no_other_row_is_refused(store, kind, width):
    name = f"000-000000-000002.train.{kind}"
    before = sum(part["rows"]["train"] for part in store.manifest["parts"][:2])
    own = store.manifest["parts"][2]["rows"]["train"]
    for byte, bit in ((0, 0), (width - 1, 7), (3 * width - 1, 3)):
        flip(store.folder / name, byte, bit)
        row = byte // width
        damaged = TokenStore(store.folder)  # sizes are right: only the row shows it
        with pytest.raises(
            InputError, match=rf"000-000000-000002\.train\.tokens: row {row} differs from its checksum; the token store is "
        ):
            damaged.read_rows("train", np.arange(before, before + own))
        others = np.setdiff1d(np.arange(damaged.num_rows("train")), [before + row])
        assert len(damaged.read_rows("train", others)[0]) == len(others)
        damaged.read_rows("held_out", np.arange(damaged.num_rows("held_out")))
        flip(store.folder / name, byte, bit)


def test_it_reaches_the_loop_as_one_line(store):
    """Batches are read in threads of Grain's."""
    flip(store.folder / "000-000000-000001.train.tokens", 5)
    read = batches(TokenStore(store.folder), RowOrder(store.source_rows("train"), None, 0), batch_size=4, start_step=0, num_steps=1000)
    with pytest.raises(InputError, match=r"row 0 differs from its checksum; .*jaxdistill prepare CONFIG --verify"):
        list(itertools.islice(read, 1000))


def test_verify_makes_the_damaged_parts_again(store, data, tokenizer, monkeypatch):
    expected = contents(store.folder)
    assert contents(prepare(data, tokenizer=tokenizer, store=store.folder).folder) == expected
    flip(store.folder / "000-000000-000001.train.tokens", 5)
    (store.folder / "000-000000-000003.train.crc").unlink()
    with pytest.raises(InputError, match=r"000-000000-000003\.train\.crc: missing; the token store is damaged: .* --verify"):
        prepare(data, tokenizer=tokenizer, store=store.folder)
    encoded = []
    original = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, texts: encoded.extend(texts) or original(self, texts))
    said = []
    repaired = prepare(data, tokenizer=tokenizer, store=store.folder, verify=True, tell=said.append)
    assert contents(store.folder) == expected and repaired.fingerprint == store.fingerprint
    assert 0 < len(encoded) < 60  # two of more than six parts
    parts = len(store.manifest["parts"])
    assert said == [f"{store.folder}: 2 of {parts} parts were damaged or missing and were made again: 000-000000-000001, ..."]
    prepare(data, tokenizer=tokenizer, store=store.folder, verify=True, tell=said.append)
    assert said[1:] == [f"{store.folder}: all {parts} parts are as they were made"]


def test_verify_reads_the_objects_of_a_store_at_a_url(store, data, tokenizer):
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    expected = {f"/store/{name}": content for name, content in contents(store.folder).items() if name != "lock"}
    flipped, short, gone = (f"/store/000-000000-00000{part}.train.tokens" for part in (1, 3, 5))
    try:
        for name, content in expected.items():
            if name != gone:
                bucket.pipe_file(name, {flipped: bytes([content[0] ^ 1]) + content[1:], short: content[:-64]}.get(name, content))
        with pytest.raises(InputError, match=r"000-000000-00000[35]\.train\.tokens: .*--verify"):
            remote = prepare(data, tokenizer=tokenizer, store="memory://store")  # used as it lies
            remote.read_rows("train", np.arange(remote.num_rows("train")))
        said = []
        remote = prepare(data, tokenizer=tokenizer, store="memory://store", verify=True, tell=said.append)
        assert {name: bucket.cat_file(name) for name in bucket.find("/store")} == expected
        assert said == [
            f"memory://store: 3 of {len(store.manifest['parts'])} parts were damaged or missing and were made again: 000-000000-000001, ..."
        ]
        remote.read_rows("train", np.arange(remote.num_rows("train")))
    finally:
        bucket.store.clear()


def test_verify_of_a_damaged_manifest(store, data, tokenizer):
    expected = contents(store.folder)
    manifest = json.loads(expected["manifest.json"])
    manifest["parts"][1]["rows"]["train"] += 1
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its parts have other rows than its sources; the token store is damaged"):
        prepare(data, tokenizer=tokenizer, store=store.folder)
    prepare(data, tokenizer=tokenizer, store=store.folder, verify=True)
    assert contents(store.folder) == expected


def test_verify_never_costs_a_run_its_store(tmp_path, store, data, tokenizer):
    """The text changed or is gone: the store is left as it is."""
    expected = contents(store.folder)
    text = tmp_path / "text.txt"
    text.write_text("another text")
    with pytest.raises(InputError, match="made from other text or by another tokenizer"):
        prepare(data, tokenizer=tokenizer, store=store.folder, verify=True)
    text.unlink()
    with pytest.raises(InputError, match=r"text\.txt: no such file"):
        prepare(data, tokenizer=tokenizer, store=store.folder, verify=True)
    assert contents(store.folder) == expected
