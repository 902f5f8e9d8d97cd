"""Several hosts prepare one store: threads stand for them, a barrier for JAX's collectives."""

import contextlib
import importlib
import json
import shutil
import threading

import pytest
from tiny_texts import make_texts
from waiting import PATIENCE

from jaxdistill import processes
from jaxdistill.config import DataConfig
from jaxdistill.data import TextTokenizer, TokenStore, prepare
from jaxdistill.data.shards import SourceFile, grouped
from jaxdistill.errors import InputError

prepare_module = importlib.import_module("jaxdistill.data.prepare")


class Hosts:
    """Runs `work(index)` on so many hosts; what each returned or raised."""

    def __init__(self, count: int, monkeypatch):
        self.own, self.barrier, self.said = threading.local(), threading.Barrier(count, timeout=PATIENCE), [None] * count
        monkeypatch.setattr(processes, "is_main", lambda: self.own.index == 0)
        monkeypatch.setattr(processes, "gathered", self.gathered)
        monkeypatch.setattr(processes, "from_main", lambda value: self.gathered(value)[0])
        monkeypatch.setattr(processes, "together", self.together)

    def gathered(self, value):
        self.said[self.own.index] = json.dumps(value)
        self.barrier.wait()
        values = [json.loads(said) for said in self.said]
        self.barrier.wait()
        return values

    @contextlib.contextmanager
    def together(self):
        found = None
        try:
            yield
        except InputError as error:
            found = str(error)
        if wrong := [message for message in self.gathered(found) if message]:
            raise InputError(wrong[0])

    def run(self, work) -> list:
        results = [None] * len(self.said)

        def host(index):
            self.own.index = index
            try:
                results[index] = work(index)
            except BaseException as error:
                results[index] = error
                if not isinstance(error, InputError):
                    self.barrier.abort()  # as the heartbeat of a host that is gone ends the others

        threads = [threading.Thread(target=host, args=(index,)) for index in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        return results


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for name, size in (("PART_BYTES", 1_500), ("BATCH_BYTES", 500)):
        monkeypatch.setattr(prepare_module, name, size)
    monkeypatch.setattr("jaxdistill.data.shards.SHARD_BYTES", 4_000)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Two sources of many files, of sizes between 200 bytes and 8,000."""
    for number in range(24):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        count = 40 if number == 5 else 1 + number % 7
        (folder / f"{number:02d}.txt").write_text("\n\n".join([*make_texts(count, seed=number), "once and again"]))
    return DataConfig(sources=[str(tmp_path / "a"), str(tmp_path / "b")], sequence_length=32, held_out=0.2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    seen: list[str] = []
    original = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, texts: seen.extend(texts) or original(self, texts))
    return seen


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_hosts_makes_the_same_bytes(tmp_path, data, tokenizer, monkeypatch, encoded, count, deduplicate):
    data = data.model_copy(update={"deduplicate": deduplicate})
    alone = prepare(data, tokenizer=tokenizer, store=tmp_path / "alone")
    assert len({(part["source"], part["shard"]) for part in alone.manifest["parts"]}) > 6
    total = len(encoded)
    encoded.clear()
    stores = Hosts(count, monkeypatch).run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "shared", shared=True))
    assert [store.fingerprint for store in stores] == [alone.fingerprint] * count and len(encoded) == total
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    again = Hosts(count, monkeypatch).run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "shared", shared=True))
    assert len(again) == count and len(encoded) == total


@pytest.mark.parametrize("deduplicate", [False, True])
def test_what_a_dead_host_left_others_complete(tmp_path, data, tokenizer, monkeypatch, encoded, deduplicate):
    data = data.model_copy(update={"deduplicate": deduplicate})
    hosts = Hosts(3, monkeypatch)
    write_part, written = prepare_module._write_part, []

    def write_or_die(*args):
        written.append(hosts.own.index)
        if written.count(1) == 2 and hosts.own.index == 1:
            raise SystemExit("killed")
        return write_part(*args)

    monkeypatch.setattr(prepare_module, "_write_part", write_or_die)
    results = hosts.run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "store", shared=True))
    assert isinstance(results[1], SystemExit) and all(
        isinstance(result, threading.BrokenBarrierError) for result in (results[0], results[2])
    )
    with pytest.raises(InputError, match="no complete token store"):
        TokenStore(tmp_path / "store")
    monkeypatch.setattr(prepare_module, "_write_part", write_part)
    total, before = len(encoded), len(encoded)
    Hosts(2, monkeypatch).run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "store", shared=True))
    rest = len(encoded) - before
    encoded.clear()
    Hosts(1, monkeypatch).run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "alone", shared=True))
    assert 0 < rest < len(encoded) / 2 < total
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")


def test_an_error_of_one_host_is_told_by_all(tmp_path, data, tokenizer, monkeypatch):
    (tmp_path / "b" / "23.jsonl").write_text("{")
    for count in (1, 3):
        results = Hosts(count, monkeypatch).run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "store", shared=True))
        assert all(isinstance(result, InputError) and "23.jsonl:1: not JSON" in str(result) for result in results)
    (tmp_path / "b" / "23.jsonl").write_text('{"text": "mended"}')
    hosts = Hosts(3, monkeypatch)
    results = hosts.run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / "store", shared=True))
    assert all(isinstance(result, TokenStore) for result in results)


def test_hosts_without_a_shared_folder_are_told(tmp_path, data, tokenizer, monkeypatch):
    hosts = Hosts(2, monkeypatch)
    results = hosts.run(lambda index: prepare(data, tokenizer=tokenizer, store=tmp_path / f"store{index}", shared=True))
    assert all(
        "what another process made is not there; data.store is a place that all processes reach" in str(result) for result in results
    )
    shutil.rmtree(tmp_path / "store1")


def test_files_in_groups():
    files = [SourceFile(str(i), "", size, "") for i, size in enumerate([5, 5, 100, 1, 9, 2, 10, 0, 11, 0])]
    assert grouped(files, 10) == [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9]]
    assert grouped(files, 1000) == [list(range(10))] and grouped([], 10) == []
