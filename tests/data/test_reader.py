import importlib
import itertools
import json

import numpy as np
import pytest
from tiny_texts import make_texts

from jaxdistill.config import DataConfig
from jaxdistill.data import RowOrder, TokenStore, batches, held_out_rows, prepare
from jaxdistill.errors import InputError

BATCH = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizers_by_kind) -> TokenStore:
    folder = tmp_path_factory.mktemp("reader")
    for seed in (0, 1):
        (folder / f"{seed}.txt").write_text("\n\n".join(make_texts(150, seed=seed)))
    module = importlib.import_module("jaxdistill.data.prepare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", 3_000)
        data = DataConfig(sources=[str(folder / "0.txt"), str(folder / "1.txt")], sequence_length=32, held_out=0.2)
        return prepare(data, tokenizer=tokenizers_by_kind["wordpiece"], store=folder / "store")


@pytest.fixture(params=[None, (3.0, 1.0)], ids=["unweighted", "weighted"])
def order(request, store) -> RowOrder:
    return RowOrder(store.source_rows("train"), request.param, seed=4)


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_rows_by_number_are_the_rows_of_the_files(store):
    for split in ("train", "held_out"):
        files = sorted(store.folder.glob(f"*.{split}.tokens"))
        assert len(files) > 3
        raw = np.concatenate([np.fromfile(path, "<u2").reshape(-1, 32) for path in files])
        raw_segments = np.concatenate([np.fromfile(path.with_suffix(".segments"), "<u2").reshape(-1, 32) for path in files])
        assert store.num_rows(split) == len(raw)
        numbers = np.random.default_rng(0).integers(0, len(raw), 100)
        tokens, segments = store.read_rows(split, numbers)
        assert tokens.dtype == segments.dtype == np.int32
        assert np.array_equal(tokens, raw[numbers]) and np.array_equal(segments, raw_segments[numbers])
    assert store.read_rows("train", np.array([], np.int64))[0].shape == (0, 32)
    for number in (-1, store.num_rows("train")):
        with pytest.raises(IndexError, match="row numbers of train go from 0 to"):
            store.read_rows("train", np.array([0, number]))


def test_a_batch_marks_padding(store):
    batch = store.read_batch("held_out", np.arange(store.num_rows("held_out")))
    assert {name: array.dtype for name, array in batch.items()} == dict.fromkeys(("input_ids", "attention_mask", "segment_ids"), np.int32)
    pad = store.manifest["tokenizer"]["pad_id"]
    assert np.array_equal(batch["attention_mask"], batch["input_ids"] != pad)
    assert np.array_equal(batch["attention_mask"], batch["segment_ids"] > 0)
    assert 0 < batch["attention_mask"].mean() < 1


def test_an_epoch_of_batches_reads_every_row(store):
    order = RowOrder(store.source_rows("train"), None, seed=0)
    num_rows = store.num_rows("train")
    read = np.concatenate([batch["input_ids"] for batch in batches(store, order, batch_size=1, start_step=0, num_steps=num_rows)])
    every = store.read_rows("train", np.arange(num_rows))[0]
    assert np.array_equal(np.sort(read, axis=0), np.sort(every, axis=0)) and not np.array_equal(read, every)


def test_batches_are_a_function_of_seed_and_step(store, order):
    whole = list(batches(store, order, batch_size=BATCH, start_step=0, num_steps=80))
    assert len(whole) == 80 and whole[0]["input_ids"].shape == (BATCH, 32)
    assert 80 * BATCH > 2 * store.num_rows("train")  # over the ends of epochs
    resumed = list(batches(store, order, batch_size=BATCH, start_step=13, num_steps=67))
    assert all(same(first, second) for first, second in zip(whole[13:], resumed, strict=True))
    for step in (0, 79):
        assert same(whole[step], store.read_batch("train", order.rows(np.arange(step * BATCH, (step + 1) * BATCH))))
    other = RowOrder(store.source_rows("train"), None, seed=5)
    assert not same(whole[0], next(batches(store, other, batch_size=BATCH, start_step=0, num_steps=1)))
    assert list(batches(store, order, batch_size=BATCH, start_step=5, num_steps=0)) == []


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_global_batch(store, order, num_processes):
    options = {"batch_size": BATCH, "start_step": 3, "num_steps": 6}
    share = BATCH // num_processes
    slices = [slice(i * share, (i + 1) * share) for i in range(num_processes)]
    parts = [list(batches(store, order, **options, rows=rows)) for rows in slices]
    for step, batch in enumerate(batches(store, order, **options)):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        assert same(batch, joined)


def test_reading_may_stop_early(store, order):
    endless = batches(store, order, batch_size=BATCH, start_step=0, num_steps=10**9)
    assert len(list(itertools.islice(endless, 3))) == 3


def test_an_order_of_another_store(store):
    with pytest.raises(ValueError, match="the order is one of 7 rows"):
        batches(store, RowOrder((7,), None, 0), batch_size=BATCH, start_step=0, num_steps=1)


def test_held_out_rows_are_spread_evenly(store):
    num_rows = store.num_rows("held_out")
    assert np.array_equal(held_out_rows(store, 10**6), np.arange(num_rows))
    some = held_out_rows(store, 7)
    assert len(some) == 7 and some[0] == 0 and np.ptp(np.diff(some)) <= 1 and some[-1] >= num_rows * 6 // 7
    assert np.array_equal(some, held_out_rows(store, 7))


def copy_of(store: TokenStore, folder):
    folder.mkdir()
    for path in store.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_stores_that_cannot_be_read(store, tmp_path):
    with pytest.raises(InputError, match="none: no complete token store there; run prepare"):
        TokenStore(tmp_path / "none")
    folder = copy_of(store, tmp_path / "copy")
    name = "000-000000-000001.train.tokens"
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2])
    with pytest.raises(InputError, match=rf"{name}: {len(whole) - 2} bytes instead of {len(whole)}; the token store is damaged"):
        TokenStore(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing; the token store is damaged"):
        TokenStore(folder)
    (folder / name).write_bytes(whole)
    assert TokenStore(folder).num_rows("train") == store.num_rows("train")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(InputError, match="a token store of version 99, this is 2"):
        TokenStore(folder)
