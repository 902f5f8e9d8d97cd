"""Text and stores by URL (fsspec's memory:// stands for object storage), compressed files, and what no URL may hold."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import re
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.spec import AbstractFileSystem
from tiny_texts import make_texts

from jaxdistill.config import DataConfig, SourceConfig, load_config
from jaxdistill.data import DocumentCounts, TokenStore, layout, prepare, read_documents, source_fingerprint, storage
from jaxdistill.errors import InputError
from jaxdistill.redaction import first_line
from jaxdistill.urls import is_url, local_path

TEXTS = make_texts(60)
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd").to_pybytes(),
}
prepare_module = importlib.import_module("jaxdistill.data.prepare")


@pytest.fixture
def bucket():
    """An empty bucket of objects: memory://bucket."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def read(path, **fields):
    counts = DocumentCounts()
    return list(read_documents(SourceConfig(path=str(path), **fields), counts)), counts


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("place", ["here", "there"])
def test_compressed_files_are_known_by_their_ending(tmp_path, bucket, ending, place):
    packed = PACKED[ending](LINES)
    folder = str(tmp_path) if place == "here" else "memory://bucket"
    with fsspec.open(f"{folder}/a.jsonl{ending}", "wb") as file:
        file.write(packed)
    documents, counts = read(folder)
    assert documents == TEXTS and counts.bytes_read == len(packed)
    with fsspec.open(f"{folder}/a.txt{ending}", "wb") as file:
        file.write(PACKED[ending]("\n\n".join(TEXTS).encode()))
    assert read(f"{folder}/*.txt{ending}")[0] == TEXTS
    if ending:
        with fsspec.open(f"{folder}/a.jsonl{ending}", "wb") as file:
            file.write(packed[:-20])
        with pytest.raises(InputError, match=rf"a\.jsonl{ending}: cannot be read to its end: "):
            read(f"{folder}/a.jsonl{ending}")


def test_two_frames_are_one_file(tmp_path):
    for ending, pack in PACKED.items():
        (tmp_path / f"a.jsonl{ending}").write_bytes(pack(LINES[:1000]) + pack(LINES[1000:]))
    assert read(tmp_path)[0] == TEXTS * len(PACKED)


@pytest.mark.parametrize("ending", [ending for ending in PACKED if ending])
def test_whatever_follows_the_first_stream_is_read_or_refused(tmp_path, ending):
    """A bit of the second stream's header, bytes that are none, an end within it: never fewer documents without a word."""
    first, second = PACKED[ending](LINES[:1000]), PACKED[ending](LINES[1000:])
    path = tmp_path / f"a.jsonl{ending}"
    flipped = bytes([second[0] ^ 1]) + second[1:]
    for rest in (flipped, b"notes", second + b"notes", b"\0" * 8 + b"notes", second[:5], second[:-1]):
        path.write_bytes(first + rest)
        with pytest.raises(InputError, match=rf"a\.jsonl{ending}: cannot be read to its end: "):
            read(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=rf"a\.jsonl{ending}: is empty, which no compressed file is"):
        read(path)
    path.write_bytes(PACKED[ending](b""))
    assert read(path)[0] == []


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_zeros_between_and_after_streams_are_padding(tmp_path, ending):
    zeros = b"\0" * (1 << 19)  # more than is read at once
    streams = [PACKED[ending](part) for part in (b"", LINES[:1000], b"", LINES[1000:])]
    (tmp_path / f"a.jsonl{ending}").write_bytes(zeros.join(streams) + b"\0" * 4)
    assert read(tmp_path)[0] == TEXTS


def test_a_stream_that_unpacks_to_much_is_read_in_pieces(tmp_path):
    for ending in (".bz2", ".xz"):
        data = b"x" * 99 + b"\n\n"
        (tmp_path / f"a.txt{ending}").write_bytes(PACKED[ending](data * 20_000))
    assert read(tmp_path)[1].documents == 40_000


def test_a_line_without_end_is_refused_before_memory_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdistill.data.source_files.LARGEST_DOCUMENT", 1 << 20)
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(b'{"text": "' + b"x" * (1 << 20))
        with pytest.raises(InputError, match="a line of more than 1 MiB"):
            read(tmp_path / name)


def test_places_by_url(bucket):
    pq.write_table(pa.table({"text": ["p"]}), bucket.open("/bucket/c.parquet", "wb"))
    for name in ("b/2.txt", "b/10.txt", "z.md", ".cache/x.txt"):
        bucket.pipe_file(f"/bucket/{name}", name.encode())
    assert read("memory://bucket")[0] == ["b/10.txt", "b/2.txt", "p"]
    assert read("memory://bucket/b/*.txt")[0] == read("memory://bucket/**/[12]*.txt")[0] == ["b/10.txt", "b/2.txt"]
    assert read("memory://bucket/z.md", format="text")[0] == ["z.md"]
    for path, message in (("none.txt", "no such file or folder"), ("*.md5", "no file matches this glob"), ("z.md", "unknown kind of file")):
        with pytest.raises(InputError, match=rf"^memory:///?bucket/{path.replace('*', '.')}: {message}"):
            read(f"memory://bucket/{path}")


class WebServer(AbstractFileSystem):
    """As https://: listings are the links of a page and hold names alone, and folders are files like all others."""

    protocol = "web"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    header: ClassVar[dict[str, str]] = {}

    @classmethod
    def _strip_protocol(cls, path):
        return path

    def _links(self, path):
        folder = path.rstrip("/") + "/"
        names = {name.removeprefix(folder).partition("/") for name in self.files if name.startswith(folder)}
        return {f"{folder}{first}{slash}" for first, slash, _ in names}

    def ls(self, path, detail=True, **kwargs):
        found = [{"name": name, "size": None, "type": "directory" if name.endswith("/") else "file"} for name in self._links(path)]
        return found if detail else [info["name"] for info in found]

    def info(self, path, **kwargs):
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file", "mimetype": "text/plain", **self.header}
        if self._links(path):
            return {"name": path, "size": 99, "type": "file", "mimetype": "text/html", **self.header}
        raise FileNotFoundError(path)

    def _open(self, path, mode="rb", **kwargs):
        return io.BytesIO(self.files[path])


@pytest.mark.parametrize("field", ["ETag", "Last-Modified", "Content-MD5", "Digest"])
def test_files_of_a_web_server(monkeypatch, field):
    fsspec.register_implementation("web", WebServer, clobber=True)
    names = ("b/2.txt", "b/10.txt", "z.md", "?C=N;O=D")
    monkeypatch.setattr(WebServer, "files", {f"web://host/texts/{name}": name.encode() for name in names})
    monkeypatch.setattr(WebServer, "header", {field: "then"})
    for path in ("web://host/texts", "web://host/texts/", "web://host/texts/b", "web://host/texts/b/*.txt", "web://host/**/*.txt"):
        assert read(path)[0] == ["b/10.txt", "b/2.txt"], path
    assert read("web://host/texts/b/2.txt")[0] == ["b/2.txt"]
    assert read("web://host/texts/b/", format="text")[0] == ["b/10.txt", "b/2.txt"]
    before = source_fingerprint(SourceConfig(path="web://host/texts/b/*.txt"))
    assert before["files"][0] == {"name": "10.txt", "size": 8, field: "then"}
    with pytest.raises(InputError, match="no such file or folder"):
        read("web://host/others")
    monkeypatch.setattr(WebServer, "header", {})
    with pytest.raises(InputError, match="its store tells neither a size, nor a hash, tag or time"):
        read("web://host/texts/b/*.txt")


def test_a_url_of_a_file_here_is_its_path(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert read(f"file://{tmp_path}/a.txt")[0] == ["x"]
    assert not is_url(f"file://{tmp_path}") and local_path(f"file://{tmp_path}") == tmp_path
    assert source_fingerprint(SourceConfig(path=f"file://{tmp_path}")) == source_fingerprint(SourceConfig(path=str(tmp_path)))


def test_what_identifies_an_object_is_what_its_store_says():
    info = {"size": 3, "mtime": 5.0, "ETag": '"ab"'}
    remote_content = importlib.import_module("jaxdistill.data.source_files").remote_content
    assert remote_content(info) == ("ETag", "ab")
    assert remote_content({**info, "md5Hash": "cd=="}) == ("md5Hash", "cd==")
    assert remote_content({"size": 3, "mtime": 5.0}) == ("mtime", "5.0")
    assert remote_content({"size": 3}) is None


def test_an_object_that_is_written_again_has_another_fingerprint(bucket):
    source = SourceConfig(path="memory://bucket/a.txt")
    bucket.pipe_file("/bucket/a.txt", b"x")
    first = source_fingerprint(source)
    assert first == source_fingerprint(source) and first["files"][0].keys() == {"name", "size", "created"}
    bucket.pipe_file("/bucket/a.txt", b"y")
    assert source_fingerprint(source) != first


@pytest.mark.parametrize("url", ["gs://b/a.txt", "s3://b/*.txt", "https://host/a.txt", "nothing://b/a.txt", "abfs://box@account.dfs/a.txt"])
def test_clients_that_are_not_installed(url, monkeypatch):
    protocol = url.partition(":")[0]
    if protocol != "nothing":  # also where one of them happens to be installed
        registry = importlib.import_module("fsspec.registry")
        monkeypatch.setitem(registry.known_implementations, protocol, {"class": "not_there.FileSystem", "err": "Install it"})
        monkeypatch.delitem(registry._registry, protocol, raising=False)
    with pytest.raises(InputError) as caught:
        read(url)
    found = {"gs": "pip install gcsfs", "s3": "pip install s3fs", "https": "pip install aiohttp", "abfs": "pip install adlfs"}
    assert found.get(protocol, "nothing") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hunter2@bucket/a.txt",
        "https://hunter2@host/a.txt",
        "https://host/a.txt?X-Amz-Signature=hunter2",
        "https://host/a.txt?a=b&access_token=hunter2",
        "gs://b/a.txt?GoogleAccessId=hunter2",
        "zip://a.txt::s3://bucket/hunter2.zip",
    ],
)
def test_no_url_with_credentials_gets_into_a_config(url):
    fields = {"teacher": "t", "students": {"a": {"shape": "6L"}}, "output": "o"}
    for data in ({"sources": [url]}, {"sources": [{"path": url}]}, {"sources": ["a.txt"], "store": url}):
        if "Id=" in url:
            load_config(fields | {"data": data})  # names no secret
            continue
        with pytest.raises(InputError, match=r"^data\.?(sources\.0)?.*: (a URL with a password|a chain|holds a password)") as caught:
            load_config(fields | {"data": data})
        assert "hunter2" not in str(caught.value)


def test_the_examples_of_the_page_on_corpora_are_configs():
    page = (Path(__file__).parents[2] / "docs" / "corpora.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 4
    for example in examples:
        data = {"sources": ["a.txt"]} | yaml.safe_load(example)["data"]
        load_config({"teacher": "t", "students": {"a": {"shape": "6L"}}, "output": "o", "data": data})


@pytest.mark.parametrize("source", ["", " ", "file://", {"path": ""}, {"dataset": ""}])
def test_an_empty_name_is_no_source(source):
    """As a path it would be the folder that the command runs in, with everything below."""
    with pytest.raises(ValueError, match="an empty name is no place"):
        DataConfig(sources=[source])
    assert DataConfig(sources=["."]).sources[0].path == "."


@pytest.mark.parametrize(
    "cause, message", [(ConnectionError("no answer"), "cannot be reached: no answer"), (None, "no such file or folder")]
)
def test_a_web_server_out_of_reach_is_told_from_a_missing_file(monkeypatch, cause, message):
    class Client:
        def info(self, path):
            raise FileNotFoundError(path) from cause

        def invalidate_cache(self):
            pass

    monkeypatch.setattr(importlib.import_module("jaxdistill.data.source_files"), "filesystem", lambda url: (Client(), url))
    with pytest.raises(InputError, match=f"^https://host/a.txt: {message}$"):
        read("https://host/a.txt")


def test_errors_of_clients_are_told_without_their_secrets():
    said = "403, message='Forbidden', url='https://u:pw@host/a?X-Goog-Signature=5ec2e7'\nmore"
    assert first_line(said) == "403, message='Forbidden', url='https://***@host/a?X-Goog-Signature=***'"


def test_a_store_below_a_url(tmp_path, bucket, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "PART_BYTES", 3_000)
    monkeypatch.setattr(prepare_module, "TokenStore", lambda store: object.__new__(TokenStore))  # not read here
    bucket.pipe_file("/bucket/a.jsonl", LINES)
    data = DataConfig(sources=["memory://bucket/a.jsonl"], sequence_length=32, held_out=0.2)
    prepare(data, tokenizer=tokenizer, store=tmp_path / "here")
    put, puts = bucket.pipe_file, []

    def put_or_die(path, value):
        puts.append(path)
        if len(puts) == 20:
            raise PermissionError("403 https://host/?X-Amz-Signature=5ec2e7")
        put(path, value)

    monkeypatch.setattr(bucket, "pipe_file", put_or_die)
    said = r"memory://store: .* cannot be written: 403 https://host/\?X-Amz-Signature=\*\*\*; what is finished stays"
    with pytest.raises(InputError, match=said):
        prepare(data, tokenizer=tokenizer, store="memory://store")
    prepare(data, tokenizer=tokenizer, store="memory://store/")
    objects = {path.removeprefix("/store/"): bucket.cat_file(path) for path in bucket.find("/store")}
    assert objects == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir() if path.name != storage.LOCK}
    assert len(puts) < len(objects) + 20 - 7  # the finished part is not put again
    before = len(puts)
    prepare(data, tokenizer=tokenizer, store="memory://store")
    assert len(puts) == before
    with pytest.raises(InputError, match=r"data\.sequence_length: the token store at memory://store was made with 32, this config has 64"):
        prepare(data.model_copy(update={"sequence_length": 64}), tokenizer=tokenizer, store="memory://store")
    bucket.pipe_file("/store/notes.txt", b"x")
    bucket.rm_file(f"/store/{layout.MANIFEST}")
    with pytest.raises(InputError, match=r"memory://store: holds 'notes\.txt', which is no part of a token store"):
        prepare(data, tokenizer=tokenizer, store="memory://store")


def test_places_where_no_store_is_written(tmp_path, tokenizer):
    with pytest.raises(InputError, match="the Hub is read, not written to"):
        storage.open_folder("hf://datasets/someone/store")
    with pytest.raises(ValueError, match="deduplicate: keeps files in the store that an object storage cannot"):
        DataConfig(sources=["a.txt"], store="gs://bucket/store", deduplicate=True)
