"""Batch x length x method: tokens/s, MFU, the losses' share of the step, memory and compile time on one device, as Markdown.

    python benchmarks/sweep.py                                                   # bge-small's shape, 16 x 128, MiniLMv2
    python benchmarks/sweep.py --teacher bert-base --batches 64 128 --lengths 128 256 512 --methods minilmv2 direct od
    python benchmarks/sweep.py --config CONFIG training.precision=bfloat16 --batches 32 --lengths 512

Every row is a process of its own on the first device that JAX finds, so that one which runs out of memory is reported as such and
the next goes on. MFU: the analytic operations of `jaxdistill.flops` (the gradient's twice the forward pass, nothing counted twice for
being computed again) over the rate of a large matrix product, measured at the start of the same sweep in the dtype of the step's
products. "loss": the share of the step that goes when every loss is replaced by a sum of squares of what it reads. Memory: the
device's own peak where it keeps one, else the compiled step's arguments and temporaries. Compile time: tracing included, from an
empty cache and again from the full one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

_LAYERS = {"strategy": "teacher_layer", "teacher_layer": -2}
METHODS = {
    "minilmv2": {"kind": "relation_kl", "relation_heads": 48, "layer_map": _LAYERS},
    "relation_mse": {"kind": "relation_mse", "relation_heads": 48, "layer_map": _LAYERS},
    "direct": {"kind": "direct_mse", "layer_map": _LAYERS},
    "hidden": {"kind": "hidden_mse", "layer_map": "uniform"},
    "attention": {"kind": "attention_mse", "layer_map": "uniform"},
    "attention_kl": {"kind": "attention_kl", "layer_map": "uniform"},
    "od": {"kind": "output_kl"},
}
OWN = "config"  # the method that a config itself names
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "MemoryError", "bad_alloc")
COLUMNS = ("method", "batch", "length", "ms a step", "tokens/s", "MFU", "loss", "peak memory, GB", "compiled in s", "from cache in s")


# --- one row, in its own process


def matmul_rate(dtype: str) -> float:
    """Operations a second of a square matrix product in this dtype, the best of several sizes."""
    import jax
    import jax.numpy as jnp

    best, accelerator = 0.0, jax.default_backend() != "cpu"
    precision = "highest" if dtype == "float32" else None
    for size in (4096, 8192) if accelerator else (1024, 2048):
        x = jnp.full((size, size), 0.5, dtype)
        product = jax.jit(lambda x, y: jnp.matmul(x, y, precision=precision)).lower(x, x).compile()
        jax.block_until_ready(product(x, x))
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(repeats := 20 if accelerator else 4):
                y = product(x, x)
            jax.block_until_ready(y)
            best = max(best, 2 * size**3 * repeats / (time.perf_counter() - start))
    return best


def sum_of_squares(student: list, teacher: list, projections: dict, inputs):
    """In place of a loss: reads all that it reads, so that both encoders and their gradients stay."""
    import jax
    import jax.numpy as jnp

    leaves = jax.tree.leaves((student, teacher, projections))
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves), jnp.float32(1.0)


def without_losses(run):
    (student,) = run.students
    terms = tuple(replace(term, parts=tuple(replace(part, compute=sum_of_squares) for part in term.parts)) for term in student.terms)
    return replace(run, students=(replace(student, terms=terms),))


def timed_step(run, job: dict, params: dict) -> dict:
    """Compile the step (twice: cold, from cache), and time it."""
    import jax
    import numpy as np
    from synthetic import random_batch
    from timing import measure

    from jaxdistill.sharding import batch_sharding, create_mesh
    from jaxdistill.state import compile_step, initial_state, place_teacher

    mesh, shape = create_mesh(run.config.mesh, jax.devices()[:1]), (run.config.training.batch_size, run.config.data.sequence_length)
    ids, _ = random_batch(*shape, run.teacher, np.random.default_rng(0))
    with jax.set_mesh(mesh):
        state, teacher = jax.jit(lambda p: initial_state(run, p))(params), place_teacher(run, params, mesh)
        batch = jax.device_put({"input_ids": ids[None], "segment_ids": np.ones_like(ids)[None]}, batch_sharding(mesh))
        compiling = []
        for _ in range(2):
            jax.clear_caches()
            start = time.perf_counter()
            step = compile_step(run, state, teacher, batch)
            compiling.append(time.perf_counter() - start)

    def once() -> None:
        nonlocal state
        state, _ = step(state, teacher, batch)

    result = measure(once, lambda: jax.block_until_ready(state), job)
    analysis, stats = step.memory_analysis(), jax.devices()[0].memory_stats() or {}
    compiled = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = stats.get("peak_bytes_in_use", compiled)
    return {"seconds": float(np.median(result["seconds"])), "cold": compiling[0], "cached": compiling[1], "memory": memory}


def run_row(job: dict) -> dict:
    from jaxdistill import runtime

    runtime.configure()
    import jax

    from jaxdistill.errors import InputError
    from jaxdistill.flops import forward_flops_per_token, step_flops_per_token
    from jaxdistill.models import load_pretrained

    job |= {"cpu": jax.default_backend() == "cpu"}
    job |= {"repeats": 1 if job["cpu"] else 10}
    try:
        run = job_run(job)
    except InputError as error:
        raise SystemExit(str(error)) from None
    if "rate" in job:
        device = jax.devices()[0]
        return {"rate": matmul_rate(run.settings.dtype), "dtype": run.settings.dtype, "device": device.device_kind, "shapes": shapes(run)}
    _, params = load_pretrained(run.teacher_folder)
    length = run.config.data.sequence_length
    flops = sum(forward_flops_per_token(run.teacher, length, features) for features in run.teacher_passes.values())
    flops += step_flops_per_token(run.students[0], length)
    result = timed_step(run, job, params)
    return result | {"flops_per_token": flops, "without": timed_step(without_losses(run), job, params)["seconds"]}


def job_run(job: dict):
    """The run of a row: one student, its objective the method's."""
    from jaxdistill.config import load_config
    from jaxdistill.resolve import resolve

    config = load_config(job["config"], job["overrides"])
    name = job["student"] or next(iter(config.students))
    if job["method"] != OWN:
        config = load_config(job["config"], job["overrides"], students={name: {"objective": [METHODS[job["method"]]]}})
    run = resolve(config, num_devices=1)
    if name not in run.copied:
        raise SystemExit(f"--student {name}: one of {', '.join(run.copied)}")
    return replace(run, students=tuple(s for s in run.students if s.name == name), copied={name: run.copied[name]})


def shapes(run) -> str:
    (student,) = run.students
    return " -> ".join(f"{c.num_layers} x {c.hidden_size}" for c in (run.teacher, student.config))


# --- the sweep


def in_process(job: dict, folder: Path) -> dict:
    """What a row's process found, or {"failed": why}."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        out, source = Path(cache) / "out.json", Path(cache) / "job.json"
        source.write_text(json.dumps(job))
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, __file__, "--row", str(source), "--out", str(out)]
        finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if finished.returncode == 0:
            return json.loads(out.read_text())
    if finished.returncode == -9 or any(sign in finished.stdout for sign in OUT_OF_MEMORY):
        return {"failed": "out of memory"}
    print(finished.stdout[-4000:], file=sys.stderr, flush=True)
    return {"failed": f"failed: {(finished.stdout.strip().splitlines() or [str(finished.returncode)])[-1]}"}


def row(method: str, batch: int, length: int, found: dict, rate: float) -> str:
    if "failed" in found:
        cells = [found["failed"], *[""] * 6]
    else:
        speed = batch * length / found["seconds"]
        cells = [f"{found['seconds'] * 1e3:.1f}", f"{speed:,.0f}", f"{speed * found['flops_per_token'] / rate:.1%}"]
        cells += [f"{1 - found['without'] / found['seconds']:.1%}", f"{found['memory'] / 1e9:.3g}"]
        cells += [f"{found['cold']:.1f}", f"{found['cached']:.1f}"]
    return f"| {' | '.join((method, str(batch), str(length), *cells))} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of the step: batch x length x method.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the config to change")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", help="a config; its own objective is the method")
    source.add_argument("--teacher", default="bge-small", help="a shape by name (benchmarks/synthetic.py), random weights with an MLM head")
    parser.add_argument("--layers", type=int, default=6, help="of the student of a teacher by name; as wide as the teacher")
    parser.add_argument("--student", help="which of the config's students; default: the first")
    parser.add_argument("--methods", nargs="+", choices=[OWN, *METHODS])
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row; on an accelerator ten times as many")
    parser.add_argument("--patience", type=float, default=60, help="seconds of a row spent on finding undisturbed steps, on a CPU")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # one row, in its own process
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def base_job(options: argparse.Namespace, folder: Path) -> dict:
    job = {"steps": options.steps, "patience": options.patience, "student": options.student, "overrides": options.overrides}
    if options.config:
        return job | {"config": options.config}
    code = (
        "import sys; from pathlib import Path; from synthetic import write_teacher; write_teacher(Path(sys.argv[1]), sys.argv[2], mlm=True)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code, str(folder / "teacher"), options.teacher], env=environment, check=True)
    config = {"teacher": str(folder / "teacher"), "data": {"sources": ["unread.txt"]}, "output": "unwritten"}
    config |= {"students": {"student": {"num_layers": options.layers}}}
    # Attention weights are not dropped: fused attention cannot, where a device has it.
    return job | {"config": config | {"training": {"steps": 1000, "dropout": 0.1, "attention_dropout": 0.0}}}


def main() -> None:
    options = parse()
    if options.row:
        options.out.write_text(json.dumps(run_row(json.loads(options.row.read_text()))))
        return
    methods = options.methods or [OWN if options.config else "minilmv2"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = base_job(options, folder)
        asked = job["overrides"] + [f"training.batch_size={options.batches[0]}", f"data.sequence_length={options.lengths[0]}"]
        start = in_process(job | {"rate": True, "method": methods[0], "overrides": asked}, folder)
        if "failed" in start:
            raise SystemExit(f"the matrix product could not be measured: {start['failed']}")
        print(f"{options.config or options.teacher}: {start['shapes']}, {start['dtype']} on {start['device']}, whose matrix product was")
        print(f"measured at {start['rate'] / 1e12:.3g} TFLOP/s. Python {platform.python_version()}, jax {version('jax')}.")
        print(f"`{shlex.join(['python', f'benchmarks/{Path(__file__).name}', *sys.argv[1:]])}`\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
        for method in methods:
            for length in options.lengths:
                for batch in options.batches:
                    asked = [*job["overrides"], f"training.batch_size={batch}", f"data.sequence_length={length}"]
                    found = in_process(job | {"method": method, "overrides": asked}, folder)
                    print(row(method, batch, length, found, start["rate"]), flush=True)


if __name__ == "__main__":
    main()
