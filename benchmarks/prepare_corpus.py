"""`prepare` on a large synthetic text made from a real one: peak memory, throughput, and whether kills leave a trace.

    python benchmarks/prepare_corpus.py --tokenizer FOLDER --size 2048 --scratch FOLDER [--text GLOB] [--kills 2] [--uninterrupted]

Sentences of the text are drawn at random into documents of 200 to 4,000 characters, and those into compressed files (jsonl.gz) and one
large file (text). `prepare` then runs as the command does, is killed (SIGKILL) at random moments and started again. Memory is the resident
set of the process and its children, asked for ten times a second. --uninterrupted prepares the same text once more without a kill and
compares every byte of the two stores.
"""

from __future__ import annotations

import argparse
import filecmp
import gzip
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from jaxdistill.config import SourceConfig
from jaxdistill.data import DocumentCounts, read_documents

SAMPLE = Path(__file__).parent.parent / "jaxdistill" / "corpus"
CHILD = """
import sys
from jaxdistill.config import DataConfig
from jaxdistill.data import load_tokenizer, prepare
from jaxdistill.progress import preparing
sources, tokenizer, store, deduplicate = sys.argv[1].split(","), *sys.argv[2:4], sys.argv[4] == "True"
data = DataConfig(sources=sources, sequence_length=128, deduplicate=deduplicate)
with preparing("Preparing text") as report:
    totals = prepare(data, tokenizer=load_tokenizer(tokenizer), store=store, progress=report).manifest["totals"]
print(sum(totals["tokens"].values()), totals["bytes"], totals["duplicates"])
"""


def sentences(text: str) -> list[str]:
    found = [
        sentence
        for document in read_documents(SourceConfig(path=text), DocumentCounts())
        for sentence in re.split(r"(?<=[.!?]) ", document)
    ]
    return [sentence.strip() for sentence in found if 20 <= len(sentence.strip()) <= 2000]


def make_corpus(folder: Path, pool: list[str], megabytes: int, seed: int) -> list[str]:
    """A quarter in one text file, the rest in jsonl.gz of 32 MB of text each; the sources."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)

    def document() -> str:
        wanted, drawn, size = draw.randint(200, 4000), [], 0
        while size < wanted:
            drawn.append(draw.choice(pool))
            size += len(drawn[-1]) + 1
        return " ".join(drawn)

    with open(folder / "large.txt", "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 2**18:
            file.write(document() + "\n\n")
    for number in range(max(1, megabytes * 3 // 4 // 32)):
        with gzip.open(folder / f"{number:04d}.jsonl.gz", "wt", 1, encoding="utf-8") as file:
            size = 0
            while size < min(32, megabytes) << 20:
                line = json.dumps({"text": document()}, ensure_ascii=False) + "\n"
                size += len(line.encode())
                file.write(line)
    return [str(folder / "*.jsonl.gz"), str(folder / "large.txt")]


def resident(process: psutil.Process) -> int:
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total


def run(arguments: list[str], kill_after: float | None) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and stdout of one `prepare`, killed after some seconds if it still runs."""
    started, peak = time.monotonic(), 0
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            peak = max(peak, resident(process))
        except psutil.NoSuchProcess:
            break
        if kill_after is not None and time.monotonic() - started > kill_after:
            child.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    out = child.communicate()[0]
    if child.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"prepare ended with {child.returncode}")
    return time.monotonic() - started, peak, out


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, [name for name in names if name != "hashes.json"], shallow=False)[1:])


def speed(seconds: float, size: int, tokens: int) -> str:
    return f"{seconds:.1f} s, {size / 2**20 / seconds:.2f} MiB/s, {tokens / seconds:,.0f} tokens/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", default=str(SAMPLE / "wikipedia.jsonl"))
    parser.add_argument("--size", type=int, default=256, help="megabytes of text")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder for text and stores; what it makes there is deleted")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--every", type=float, default=60, help="a kill comes after at most so many seconds")
    parser.add_argument("--deduplicate", action="store_true")
    parser.add_argument("--uninterrupted", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = options.scratch / "prepare_corpus"
    if work.exists():
        raise SystemExit(f"{work} is there; delete it first")
    moments = random.Random(options.seed + 1)
    try:
        sources = make_corpus(work / "text", sentences(options.text), options.size, options.seed)
        common = [",".join(sources), options.tokenizer]
        runs = []
        for number in range(options.kills + 1):
            kill_after = moments.uniform(5, options.every) if number < options.kills else None
            seconds, peak, out = run([*common, str(work / "store"), str(options.deduplicate)], kill_after)
            runs.append((seconds, peak))
            print(f"run {number + 1}: {seconds:.1f} s, peak {peak / 2**20:.0f} MiB{', killed' if not out else ''}", flush=True)
            if out:
                break
        tokens, size, duplicates = map(int, out.split())
        total = sum(seconds for seconds, _ in runs)
        on_disk = sum(path.stat().st_size for path in (work / "text").iterdir())
        print(f"text {size / 2**20:.0f} MiB ({on_disk / 2**20:.0f} on disk), {tokens:,} tokens, {duplicates:,} duplicates")
        print(f"peak {max(peak for _, peak in runs) / 2**20:.0f} MiB; all runs together {speed(total, size, tokens)}")
        if options.uninterrupted:
            seconds, peak, _ = run([*common, str(work / "whole"), str(options.deduplicate)], None)
            print(f"uninterrupted: peak {peak / 2**20:.0f} MiB, {speed(seconds, size, tokens)}")
            same = same_bytes(work / "store", work / "whole")
            print(f"the same bytes after {len(runs) - 1} kills: {same}")
            raise SystemExit(0 if same else 1)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
