"""Speed of a config's training step against PyTorch on the same job and device. Prints Markdown for docs/log.md.

    python benchmarks/step_against_pytorch.py                                # random teacher of bge-small's shape, 16 x 128
    python benchmarks/step_against_pytorch.py --teacher FOLDER --batch 4 --length 512
    python benchmarks/step_against_pytorch.py --config CONFIG training.batch_size=64 data.sequence_length=512

The built-in job: MiniLMv2 from layer L-1 of the teacher to layer 6 of a 6 x 384 student, dropout on. Of a config, one student and
an objective of one relation_kl term; nothing of its text is read. On the first GPU when JAX and PyTorch both see one, else on the CPU.

First both sides make three updates with dropout off, on padded rows, and must agree on the losses; then each side runs in a process
of its own, never two at a time, in alternating rounds. On a CPU only steps during which other processes left the cores alone count.

Rows "malloc" give PyTorch the allocator settings that `jaxdistill.runtime` sets for itself; given to jaxdistill from outside
they must change nothing. Rows "AVX-512" (AMD only) undo that PyTorch's MKL refuses AVX-512 on a CPU that is not Intel's: a
preloaded library says that it is one. Hardly a user knows to do so; without these rows the table would credit JAX with what MKL
withholds. Rows "no mask" tell PyTorch that no row is padded, which our side is not told. `--rows short` leaves the first two out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative, of the losses and the gradient norm of both sides
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
OURS = "jaxdistill"
MKL_SHIM = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"
PROBES = {
    "jax": "import jax; print(any(d.platform == 'gpu' and 'cuda' in d.client.platform_version.lower() for d in jax.devices()))",
    "torch": "import torch; print(torch.cuda.is_available() and torch.version.cuda is not None)",
}


@dataclass(frozen=True)
class Side:
    name: str
    script: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


# --- the job


def find_device(wanted: str) -> str:
    """cuda where both frameworks see a GPU, asked in processes of their own: here it would take the memory that is to be measured."""
    if wanted == "cpu":
        return wanted
    seen = {}
    for name, question in PROBES.items():
        finished = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
        seen[name] = finished.returncode == 0 and finished.stdout.split()[-1:] == ["True"]
    if all(seen.values()):
        return "cuda"
    if wanted == "cuda":
        raise SystemExit(f"--device cuda: {', '.join(name for name, found in seen.items() if not found)} sees no NVIDIA GPU")
    return "cpu"


def prepare(folder: Path, options: argparse.Namespace, device: str) -> dict:
    """Write what both sides read: teacher, student, batches, numbers."""
    import jax
    from synthetic import random_batch, with_noise, write_teacher

    from jaxdistill.config import load_config
    from jaxdistill.errors import InputError
    from jaxdistill.models import init_params, save_pretrained
    from jaxdistill.resolve import resolve

    if options.config:
        config, overrides = str(options.config), [*options.overrides, "training.micro_batches=1"]
    else:
        config, overrides = built_in(str(options.teacher or write_teacher(folder / "teacher", "bge-small")), options, device), []
    try:
        run = resolve(load_config(config, overrides), num_devices=1, platform="gpu" if device == "cuda" else "cpu")
        job = described(run, options.student)
    except InputError as error:
        raise SystemExit(str(error)) from None
    student = next(s for s in run.students if s.name == job["student_name"])
    rng = np.random.default_rng(0)
    params = with_noise(jax.jit(partial(init_params, student.config))(jax.random.key(0)), rng)
    save_pretrained(folder / "student", student.config, params)
    batch, length = run.config.training.batch_size, run.config.data.sequence_length
    ids, lengths = random_batch(batch, length, run.teacher, rng)
    for name, mask in (("full", np.ones_like(ids)), ("padded", (np.arange(length) < lengths[:, None]).astype(np.int32))):
        np.savez(folder / f"{name}.npz", input_ids=np.where(mask > 0, ids, run.teacher.pad_token_id), attention_mask=mask)
    job |= {"config": config, "overrides": overrides, "student": str(folder / "student"), "device": device, "threads": options.threads}
    job |= {"steps": options.steps, "patience": options.patience, "cpu": device == "cpu", "repeats": 1 if device == "cpu" else 10}
    job |= {"batch": batch, "length": length}
    (folder / "job.json").write_text(json.dumps(job))
    return job


def built_in(teacher: str, options: argparse.Namespace, device: str) -> dict:
    relations = {"kind": "relation_kl", "relation_heads": options.relation_heads}
    return {
        "teacher": teacher,
        "data": {"sources": ["unread.txt"], "sequence_length": options.length},
        "students": {"student": {"shape": "6L"}},
        "objective": [relations | {"layer_map": {"strategy": "teacher_layer", "teacher_layer": -2}}],
        # With dropout of its weights our attention on a GPU is the plain one (docs/performance.md): off, on both sides.
        "training": {"batch_size": options.batch, "steps": 1000, "dropout": 0.1} | ({"attention_dropout": 0.0} if device == "cuda" else {}),
        "output": "unwritten",
    }


def described(run, name: str | None) -> dict:
    """What the PyTorch side is told; raises InputError where it could not do the same."""
    from jaxdistill.errors import InputError

    names = [student.name for student in run.students]
    if name not in names and (name or len(names) > 1):
        raise InputError(f"--student: one of {', '.join(names)}")
    student = next(s for s in run.students if s.name in (name, names[0]))
    terms = run.config.students[student.name].objective or run.config.objective
    parts = student.terms[0].parts
    layers = {(part.student[0].layer, *(feature.layer for feature in part.teacher)) for part in parts}
    if len(terms) != 1 or terms[0].kind != "relation_kl" or terms[0].cross or len(layers) != 1 or len(next(iter(layers))) != 2:
        raise InputError(f"{student.name}: the PyTorch side does one relation_kl term on one pair of layers, not this objective")
    if terms[0].weight.schedule != "constant" or run.config.data.packing or run.task or run.stage:
        raise InputError("the PyTorch side has no weight on a schedule, no packed texts, no task and no stages")
    ((student_layer, teacher_layer),) = layers
    heads, weight = terms[0].relation_heads, terms[0].weight.values[0]
    return {
        "student_name": student.name, "teacher": str(run.teacher_folder), "teacher_layer": teacher_layer, "student_layer": student_layer,
        "weights": {part.student[0].kind: weight * part.weight for part in parts},
        "relation_heads": run.teacher.num_heads if heads == "native" else heads,
        "dropout": {"hidden": student.config.hidden_dropout, "attention": student.config.attention_dropout},
        "optimizer": run.config.optimizer_of(student.name).model_dump(), "total_steps": run.config.training.steps,
        "dtype": run.settings.dtype,
        "shapes": " -> ".join(f"{c.num_layers} x {c.hidden_size}" for c in (run.teacher, student.config)),
    }  # fmt: skip


def create_sides(folder: Path, device: str, rows: str) -> list[Side]:
    ours, peer = Side(OURS, (str(HERE / "jax_side.py"),)), str(HERE / "pytorch_peer.py")
    modes = {mode: (peer, "--mode", mode) for mode in ("eager", "compile")}
    sides = [ours, *(Side(f"PyTorch {mode}", script) for mode, script in modes.items())]
    sides.append(Side("PyTorch compile, no mask", (*modes["compile"], "--no-mask")))
    if device == "cuda":
        sides.append(Side("PyTorch compile, no mask, max-autotune", (peer, "--mode", "max-autotune", "--no-mask")))
    elif rows == "all":
        sides.append(Side(f"{OURS}, malloc set from outside", ours.script, MALLOC))
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


def environment_of(job: dict, folder: Path) -> dict[str, str]:
    """Of a side's process: the device, and compilation caches that are empty at first and of this benchmark alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    if job["device"] == "cuda":
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return environment | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": gpu}
    return environment | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(job["threads"])}


def run_side(side: Side, folder: Path, job: dict, *extra: str) -> dict:
    out = folder / "result.json"
    command = [sys.executable, *side.script, str(folder), "--out", str(out), *extra]
    environment = environment_of(job, folder) | side.environment
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        raise SystemExit(f"{side.name} failed with {finished.returncode}:\n{finished.stdout[-4000:]}")
    return json.loads(out.read_text())


def measured(side: Side, folder: Path, job: dict) -> dict:
    result = run_side(side, folder, job)
    note = f"{result['disturbed']} of {len(result['seconds'])} steps disturbed, at worst by {result['others']:.0%} of the cores"
    print(f"  {side.name}: {np.median(result['seconds']) * 1e3:.1f} ms; {note}", file=sys.stderr, flush=True)
    return result


def check_same_job(sides: list[Side], folder: Path, job: dict) -> list[str]:
    """Three updates by each implementation, without dropout: a line each. The losses must agree, or nothing is timed."""
    plain = [side for side in sides if not side.environment and "--no-mask" not in side.script]
    updates = {side.name: run_side(side, folder, job, "--check")["updates"] for side in plain}
    lines, allowed = [], TOLERANCE[job["dtype"]]
    for name, values in updates.items():
        differences = [abs(a / b - 1) for own, ours in zip(values, updates[OURS], strict=True) for a, b in zip(own, ours, strict=True)]
        losses, norm = ", ".join(f"{value[0]:.6f}" for value in values), values[0][1]
        lines.append(f"- {name}: losses {losses}, first gradient norm {norm:.6f}, largest relative difference {max(differences):.1e}")
        if not max(differences) <= allowed:  # a nan differs as well
            raise SystemExit("\n".join([*lines, f"the two sides do not compute the same: more than {allowed} apart"]))
    return lines


# --- the table


def cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)} | ({} if lines else {"flags": ""})


def machine(threads: int, gpu: str = "") -> str:
    cpu = cpu_info()
    name = f"{threads} cores ({cpu.get('model name', platform.processor())}, family {cpu.get('cpu family')} model {cpu.get('model')})"
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "torch", "transformers"))
    return f"{gpu or name}; Python {platform.python_version()}, {versions}"


def table(results: dict[str, list[dict]], tokens: int) -> list[str]:
    """Medians over all steps of all rounds; the ratio's range is that of the rounds' own medians; the first step is the first round's."""
    columns = ("side", "step, median", "10 % to 90 % of steps", "tokens/s", "jaxdistill is faster by (rounds)", "first step, cold")
    columns += ("peak memory", "page faults a step", "others' share")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    ours = results[OURS]
    for name, rounds in results.items():
        milliseconds = np.concatenate([result["seconds"] for result in rounds]) * 1e3
        median, low, high = np.median(milliseconds), *np.percentile(milliseconds, (10, 90))
        per_round = [np.median(theirs["seconds"]) / np.median(own["seconds"]) for theirs, own in zip(rounds, ours, strict=True)]
        ratio = median / np.median(np.concatenate([result["seconds"] for result in ours]) * 1e3)
        faster = "" if name == OURS else f"{ratio:.2f} ({min(per_round):.2f} to {max(per_round):.2f})"
        faults, others = np.mean([np.mean(result["faults"]) for result in rounds]), max(result["others"] for result in rounds)
        first, memory = f"{rounds[0]['first']:.1f} s", f"{max(result['memory'] for result in rounds) / 1e9:.2f} GB"
        cells = (name, f"{median:.1f} ms", f"{low:.1f} to {high:.1f}", f"{tokens / median * 1e3:,.0f}", faster, first, memory)
        lines.append(f"| {' | '.join((*cells, f'{faults:,.0f}', f'{others:.0%}'))} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The training step against PyTorch on the same job and device.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, help="time the step of this config")
    source.add_argument("--teacher", type=Path, help="of the built-in job: a BERT folder; default: random weights")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the config to change")
    parser.add_argument("--student", help="which of the config's students")
    parser.add_argument("--batch", type=int, default=16, help="of the built-in job, as the next two")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--relation-heads", type=int, default=48)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rows", choices=("all", "short"), default="all", help="short: without other allocators and libraries for PyTorch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a side in a round; on a GPU ten times as many")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--patience", type=float, default=300, help="seconds that a side may spend in a round on finding undisturbed steps")
    options = parser.parse_intermixed_args()
    if options.overrides and not options.config:
        parser.error(f"{options.overrides[0]}: goes with --config; the built-in job has --batch, --length and --relation-heads")
    return options


def main() -> None:
    options = parse()
    device = find_device(options.device)
    if device == "cpu":
        if options.threads > len(cores := sorted(os.sched_getaffinity(0))):
            raise SystemExit(f"--threads {options.threads}: this process may use {len(cores)} cores")
        os.sched_setaffinity(0, cores[: options.threads])  # what XLA takes as the number of its threads; children inherit it
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which only prepares
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = prepare(folder, options, device)
        sides = create_sides(folder, device, options.rows)
        agreement = check_same_job(sides, folder, job)
        results: dict[str, list[dict]] = {side.name: [] for side in sides}
        for i in range(options.rounds):
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for side in sides:
                results[side.name].append(measured(side, folder, job))
    source = options.config or options.teacher or "random weights of bge-small's shape"
    dropout = "/".join(f"{rate:g}" for rate in job["dropout"].values())
    shape = f"batch {job['batch']} x {job['length']}, {job['relation_heads']} relation heads, {job['dtype']}, dropout {dropout}"
    print(f"{Path(source).name}: {job['shapes']}, the teacher run to layer {job['teacher_layer']}; {shape}.")
    print(f"{machine(options.threads, results[OURS][0]['gpu'])}. {options.rounds} rounds of {options.steps * job['repeats']} steps.")
    print(f"`{shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`")
    print("\nThree updates without dropout, on padded rows:\n", *agreement, "", *table(results, job["batch"] * job["length"]), sep="\n")


if __name__ == "__main__":
    main()
