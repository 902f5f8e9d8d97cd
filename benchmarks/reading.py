"""How fast rows come: from a token store, from object storage with a latency, from a stream of text.

    python benchmarks/reading.py --text FILE --tokenizer FOLDER [--copies 8] [--batch 256] [--length 128]

Makes a store of `--copies` times the text in a temporary folder. The object storage is simulated: every request waits for `--latency`
milliseconds, as many at once as are asked for, and brings the bytes of the local file; what a network can carry is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
from fsspec.asyn import AsyncFileSystem

from jaxdistill.config import DataConfig
from jaxdistill.data import TextTokenizer, TokenStore, batches, files, layout, load_tokenizer, open_stream, prepare, row_order

SECONDS, REQUESTS = [0.0], [0]  # how long a request takes, and how many were made


class SlowStore(AsyncFileSystem):
    """slow://FOLDER: the files of a folder, a while later."""

    protocol = "slow"
    cachable = False

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        REQUESTS[0] += 1
        await asyncio.sleep(SECONDS[0])
        with open(f"/{path}", "rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))


def rows_a_second(found: Iterator[dict], num_batches: int, batch: int) -> float:
    """After the first batches, which fill the buffers."""
    for _ in itertools.islice(found, 3):
        pass
    start = time.perf_counter()
    count = sum(1 for _ in itertools.islice(found, num_batches))
    return count * batch / (time.perf_counter() - start)


def time_store(store: TokenStore, data: DataConfig, batch: int) -> None:
    order, steps = row_order(data, store.source_rows("train"), 0), 200
    numbers = [order.rows(step * batch + np.arange(batch)) for step in range(steps)]
    seconds = {"reading a batch in one thread": 0.0, "of this its checksums": 0.0}
    raw = store._empty_rows(batch)
    for each in numbers:
        start = time.perf_counter()
        store.read_rows("train", each)
        middle = time.perf_counter()
        layout.row_checksums(raw["tokens"], raw["segments"])
        seconds["reading a batch in one thread"] += middle - start
        seconds["of this its checksums"] += time.perf_counter() - middle
    for name, total in seconds.items():
        print(f"{name:40} {1000 * total / steps:8.2f} ms of {batch} rows, {steps * batch / total:12,.0f} rows/s")
    found = rows_a_second(batches(store, order, batch_size=batch, start_step=0, num_steps=300), 250, batch)
    print(f"{'batches of a folder, read ahead':40} {found:12,.0f} rows/s, {found * data.sequence_length:14,.0f} slots/s")


def time_remote(folder: Path, data: DataConfig, batch: int, milliseconds: float, *, near: int) -> None:
    """`near` 0: as in a store of so many parts that no two rows of a batch lie close together."""
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    SECONDS[0], files.NEAR_BYTES = milliseconds / 1000, near
    store = TokenStore(f"slow://{folder}")
    order = row_order(data, store.source_rows("train"), 0)
    REQUESTS[0] = 0
    found = rows_a_second(batches(store, order, batch_size=batch, start_step=0, num_steps=80), 77, batch)
    name = f"object storage, {milliseconds:g} ms a request"
    print(f"{name:40} {found:12,.0f} rows/s, {found * data.sequence_length:14,.0f} slots/s, {REQUESTS[0] / 80 / batch:.2f} requests a row")


def time_stream(folder: Path, data: DataConfig, tokenizer: TextTokenizer, batch: int) -> None:
    data = data.model_copy(update={"streaming": True, "window": 16_384})
    stream = open_stream(data, tokenizer=tokenizer, folder=folder / "index", batch_size=batch, held_out_rows=512)
    start = time.perf_counter()
    held_out = stream.num_rows("held_out")
    print(f"{f'held-out rows of the stream: {held_out}':40} {time.perf_counter() - start:8.2f} s")
    order, steps = row_order(data, stream.source_rows("train"), 0), 4 * stream.num_rows("train") // batch
    for first, name in ((0, "stream, from the beginning"), (steps - 1, "stream, one batch of the 4th window")):
        start, tokens = time.perf_counter(), 0
        for each in stream.batches(order, batch_size=batch, start_step=first, num_steps=steps - first):
            tokens += int(each["attention_mask"].sum())
        seconds = time.perf_counter() - start
        print(f"{name:40} {seconds:8.2f} s, {tokens / seconds:14,.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--latency", type=float, nargs="*", default=[20, 50])
    arguments = parser.parse_args()
    tokenizer, text = load_tokenizer(arguments.tokenizer), Path(arguments.text).absolute()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").mkdir()
        for i in range(arguments.copies):
            (folder / "text" / f"{i:04d}-{text.name}").symlink_to(text)
        data = DataConfig(sources=[str(folder / "text")], sequence_length=arguments.length)
        start = time.perf_counter()
        store = prepare(data, tokenizer=tokenizer, store=folder / "store")
        seconds, tokens = time.perf_counter() - start, sum(store.manifest["totals"]["tokens"].values())
        print(
            f"{'prepare':40} {seconds:8.2f} s, {tokens / seconds:14,.0f} tokens/s; {store.num_rows('train'):,} rows of {arguments.length}"
        )
        time_store(store, data, arguments.batch)
        for milliseconds, near in itertools.product(arguments.latency, (files.NEAR_BYTES, 0)):
            time_remote(folder / "store", data, arguments.batch, milliseconds, near=near)
        time_stream(folder, data, tokenizer, arguments.batch)


if __name__ == "__main__":
    main()
