"""Kill a run again and again, at random moments; every run must end with the parameters of one that was left alone. Prints Markdown.

    python benchmarks/soak.py --kills 50                    # one process
    python benchmarks/soak.py --kills 50 --processes 2      # two over localhost: one of them is killed, the other must end by itself

Of the kills about six in ten are `kill -9` at a moment drawn evenly from a life's length, two in ten `kill -9` while a checkpoint
is being written, two in ten SIGTERM (exit 75 expected). Each is followed by the same command. Where a run ends before its kill, its
exported weights and its losses are compared with the reference and a new one begins. The teacher is tiny, its weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from synthetic import write_teacher

PATIENCE = 300  # seconds for a run to end by itself


def make_config(folder: Path, teacher: Path, steps: int) -> Path:
    """A run that checkpoints every 5 steps and logs every one."""
    text = folder.parent / "text.txt"
    if not text.exists():  # words of the synthetic tokenizer, a document each
        draw = random.Random(0)
        text.write_text("".join(f"piece{draw.randint(10, 900)}\n\n" for _ in range(8000)))
    data = {"sources": [str(text)], "sequence_length": 16, "held_out": 0.05, "store": str(folder.parent / "store")}
    config = {
        "teacher": str(teacher),
        "data": data,
        "students": {"small": {"num_layers": 2}},
        "objective": [{"kind": "relation_kl", "relation_heads": 8}],
        "training": {
            "steps": steps, "batch_size": 8, "log_every": 1, "evaluate_every": 50, "evaluate_rows": 16, "checkpoint_every": 5,
            "tensorboard": False,
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Life:
    """One start of the command, of one or several processes."""

    processes: list[subprocess.Popen]
    began: float = field(default_factory=time.monotonic)

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def codes(self) -> list[int]:
        """Waits for all of them."""
        end = time.monotonic() + PATIENCE
        return [process.wait(max(end - time.monotonic(), 1)) for process in self.processes]


def start(config: Path, log: Path, count: int) -> Life:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    started = []
    for number in range(count):
        line = [sys.executable, "-m", "jaxdistill.cli", "distill", str(config)]
        if count > 1:
            line += ["--coordinator", address, "--processes", str(count), "--process", str(number), "--heartbeat", "5"]
        with log.open("ab") as file:
            started.append(subprocess.Popen(line, stdout=file, stderr=file, env=environment))
    return Life(started)


def saving(run: Path) -> bool:
    checkpoints = run / "checkpoints"
    return checkpoints.is_dir() and any(path.name.endswith("-tmp") for path in checkpoints.iterdir())


def newest(run: Path) -> int:
    checkpoints = run / "checkpoints"
    return max((int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()), default=0) if checkpoints.is_dir() else 0


def last_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0  # the last may be torn


def where(run: Path, before: int, steps: int) -> str:
    """What the run was about when it was killed. `before`: last step logged at its start."""
    if saving(run):
        return "in a save"
    if not (run / "config.yaml").exists():
        return "starting, preparing text"
    step = last_logged(run)
    return "after the last step, exporting" if step >= steps - 1 else "between steps" if step != before else "reading the state, compiling"


def outcome(run: Path) -> dict:
    """What must be equal: the exported weights to the bit, and every loss."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    return {"weights": (run / "export" / "small" / "model.safetensors").read_bytes(), "losses": losses}


def left_alone(folder: Path, teacher: Path, steps: int, count: int, log: Path) -> tuple[dict, float]:
    """The outcome of a run that nobody ends, and the seconds that it takes with everything compiled."""
    config = make_config(folder, teacher, steps)
    for _ in range(2):
        shutil.rmtree(folder / "run", ignore_errors=True)
        began, codes = time.monotonic(), start(config, log, count).codes()
        if any(codes):
            raise SystemExit(f"the reference ended with {codes}: {log}")
    return outcome(folder / "run"), time.monotonic() - began


def soak(folder: Path, kills: int, steps: int, count: int, draw: random.Random) -> None:
    teacher, log = write_teacher(folder / "teacher", "tiny"), folder / "log.txt"
    expected, length = left_alone(folder / "reference", teacher, steps, count, log)
    fell, kinds, finished, slowest, began = Counter(), Counter(), 0, 0.0, time.monotonic()
    config, run = None, folder / "killed" / "run"
    while sum(kinds.values()) < kills:
        if config is None:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            shutil.rmtree(folder / "store", ignore_errors=True)
            config = make_config(folder / "killed", teacher, steps)
        kind = draw.choices(["kill -9", "kill -9 in a save", "SIGTERM"], [6, 2, 2])[0]
        before, moment, first_save = last_logged(run), draw.uniform(0, length), newest(run) + draw.randint(0, 40)
        life = start(config, log, count)
        while not life.is_over():
            if kind == "kill -9 in a save" and saving(run) and newest(run) >= first_save:
                break
            if kind != "kill -9 in a save" and time.monotonic() - life.began > moment:
                break
            time.sleep(0.002)
        place, told = where(run, before, steps), time.monotonic()
        if not life.is_over():
            victims = life.processes if kind == "SIGTERM" else [draw.choice(life.processes)]
            for victim in victims:
                victim.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        codes = life.codes()
        if not any(codes):
            finished, config = finished + 1, None
            compare(outcome(run), expected, log)
            continue
        took = time.monotonic() - told
        slowest = max(slowest, took) if kind == "SIGTERM" else slowest
        allowed = {75, -15} if kind == "SIGTERM" else {75, -9}  # -15: before Python was there to hear it
        if not set(codes) <= allowed:
            raise SystemExit(f"{kind} {place}: exit codes {codes}; {log}")
        kinds[kind] += 1
        fell[place] += 1
        number, step = sum(kinds.values()), newest(run)
        print(f"{number}/{kills}  {kind}, {place}, newest checkpoint {step}  ({took:.1f} s)", file=sys.stderr, flush=True)
    if config is not None:
        codes = start(config, log, count).codes()
        if any(codes):
            raise SystemExit(f"the last run ended with {codes}: {log}")
        finished += 1
        compare(outcome(run), expected, log)
    report(kinds, fell, finished, steps, count, slowest, time.monotonic() - began)


def compare(found: dict, expected: dict, log: Path) -> None:
    for what, value in expected.items():
        if found[what] != value:
            raise SystemExit(f"{what} differ from those of the run that was left alone; {log}")


def report(kinds: Counter, fell: Counter, finished: int, steps: int, count: int, slowest: float, seconds: float) -> None:
    print(f"{sum(kinds.values())} kills of {count} process(es) in {seconds / 60:.1f} min; {finished} runs of {steps} steps ended,")
    print("all with the exported weights, to the bit, and every loss of the run that was left alone.\n")
    print("| | kills |\n|---|---:|")
    for name, number in [*kinds.most_common(), *fell.most_common()]:
        print(f"| {name} | {number} |")
    print(f"\nSIGTERM to the end of the last process: at most {slowest:.1f} s.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = given.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        soak(place, given.kills, given.steps, given.processes, random.Random(given.seed))
