"""The step that `jaxdistill distill` runs, for a job that `step_against_pytorch.py` has written; in a process of its own."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxdistill import runtime

runtime.configure()

import jax  # noqa: E402
from timing import measure, peak_resident_bytes  # noqa: E402

from jaxdistill.config import load_config  # noqa: E402
from jaxdistill.models import load_pretrained  # noqa: E402
from jaxdistill.objective import loss  # noqa: E402
from jaxdistill.resolve import Run, resolve  # noqa: E402
from jaxdistill.sharding import batch_sharding, create_mesh  # noqa: E402
from jaxdistill.state import compile_step, initial_state, place_teacher  # noqa: E402


def one_student(run: Run, name: str) -> Run:
    student = next(s for s in run.students if s.name == name)
    return replace(run, students=(student,), copied={name: run.copied[name]})


def job_run(job: dict, overrides: tuple[str, ...] = ()) -> Run:
    run = resolve(load_config(job["config"], [*job["overrides"], *overrides]), num_devices=1)
    return one_student(run, job["student_name"])


def run_step(job: dict, folder: Path, check: bool) -> dict:
    name = job["student_name"]
    run = job_run(job, ("training.dropout=0", "training.attention_dropout=0") if check else ())
    mesh = create_mesh(run.config.mesh, jax.devices()[:1])
    arrays = np.load(folder / ("padded.npz" if check else "full.npz"))
    _, params = load_pretrained(run.teacher_folder)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda p: initial_state(run, p))(params)
        trained = {"params": load_pretrained(job["student"])[1], "projections": {}}
        state.students[name].trained = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), trained, state.students[name].trained)
        teacher = place_teacher(run, params, mesh)
        batch = {"input_ids": arrays["input_ids"][None], "segment_ids": arrays["attention_mask"][None]}
        batch = jax.device_put(batch, batch_sharding(mesh))
        del params
        start = time.perf_counter()
        compiled = compile_step(run, state, teacher, batch)
        seconds = time.perf_counter() - start
    metrics = None

    def step() -> None:
        nonlocal state, metrics
        state, metrics = compiled(state, teacher, batch)

    def update() -> tuple[float, float]:
        step()
        own, terms = jax.device_get(metrics)["students"][name], run.students[0].terms
        sums, counts = ({part: values[i] for part, values in own["parts"].items()} for i in (0, 1))
        return float(loss(terms, sums, counts, 0)), float(own["gradient_norm"])

    if check:
        return {"updates": [update() for _ in range(3)]}
    result = measure(step, lambda: jax.block_until_ready((state, metrics)), job)
    result["first"] += seconds
    device = jax.devices()[0]
    stats, gpu = device.memory_stats() or {}, device.device_kind if device.platform == "gpu" else ""
    return result | {"compiled": seconds, "gpu": gpu, "memory": stats.get("peak_bytes_in_use") or peak_resident_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description="One side of step_against_pytorch.py.")
    parser.add_argument("job", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    job = json.loads((options.job / "job.json").read_text())
    options.out.write_text(json.dumps(run_step(job, options.job, options.check)))


if __name__ == "__main__":
    main()
