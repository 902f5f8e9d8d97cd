"""Resident memory of a run of 2,100 steps, with logging, evaluation and checkpoints: it must not grow. Prints Markdown.

    python benchmarks/flat_memory.py                                      # 3 x 64 -> 2 x 64, random weights and words, on a CPU
    python benchmarks/flat_memory.py --config run.yaml training.steps=5000

`jaxdistill distill` in a process of its own, as a user starts it; this one reads /proc/PID/smaps_rollup every 50 ms and from
metrics.jsonl the step that was logged last. A row is the 100 steps from its step on, with their evaluation and checkpoint: the median,
and the most. "resident" is the memory that the process has allocated. Beside it, and not in it: "of files", the pages of libraries, which
a kernel may take back when nobody has read them for minutes (DAMON); "given back", pages that an allocator has freed (MADV_FREE) and that
count as resident until the machine is short of memory. An error if the last row's median is over 5 % from that of step 200; before
that come compilation, the first evaluation and checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from synthetic import SHAPES, write_teacher

from jaxdistill.config import load_config

FIRST, WINDOW = 200, 100  # steps


def tiny_config(folder: Path) -> Path:
    """A config of a tiny teacher and half a million random words of its vocabulary."""
    teacher = write_teacher(folder / "teacher", "tiny")
    words, size = random.Random(0), SHAPES["tiny"]["vocab_size"]
    lines = (" ".join(f"piece{words.randrange(5, size)}" for _ in range(words.randint(5, 400))) for _ in range(2500))
    (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    fields = {
        "teacher": str(teacher),
        "data": {"sources": [str(folder / "text.txt")], "sequence_length": 128, "held_out": 0.05},
        "students": {"small": {"num_layers": 2}},
        "objective": [{"kind": "relation_kl", "relation_heads": 8}],
        "training": {
            "steps": 2100, "batch_size": 16, "log_every": 10, "evaluate_every": 100, "evaluate_rows": 64, "checkpoint_every": 100,
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def resident(pid: int) -> dict[str, int]:
    """Bytes in RAM: of files ("Rss" without "Anonymous"), allocated ("Anonymous"), of this given back and not yet taken ("LazyFree")."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (OSError, ProcessLookupError):  # it has just ended
        return {}
    found = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":", 1) for line in lines)}
    return {name: found[name] for name in ("Rss", "Anonymous", "LazyFree")}


def last_step(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").rsplit("\n", 2) if metrics.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 and lines[-2] else 0


def watched(arguments: list[str], metrics: Path) -> list[tuple[int, dict[str, int]]]:
    """Runs the command; (step, bytes by kind) of every look at it."""
    samples = []
    process = subprocess.Popen([sys.executable, "-m", "jaxdistill.cli", "distill", *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        samples.append((last_step(metrics), resident(process.pid)))
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"jaxdistill distill ended with {process.returncode}")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="default: a tiny run, made for this")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.config or tiny_config(Path(folder))
        config = load_config(path, options.overrides)
        samples = watched([str(path), *options.overrides], Path(config.output) / "metrics.jsonl")
    steps = config.training.steps
    if steps < 2 * FIRST + WINDOW:
        parser.error(f"at least {2 * FIRST + WINDOW} steps")
    medians = {}
    print("| from step | resident, MB | at most, MB | of files, MB | given back, MB | looks |\n|---:|---:|---:|---:|---:|---:|")
    for start in range(FIRST, steps - WINDOW + 1, max((steps - FIRST) // 10 // WINDOW, 1) * WINDOW):
        seen = [sizes for step, sizes in samples if start <= step < start + WINDOW and sizes]
        if not seen:
            sys.exit(f"steps {start} to {start + WINDOW} were too fast to be seen")
        held = [sizes["Anonymous"] - sizes["LazyFree"] for sizes in seen]
        others = [statistics.median(each) for each in zip(*((s["Rss"] - s["Anonymous"], s["LazyFree"]) for s in seen), strict=True)]
        medians[start] = statistics.median(held)
        figures = (medians[start], max(held), *others)
        print(f"| {start} | {' | '.join(f'{figure / 1e6:.1f}' for figure in figures)} | {len(seen)} |")
    growth = medians[start] / medians[FIRST] - 1
    print(f"\nstep {start} against step {FIRST}: {100 * growth:+.2f} %")
    if abs(growth) > 0.05:
        sys.exit("resident memory is not flat")


if __name__ == "__main__":
    main()
