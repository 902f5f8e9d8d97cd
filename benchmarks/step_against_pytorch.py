"""Speed of the training step on a CPU, against PyTorch on the same job. Prints Markdown for docs/log.md.

    python benchmarks/step_against_pytorch.py                                # random teacher of bge-small's shape, 16 x 128
    python benchmarks/step_against_pytorch.py --teacher FOLDER --batch 4 --length 512

The job: MiniLMv2 from layer L-1 of the teacher to layer 6 of a 6 x 384 student, float32, dropout on. First both sides make
three updates with dropout off, on padded rows, and must agree on the losses; then each side runs in a process of its own, never
two at a time, in alternating rounds. Only steps during which other processes left the cores alone are counted.

Rows "malloc" give PyTorch the allocator settings that `jaxdistill.runtime` sets for itself; given to jaxdistill from outside
they must change nothing. Rows "AVX-512" (AMD only) undo that PyTorch's MKL refuses AVX-512 on a CPU that is not Intel's: a
preloaded library says that it is one. Hardly a user knows to do so; without these rows the table would credit JAX with what MKL
withholds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # relative, of the losses of both sides
DISTURBED = 0.05  # share of the cores that others may use during a step that counts
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
OURS = "jaxdistill"
MKL_SHIM = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"


@dataclass(frozen=True)
class Side:
    name: str
    script: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


# --- one side, in its own process


def busy_seconds() -> tuple[float, float]:
    """CPU seconds of all processes of the machine, and those that its cores had."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0, time.perf_counter()
    ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second


def wait_until_idle(until: float) -> None:
    """Until the cores are left alone for half a second, or the patience is over."""
    while time.monotonic() < until:
        busy, total = busy_seconds()
        time.sleep(0.5)
        after, total_after = busy_seconds()
        if after - busy < DISTURBED * max(total_after - total, 1e-9):
            return


def timed(step: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds of a step, the share of the cores that other processes used meanwhile, and its page faults."""
    busy, total = busy_seconds()
    own, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    own, faults = time.process_time() - own, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    after, total_after = busy_seconds()
    return seconds, max(after - busy - own, 0.0) / max(total_after - total, 1e-9), faults


def measure(step: Callable[[], object], job: dict) -> dict:
    """Times of `step` (which must wait for its results): undisturbed ones, as many as asked for; past the patience, any."""
    for _ in range(3):
        step()
    until, results = time.monotonic() + job["patience"], []
    while sum(share <= DISTURBED for _, share, _ in results) < job["steps"]:
        if len(results) >= job["steps"] and time.monotonic() > until:
            break
        if not results or results[-1][1] > DISTURBED:
            wait_until_idle(until)
        results.append(timed(step))
    best = sorted(results, key=lambda result: (result[1] > DISTURBED and result[1]))[: job["steps"]]
    seconds, shares, faults = (list(column) for column in zip(*best, strict=True))
    return {"seconds": seconds, "others": max(shares), "faults": faults, "disturbed": sum(share > DISTURBED for share in shares)}


def run_jax(folder: Path, check: bool) -> dict:
    """The package's own pieces, put together as `jaxdistill.distill` does."""
    import jax
    import jax.numpy as jnp

    from jaxdistill import runtime
    from jaxdistill.config import LayerMapConfig, OptimizerConfig, RelationKL, StudentConfig
    from jaxdistill.models import load_pretrained
    from jaxdistill.objective import bind_objective, features_read, loss
    from jaxdistill.optimizer import create_optimizer
    from jaxdistill.students import student_config
    from jaxdistill.train_step import StepSettings, Student, StudentState, TrainState, train_step

    runtime.configure()
    job = json.loads((folder / "job.json").read_text())
    teacher_config, teacher = load_pretrained(job["teacher"])
    config, _ = student_config(StudentConfig(shape="6L"), teacher_config, dropout=0.0 if check else job["dropout"], where="student")
    layers = LayerMapConfig(strategy="teacher_layer", teacher_layer=job["teacher_layer"])
    term = RelationKL(layer_map=layers, relation_heads=job["relation_heads"])
    terms = bind_objective((term,), config, teacher_config, "objective")
    optimizer = create_optimizer(OptimizerConfig(**job["optimizer"]), job["total_steps"], features_read(terms)[0])
    trained = {"params": jax.tree.map(jnp.asarray, load_pretrained(job["student"])[1]), "projections": {}}
    state = TrainState(jnp.int32(0), {"student": StudentState(trained, optimizer.init(trained), {}, jnp.int32(0))})
    arrays = np.load(folder / ("padded.npz" if check else "full.npz"))
    batch = {"input_ids": arrays["input_ids"][None], "segment_ids": arrays["attention_mask"][None]}
    teacher, batch = jax.device_put((teacher, batch))
    settings = StepSettings(teacher_config, "float32", 0, False)
    students = (Student("student", config, terms, optimizer),)
    compiled = jax.jit(partial(train_step, settings, students), donate_argnums=0).lower(state, teacher, batch).compile()

    def step() -> tuple[float, float]:
        nonlocal state
        state, metrics = compiled(state, teacher, batch)
        own = jax.device_get(metrics)["students"]["student"]
        sums, counts = ({name: part[i] for name, part in own["parts"].items()} for i in (0, 1))
        return float(loss(terms, sums, counts, 0)), float(own["gradient_norm"])

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, teacher, batch)
        jax.block_until_ready((state, metrics))

    return {"updates": [step() for _ in range(3)]} if check else measure(run, job)


# --- the job


def prepare(folder: Path, options: argparse.Namespace) -> dict:
    """Write what both sides read: teacher, student, batches, numbers. Every parameter is random, biases and norms too."""
    import jax

    from jaxdistill.config import OptimizerConfig, StudentConfig
    from jaxdistill.models import EncoderConfig, init_params, load_config, save_pretrained
    from jaxdistill.students import student_config

    rng = np.random.default_rng(0)

    def save_random(name: str, config: EncoderConfig) -> str:
        params = jax.jit(partial(init_params, config))(jax.random.key(0))
        noisy = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.02, x.shape).astype(np.float32), params)
        save_pretrained(folder / name, config, noisy)
        return str(folder / name)

    if options.teacher:
        teacher, config = str(options.teacher), load_config(options.teacher)
        if config.family != "bert":
            raise SystemExit(f"--teacher {teacher}: a {config.family} model; the PyTorch side is written for BERT")
    else:
        config = EncoderConfig(family="bert", vocab_size=30522, num_layers=12, num_heads=12, hidden_size=384, intermediate_size=1536)
        teacher = save_random("teacher", config)
    student = save_random("student", student_config(StudentConfig(shape="6L"), config, dropout=None, where="student")[0])
    save_batches(folder, options.batch, options.length, config.vocab_size, rng)
    job = {"teacher": teacher, "student": student, "teacher_layer": config.num_layers - 1, "student_layer": 6, "dropout": 0.1}
    job |= {"relation_heads": options.relation_heads, "threads": options.threads, "total_steps": 1000}
    job |= {"steps": options.steps, "patience": options.patience, "optimizer": OptimizerConfig().model_dump()}
    (folder / "job.json").write_text(json.dumps(job))
    return job


def save_batches(folder: Path, batch: int, length: int, vocab_size: int, rng: np.random.Generator) -> None:
    """Full rows for the timing, as the token store makes them, and padded ones for the comparison of the losses."""
    ids = rng.integers(vocab_size // 30, vocab_size, (batch, length)).astype(np.int32)
    lengths = rng.integers(length // 4, length, (batch, 1))
    for name, mask in (("full", np.ones((batch, length), np.int32)), ("padded", (np.arange(length) < lengths).astype(np.int32))):
        np.savez(folder / f"{name}.npz", input_ids=ids * mask, attention_mask=mask)


def create_sides(folder: Path) -> list[Side]:
    ours = Side(OURS, (str(HERE / "step_against_pytorch.py"), "--run-jax"))
    modes = {mode: (str(HERE / "pytorch_peer.py"), "--mode", mode) for mode in ("eager", "compile")}
    sides = [ours, Side(f"{OURS}, malloc set from outside", ours.script, MALLOC)]
    sides += [Side(f"PyTorch {mode}", script) for mode, script in modes.items()]
    sides += [Side(f"PyTorch {mode} + malloc", script, MALLOC) for mode, script in modes.items()]
    if library := mkl_shim(folder):
        full = MALLOC | {"LD_PRELOAD": str(library)}
        sides += [Side(f"PyTorch {mode} + malloc + AVX-512", script, full) for mode, script in modes.items()]
    return sides


def mkl_shim(folder: Path) -> Path | None:
    """The library that lets MKL use AVX-512, where it would not and a C compiler can make it."""
    processor = cpu_info()
    if processor.get("vendor_id") != "AuthenticAMD" or "avx512f" not in processor["flags"] or not shutil.which("gcc"):
        return None
    (folder / "shim.c").write_text(MKL_SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return folder / "shim.so"


# --- all sides, one after the other


def run_side(side: Side, folder: Path, threads: int, *extra: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(threads)} | side.environment
    out = folder / "result.json"
    command = [sys.executable, *side.script, str(folder), "--out", str(out), *extra]
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        raise SystemExit(f"{side.name} failed with {finished.returncode}:\n{finished.stdout[-4000:]}")
    return json.loads(out.read_text())


def measured(side: Side, folder: Path, threads: int) -> dict:
    result = run_side(side, folder, threads)
    note = f"{result['disturbed']} of {len(result['seconds'])} steps disturbed, at worst by {result['others']:.0%} of the cores"
    print(f"  {side.name}: {np.median(result['seconds']) * 1e3:.0f} ms; {note}", file=sys.stderr, flush=True)
    return result


def check_same_job(sides: list[Side], folder: Path, threads: int) -> list[str]:
    """Three updates by each implementation, without dropout: a line each. The losses must agree, or nothing is timed."""
    updates = {side.name: run_side(side, folder, threads, "--check")["updates"] for side in sides if not side.environment}
    lines = []
    for name, values in updates.items():
        differences = [abs(a / b - 1) for own, ours in zip(values, updates[OURS], strict=True) for a, b in zip(own, ours, strict=True)]
        losses, norm = ", ".join(f"{value[0]:.6f}" for value in values), values[0][1]
        lines.append(f"- {name}: losses {losses}, first gradient norm {norm:.6f}, largest relative difference {max(differences):.1e}")
        if max(differences) > TOLERANCE:
            raise SystemExit("\n".join([*lines, f"the two sides do not compute the same: more than {TOLERANCE} apart"]))
    return lines


# --- the table


def cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)} | ({} if lines else {"flags": ""})


def machine(threads: int) -> str:
    cpu = cpu_info()
    name = f"{cpu.get('model name', platform.processor())}, family {cpu.get('cpu family')} model {cpu.get('model')}"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "torch", "transformers"))
    return f"{threads} cores ({name}); Python {platform.python_version()}, {versions}"


def table(results: dict[str, list[dict]], tokens: int) -> list[str]:
    """Medians over all steps of all rounds; the ratio's range is that of the rounds' own medians."""
    lines = ["| side | step, median | 10 % to 90 % of steps | tokens/s | jaxdistill is faster by (rounds) | page faults a step | others' share |"]  # noqa: E501
    lines.append("|---|---|---|---|---|---|---|")
    ours = results[OURS]
    for name, rounds in results.items():
        milliseconds = np.concatenate([result["seconds"] for result in rounds]) * 1e3
        median, low, high = np.median(milliseconds), *np.percentile(milliseconds, (10, 90))
        per_round = [np.median(theirs["seconds"]) / np.median(own["seconds"]) for theirs, own in zip(rounds, ours, strict=True)]
        ratio = median / np.median(np.concatenate([result["seconds"] for result in ours]) * 1e3)
        faster = "" if name == OURS else f"{ratio:.2f} ({min(per_round):.2f} to {max(per_round):.2f})"
        faults, others = np.mean([result["faults"] for result in rounds]), max(result["others"] for result in rounds)
        speed = tokens / median * 1e3
        lines.append(f"| {name} | {median:.0f} ms | {low:.0f} to {high:.0f} | {speed:,.0f} | {faster} | {faults:,.0f} | {others:.0%} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The training step on a CPU against PyTorch on the same job.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--teacher", type=Path, help="folder of a BERT model, e.g. bge-small-en-v1.5")
    source.add_argument("--random", action="store_true", help="random weights of bge-small's shape (the default)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--relation-heads", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=300, help="seconds that a side may spend in a round on finding steps undisturbed by other processes")  # noqa: E501
    parser.add_argument("--run-jax", type=Path, help=argparse.SUPPRESS)  # the JAX side, in its own process
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads > len(cores := sorted(os.sched_getaffinity(0))):
        parser.error(f"--threads {options.threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[: options.threads])  # what XLA takes as the number of its threads; children inherit it
    return options


def main() -> None:
    options = parse()
    if options.run_jax:
        options.out.write_text(json.dumps(run_jax(options.run_jax, options.check)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(folder, options)
        sides = create_sides(folder)
        agreement = check_same_job(sides, folder, options.threads)
        results: dict[str, list[dict]] = {side.name: [] for side in sides}
        for i in range(options.rounds):
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for side in sides:
                results[side.name].append(measured(side, folder, options.threads))
    shape = f"batch {options.batch} x {options.length}, {options.relation_heads} relation heads, float32, dropout {job['dropout']}"
    source = options.teacher.name if options.teacher else "random weights of bge-small's shape"
    print(f"Teacher {source}, run to layer {job['teacher_layer']}; student 6 x 384; {shape}.")
    print(f"{machine(options.threads)}. {options.rounds} rounds of {options.steps} steps.")
    print(f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    print("\nThree updates without dropout, on padded rows:\n", *agreement, "", *table(results, options.batch * options.length), sep="\n")


if __name__ == "__main__":
    main()
