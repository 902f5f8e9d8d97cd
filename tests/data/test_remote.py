"""A token store on object storage: the same rows, read by ranges, and what happens when the network does not answer."""

import importlib
import json
import os
import shutil

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem
from tiny_texts import make_texts

from jaxdistill.config import DataConfig
from jaxdistill.data import RowOrder, TokenStore, batches, files, prepare
from jaxdistill.errors import InputError
from jaxdistill.urls import is_url

OBJECTS: dict[str, bytes] = {}
REQUESTS: list[tuple[str, int | None, int | None]] = []
FAIL: list[Exception | None] = []  # what the next requests raise; None: nothing


class AsyncStore(AsyncFileSystem):
    """As gs:// and s3://: requests side by side in one event loop."""

    protocol = "async-store"
    cachable = False

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        if FAIL and (error := FAIL.pop()) is not None:
            raise error
        REQUESTS.append((path, start, end))
        if path not in OBJECTS:
            raise FileNotFoundError(path)
        return OBJECTS[path][start:end]


class PlainStore(AbstractFileSystem):
    """As hf://: one request at a time from each thread."""

    protocol = "plain-store"
    cachable = False

    def cat_file(self, path, start=None, end=None, **kwargs):
        if FAIL and (error := FAIL.pop()) is not None:
            raise error
        REQUESTS.append((path, start, end))
        if path not in OBJECTS:
            raise FileNotFoundError(path)
        return OBJECTS[path][start:end]


@pytest.fixture(scope="module")
def local(tmp_path_factory, tokenizers_by_kind) -> TokenStore:
    folder = tmp_path_factory.mktemp("local")
    (folder / "text.txt").write_text("\n\n".join(make_texts(200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("jaxdistill.data.prepare"), "PART_BYTES", 3_000)
        data = DataConfig(sources=[str(folder / "text.txt")], sequence_length=32, held_out=0.2)
        return prepare(data, tokenizer=tokenizers_by_kind["wordpiece"], store=folder / "store")


@pytest.fixture(params=["async-store", "plain-store"])
def url(request, local, monkeypatch) -> str:
    fsspec.register_implementation("async-store", AsyncStore, clobber=True)
    fsspec.register_implementation("plain-store", PlainStore, clobber=True)
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))
    OBJECTS.clear()
    OBJECTS.update({f"bucket/store/{path.name}": path.read_bytes() for path in local.folder.iterdir()})
    REQUESTS.clear()
    FAIL.clear()
    return f"{request.param}://bucket/store"


def test_rows_and_batches_are_those_of_the_folder(local, url):
    store = TokenStore(url)
    assert store.remote and store.folder == url and store.fingerprint == local.fingerprint
    assert [path.split("/")[-1] for path, _, _ in REQUESTS] == ["manifest.json"]
    numbers = np.random.default_rng(0).integers(0, local.num_rows("train"), 100)
    for got, expected in zip(store.read_rows("train", numbers), local.read_rows("train", numbers), strict=True):
        assert np.array_equal(got, expected) and got.dtype == np.int32
    assert store.read_rows("held_out", np.array([], np.int64))[0].shape == (0, 32)
    order = RowOrder(local.source_rows("train"), None, 0)
    for one, other in zip(*(batches(s, order, batch_size=8, start_step=2, num_steps=20) for s in (local, store)), strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_near_rows_are_one_request(local, url, monkeypatch):
    monkeypatch.setattr(files, "NEAR_BYTES", 128)  # two rows
    store = TokenStore(url)
    REQUESTS.clear()
    own = local.manifest["parts"][0]["rows"]["train"]
    numbers = np.array([3, 0, 1, own - 1, 3])
    assert np.array_equal(store.read_rows("train", numbers)[0], local.read_rows("train", numbers)[0])
    ranges = {(path.split(".")[-1], start, end) for path, start, end in REQUESTS}
    last = 64 * (own - 1)
    assert ranges == {
        ("tokens", 0, 256), ("tokens", last, last + 64), ("segments", 0, 256), ("segments", last, last + 64), ("crc", 0, 4 * own),
    }  # fmt: skip
    monkeypatch.setattr(files, "LARGEST_REQUEST", 128)
    REQUESTS.clear()
    assert np.array_equal(store.read_rows("train", np.arange(7))[0], local.read_rows("train", np.arange(7))[0])
    assert max(end - start for _, start, end in REQUESTS) <= 128


def test_a_request_that_fails_is_made_again(local, url):
    store = TokenStore(url)
    FAIL.extend([None] * 4 + [ConnectionError("reset by peer"), TimeoutError()] + [None] * 2)
    assert np.array_equal(store.read_rows("train", np.arange(9))[0], local.read_rows("train", np.arange(9))[0])
    FAIL[:] = [ConnectionError("reset by peer")] * 1000
    with pytest.raises(InputError, match=r"store/000-0\S+: cannot be read after 3 tries: ConnectionError: reset by peer"):
        store.read_rows("train", np.arange(9))


def test_a_server_that_sends_whole_files_is_told_from_a_damaged_store(local, url, monkeypatch):
    """As `python -m http.server`."""

    async def whole_async(self, path, start=None, end=None, **kwargs):
        return OBJECTS[path]

    monkeypatch.setattr(AsyncStore, "_cat_file", whole_async)
    monkeypatch.setattr(PlainStore, "cat_file", lambda self, path, start=None, end=None, **kwargs: OBJECTS[path])
    with pytest.raises(InputError, match=r"\.train\.crc: its server ignores byte ranges \([\d,]+ bytes came where 4 were asked for\)"):
        TokenStore(url).read_rows("train", np.array([0]))


def test_what_is_wrong_with_a_store_is_one_line(local, url, tokenizer):
    FAIL.append(PermissionError("no credentials"))
    with pytest.raises(InputError, match=r"bucket/store/manifest\.json: cannot be read: PermissionError: no credentials"):
        TokenStore(url)
    store, name = TokenStore(url), "bucket/store/000-000000-000001.train.tokens"
    whole = OBJECTS[name]
    for data, message in (
        (whole[:-1], "ends before byte"),
        (whole[:-1] + b"\x7f", "differs from its checksum"),
        (None, "missing; the token"),
    ):
        OBJECTS.pop(name)
        OBJECTS.update({name: data} if data is not None else {})
        with pytest.raises(InputError, match=rf"000-000000-000001\.train\.tokens: .*{message}"):
            store.read_rows("train", np.arange(local.num_rows("train")))
        OBJECTS[name] = whole
    for data, message in (
        (b"{}", "not the manifest of a token store"),
        (b"[" * 10**6, "not the manifest"),
        (None, "no complete token store"),
    ):
        OBJECTS.pop("bucket/store/manifest.json")
        OBJECTS.update({"bucket/store/manifest.json": data} if data is not None else {})
        with pytest.raises(InputError, match=message):
            TokenStore(url)
        OBJECTS["bucket/store/manifest.json"] = b""


def test_a_protocol_that_nobody_knows():
    with pytest.raises(InputError, match=r"nosuch://bucket/store: cannot be opened: .*[Pp]rotocol"):
        TokenStore("nosuch://bucket/store")


def test_prepare_opens_it_without_the_text(local, url, tokenizer):
    """Its sources need not be here; what the config says of it must agree."""
    data = DataConfig(sources=["/nowhere.txt"], sequence_length=32, held_out=0.2)
    store = prepare(data, tokenizer=tokenizer, store=url)
    assert store.fingerprint == local.fingerprint
    prepare(data, tokenizer=tokenizer, store=url, expected=local.fingerprint)
    changes = {"sequence_length": 64, "held_out": 0.1, "sources": (*data.sources, *data.sources)}
    for field, value in changes.items():
        with pytest.raises(InputError, match=rf"data\.{field}: the token store at {url} was made with"):
            prepare(data.model_copy(update={field: value}), tokenizer=tokenizer, store=url)
    with pytest.raises(InputError, match="is not the token store that the run began with"):
        prepare(data, tokenizer=tokenizer, store=url, expected="another")


def test_places(local):
    assert [is_url(place) for place in ("gs://b/s", "hf://datasets/a/b", "s3://b", "/a/b", "file:///a", local.folder)] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert TokenStore(f"file://{local.folder}").num_rows("train") == local.num_rows("train")
    assert not TokenStore(f"file://{local.folder}").remote


def test_more_files_than_may_be_mapped(local, tmp_path, monkeypatch):
    """Each map holds a file descriptor, of which a process has 1,024 by default: files of a large store are opened for a batch."""
    monkeypatch.setattr(files, "MAPPED_FILES", 10)
    folder = shutil.copytree(local.folder, tmp_path / "store")
    store, before = TokenStore(folder), len(os.listdir("/proc/self/fd"))
    numbers = np.random.default_rng(1).integers(0, local.num_rows("train"), 300)
    assert np.array_equal(store.read_rows("train", numbers)[0], local.read_rows("train", numbers)[0])
    assert store._files._map.cache_info().currsize == 0 and len(os.listdir("/proc/self/fd")) == before
    os.truncate(folder / "000-000000-000001.train.segments", 100)  # while the run reads it
    with pytest.raises(InputError, match=r"000-000000-000001\.train\.segments: ends before row \d+; the token store is damaged"):
        store.read_rows("train", np.arange(store.num_rows("train")))


def test_many_parts(local, tmp_path):
    """Opening reads no file of a part, and a store of many is read like one of few."""
    part, folder = local.manifest["parts"][0], tmp_path / "many"
    folder.mkdir()
    count, parts = 400, []
    for number in range(count):
        parts.append(part | {"part": number})
        for name in part["files"]:
            (folder / name.replace("000-000000-000000", f"000-000000-{number:06d}")).hardlink_to(local.folder / name)
    rows = {split: count * part["rows"][split] for split in part["rows"]}
    manifest = local.manifest | {"parts": parts, "sources": [local.manifest["sources"][0] | {"rows": rows}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    store = TokenStore(folder)
    assert store._files._map.cache_info().currsize == 0
    own = part["rows"]["train"]
    numbers = np.arange(count) * own + np.arange(count) % own
    assert np.array_equal(store.read_rows("train", numbers)[0], local.read_rows("train", np.arange(count) % own)[0])
