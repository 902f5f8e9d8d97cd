"""Text as a stream: batches are functions of (seed, step), whenever and wherever the reading begins."""

import itertools
import json
import threading

import numpy as np
import pytest
from tiny_texts import make_texts

from jaxdistill.config import DataConfig
from jaxdistill.data import RowSource, TextStream, held_out_rows, is_held_out, language_numbers, open_stream, row_order, source_rows
from jaxdistill.errors import InputError

WINDOW, BATCH, LENGTH = 48, 8, 32


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(source_rows, "PART_BYTES", 2_000)
    monkeypatch.setattr(source_rows, "BATCH_BYTES", 500)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Two languages, three files of one and one of the other, held out 20 %."""
    (tmp_path / "en").mkdir()
    for i in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(40, seed=i))
        (tmp_path / "en" / f"{i}.jsonl").write_text(lines)
    (tmp_path / "sw.txt").write_text("\n\n".join(make_texts(30, seed=9)))
    sources = [
        {"path": str(tmp_path / "en"), "language": "en", "weight": 3},
        {"path": str(tmp_path / "sw.txt"), "language": "sw", "weight": 1},
    ]
    return DataConfig(sources=sources, sequence_length=LENGTH, held_out=0.2, streaming=True, window=WINDOW)


def opened(data, tokenizer, folder, batch_size=BATCH) -> TextStream:
    return open_stream(data, tokenizer=tokenizer, folder=folder, batch_size=batch_size, held_out_rows=40)


def read(stream: TextStream, data, start: int, count: int, seed: int = 4, **options) -> list[dict[str, np.ndarray]]:
    order = row_order(data, stream.source_rows("train"), seed)
    return list(stream.batches(order, batch_size=BATCH, start_step=start, num_steps=count, **options))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        for one, other in zip(first, second, strict=True)
    )


def texts_of(data, tokenizer) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of the training and of the held-out documents."""
    texts = [text for seed in range(3) for text in make_texts(40, seed=seed)] + make_texts(30, seed=9)
    split = {False: [], True: []}
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        split[is_held_out(text.encode(), data.held_out)].append(ids)
    return split[False], split[True]


def pieces(rows, tokenizer) -> list[int]:
    """Every id of the rows without special tokens and padding."""
    ids = np.concatenate([batch["input_ids"][batch["segment_ids"] > 0] for batch in rows])
    return ids[~np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id])].tolist()


def test_it_is_a_source_of_rows(data, tokenizer, tmp_path):
    stream = opened(data, tokenizer, tmp_path / "index")
    assert isinstance(stream, RowSource) and not (tmp_path / "index").exists()
    assert stream.source_rows("train") == (36, 12) and stream.num_rows("train") == WINDOW
    batch = read(stream, data, 0, 1)[0]
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "segment_ids"), (np.int32, (BATCH, LENGTH))
    )
    assert np.array_equal(batch["attention_mask"], batch["input_ids"] != tokenizer.pad_id)
    # Rounded up to whole batches.
    assert opened(data, tokenizer, tmp_path / "index", batch_size=13).num_rows("train") == 52


def test_one_pass_holds_every_training_token_once(data, tokenizer, tmp_path):
    one = data.model_copy(update={"sources": data.sources[:1], "window": 8})
    stream, marks = opened(one, tokenizer, tmp_path), []
    rows = source_rows.SourceRows(source_rows.RowMaker(one, tokenizer, threading.Event()), 0)
    taken = []
    while (mark := rows.mark())[0] == 0:
        tokens, segments = rows.take(1)
        taken.append({"input_ids": tokens, "segment_ids": segments})
        marks.append(mark)
        if mark[1:3] == [2, 40] and not rows._parts:
            break
    last = rows.mark()
    train, held = texts_of(data, tokenizer)
    own = sum(not is_held_out(text.encode(), 0.2) for seed in range(3) for text in make_texts(40, seed=seed))
    expected = np.concatenate(train[:own]).tolist()
    found = pieces(taken, tokenizer)
    assert last[0] <= 1 and found[: len(expected)] == expected and len(found) - len(expected) < LENGTH
    assert len({mark[1] for mark in marks}) == 3  # parts begin in every file
    # Held-out rows: from the beginning of the text, in its order, none of them trained on.
    batch = stream.read_batch("held_out", held_out_rows(stream, 10**6))
    ids = pieces([batch], tokenizer)
    assert 0 < len(ids) and ids == np.concatenate(held).tolist()[: len(ids)]
    with pytest.raises(ValueError, match="have no numbers"):
        stream.read_batch("train", np.arange(2))


def test_a_window_is_shuffled_whole_and_has_the_share_of_each_source(data, tokenizer, tmp_path):
    stream = opened(data, tokenizer, tmp_path)
    number = lambda places: language_numbers(data, stream.source_rows("train"), places)  # noqa: E731
    steps = WINDOW // BATCH
    for seed in (0, 1):
        window = read(stream, data, 2 * steps, steps, seed=seed, languages=number)
        assert np.bincount(np.concatenate([batch["languages"] for batch in window])).tolist() == [36, 12]
        assert all(np.bincount(batch["languages"]).tolist() == [6, 2] for batch in window)
        rows = np.concatenate([batch["input_ids"] for batch in window])
        if seed == 0:
            first = rows
    assert not np.array_equal(rows, first)
    assert np.array_equal(np.sort(rows.view(f"V{4 * LENGTH}"), axis=0), np.sort(first.view(f"V{4 * LENGTH}"), axis=0))


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("start", [1, 6, 17, 43])
def test_it_goes_on_with_the_batches_of_an_uninterrupted_run(data, tokenizer, tmp_path, start, indexed, monkeypatch):
    """Over several passes of the smaller source."""
    whole = read(opened(data, tokenizer, tmp_path / "whole"), data, 0, 50)
    folder = tmp_path / "killed"
    if indexed:
        read(opened(data, tokenizer, folder), data, 0, start)
    encoded = []
    original = type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, texts: encoded.extend(texts) or original(self, texts))
    assert same(read(opened(data, tokenizer, folder), data, start, 1), whole[start : start + 1])
    # At most a window is made again, and of each source the part in which it begins (and the window after it, meanwhile).
    assert not indexed or sum(map(len, encoded)) < 25_000
    assert same(read(opened(data, tokenizer, folder), data, start, 50 - start), whole[start:])
    assert same(read(opened(data, tokenizer, folder), data, 3, 2), whole[3:5])  # back, as after a rollback
    names = [[path.read_bytes() for path in each.iterdir()] for each in (tmp_path / "whole", folder)]
    assert indexed is False or names[0] == names[1]
    marks = [json.loads(line)[1] for line in names[0][0].split(b"\n")]
    assert marks[-1][1][0] > 1 and marks[0] == [[0, 0, 0, 0]] * 2


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_global_batch(data, tokenizer, tmp_path, num_processes):
    share = BATCH // num_processes
    parts = [
        read(opened(data, tokenizer, tmp_path / str(i)), data, 3, 6, rows=np.arange(i * share, (i + 1) * share))
        for i in range(num_processes)
    ]
    for step, batch in enumerate(read(opened(data, tokenizer, tmp_path / "one"), data, 3, 6)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        assert same([batch], [joined])


def test_a_torn_or_broken_index_costs_time_and_nothing_else(data, tokenizer, tmp_path):
    folder = tmp_path / "index"
    whole = read(opened(data, tokenizer, folder), data, 0, 40)
    (path,) = folder.iterdir()
    lines = path.read_bytes().split(b"\n")
    broken = [lines[0], b"{}", b"\xff\0", b'[2, [["../x", 0, 0, 0]], "d"]', b'[1e400, [], ""]', b"[" * 9999, lines[1][:-9]]
    path.write_bytes(b"\n".join(broken))
    assert same(read(opened(data, tokenizer, folder), data, 20, 20), whole[20:])
    assert same(read(opened(data, tokenizer, folder), data, 30, 10), whole[30:])
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[7:]] == [json.loads(line) for line in lines[1:]]
    number, marks, digest = json.loads(lines[1])
    marks[0] = [0, 2, 7, 0]  # another document
    path.write_text(json.dumps([number, marks, digest]))
    with pytest.raises(InputError, match=r"if only .*\.jsonl was damaged, delete that"):
        read(opened(data, tokenizer, folder), data, 8, 1)
    path.unlink()
    assert same(read(opened(data, tokenizer, folder), data, 8, 1), whole[8:9])


def test_a_text_that_changed_is_noticed(data, tokenizer, tmp_path):
    """By its sizes at once, by its content in what is read again."""
    folder, text = tmp_path / "index", tmp_path / "sw.txt"
    stream = opened(data, tokenizer, folder)
    read(stream, data, 0, 20)
    before = text.read_text()
    text.write_text(before.replace("river", "stone"))
    assert opened(data, tokenizer, folder).fingerprint == stream.fingerprint
    with pytest.raises(InputError, match=r"data\.sources: the rows of window 3 are not those that the run read: the text changed since"):
        read(opened(data, tokenizer, folder), data, 20, 2)
    text.write_text(before + "\n\nmore")
    assert opened(data, tokenizer, folder).fingerprint != stream.fingerprint
    text.unlink()
    with pytest.raises(InputError, match=r"sw\.txt: no such file"):
        read(stream, data, 40, 30)


def test_what_cannot_be_streamed(data, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n\n")
    empty = data.model_copy(update={"sources": (data.sources[0].model_copy(update={"path": str(tmp_path / "empty.txt")}),)})
    with pytest.raises(InputError, match=r"data\.sources\.0 \(.*empty\.txt\): no text to train on: 0 documents"):
        read(opened(empty, tokenizer, tmp_path / "a"), empty, 0, 1)
    nothing = data.model_copy(update={"held_out": 1e-9})
    with pytest.raises(InputError, match=r"data\.held_out: no document of the text's beginning falls into the share 1e-09"):
        opened(nothing, tokenizer, tmp_path / "b").num_rows("held_out")
    everything = data.model_copy(update={"held_out": 1 - 1e-12})
    with pytest.raises(InputError, match="no text to train on: 120 documents, of which the share"):
        read(opened(everything, tokenizer, tmp_path / "c"), everything, 0, 1)
    assert opened(data.model_copy(update={"held_out": 0.0}), tokenizer, tmp_path / "d").num_rows("held_out") == 0
    rare = data.model_copy(update={"sources": (data.sources[0], data.sources[1].model_copy(update={"weight": 1e-4}))})
    with pytest.raises(InputError, match=r"data\.sources\.1\.weight: its share of a window of 48 rows is less than one row"):
        opened(rare, tokenizer, tmp_path / "e")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/stream-.*: cannot be (read|written)"):
        read(opened(data, tokenizer, tmp_path / "file"), data, 0, 1)


def test_a_dataset_of_the_hub_is_read_shard_by_shard(data, tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": make_texts(60)}).to_iterable_dataset(num_shards=4)
    monkeypatch.setattr(source_rows, "hub_stream", lambda source: rows)
    hub = DataConfig(
        sources=[{"dataset": "someone/texts", "revision": "0123456789" * 4}],
        sequence_length=LENGTH, held_out=0.2, streaming=True, window=WINDOW,
    )  # fmt: skip
    folder = tmp_path / "index"
    whole = read(opened(hub, tokenizer, folder), hub, 0, 30)
    (index,) = folder.iterdir()
    assert len({json.loads(line)[1][0][1] for line in index.read_bytes().split(b"\n")}) > 2
    assert same(read(opened(hub, tokenizer, folder), hub, 13, 17), whole[13:])
    files = data.model_copy(update={"sources": data.sources[:1], "window": WINDOW})
    assert opened(files, tokenizer, tmp_path).fingerprint != opened(hub, tokenizer, folder).fingerprint


def test_reading_may_stop_early(data, tokenizer, tmp_path):
    order = row_order(data, (36, 12), 0)
    endless = opened(data, tokenizer, tmp_path).batches(order, batch_size=BATCH, start_step=0, num_steps=10**9)
    assert len(list(itertools.islice(endless, 3))) == 3
    endless.close()
    for thread in threading.enumerate():
        if thread.name == "stream":
            thread.join(10)
            assert not thread.is_alive()
