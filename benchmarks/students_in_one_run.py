"""What several students in one run cost against as many runs: one step timed for 1, 2, 4, 8 students on one teacher pass.

    python benchmarks/students_in_one_run.py --teacher FOLDER [--students 1 2 4 8] [--layers 3] [--steps 8]

Every student is a 3-layer one of the teacher's width and its own objective in turn (MiniLMv2 of the last three teacher layers, hidden
states, attention scores), random tokens, float32 on a CPU. "apart" is the sum of the same students' own steps, each compiled and
timed alone in the same process, in turns with the joint step, so that a slower machine slows both.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import jax
import numpy as np

from jaxdistill import runtime
from jaxdistill.config import load_config
from jaxdistill.models import load_pretrained
from jaxdistill.report import markdown_table
from jaxdistill.resolve import Run, resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import compile_step, initial_state, place_teacher

OBJECTIVES = (
    {"layer_map": {"strategy": "teacher_layer", "teacher_layer": -2}},
    {"kind": "hidden_mse", "layer_map": "uniform"},
    {"kind": "attention_mse"},
    {"layer_map": "last_layer"},
)


class Timed:
    """A compiled step that goes on from its own state."""

    def __init__(self, run: Run, params: dict, mesh, batch: dict):
        self.teacher = place_teacher(run, params, mesh)
        self.state = jax.jit(lambda p: initial_state(run, p))(params)
        started = time.perf_counter()
        self.step, self.batch = compile_step(run, self.state, self.teacher, batch), batch
        self.compiled = time.perf_counter() - started
        self.seconds: list[float] = []
        self.once()
        self.seconds.clear()  # the first one touches its memory

    def once(self) -> None:
        started = time.perf_counter()
        self.state, metrics = self.step(self.state, self.teacher, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - started)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def alone(run: Run, name: str) -> Run:
    student = next(s for s in run.students if s.name == name)
    return replace(run, students=(student,), copied={name: run.copied[name]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a BERT or RoBERTa folder, or a Hub id")
    parser.add_argument("--students", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    runtime.configure()
    names = [f"student-{i}" for i in range(max(options.students))]
    config = load_config(
        teacher=options.teacher,
        data={"sources": ["unread.txt"], "sequence_length": options.length},
        students={name: {"num_layers": options.layers, "objective": [OBJECTIVES[i % 4]]} for i, name in enumerate(names)},
        training={"batch_size": options.rows, "steps": 1000},
        output="unwritten",
    )
    run = resolve(config, num_devices=1)
    _, params = load_pretrained(run.teacher_folder)
    mesh = create_mesh(run.config.mesh, jax.devices()[:1])
    shape = (1, options.rows, options.length)
    ids = np.random.default_rng(0).integers(1000, run.tokenizer.vocab_size, shape, np.int32)
    tokens, rows = ids.size, []
    with jax.set_mesh(mesh):
        batch = jax.device_put({"input_ids": ids, "segment_ids": np.ones(shape, np.int32)})
        single = {name: Timed(alone(run, name), params, mesh, batch) for name in names[:4]}  # the others repeat these
        for count in options.students:
            joint = Timed(replace(run, students=run.students[:count]), params, mesh, batch)
            for timed in single.values():
                timed.seconds.clear()
            for _ in range(options.steps):
                joint.once()
                for name in names[: min(count, 4)]:
                    single[name].once()
            apart = sum(single[names[i % 4]].median for i in range(count))
            speed = f"{tokens / joint.median:,.0f}", f"{tokens / apart:,.0f}"
            times = f"{joint.median * 1e3:,.0f}", f"{apart * 1e3:,.0f}", f"{apart / joint.median:.2f}"
            rows.append((count, *times, *speed, f"{joint.compiled:.1f}"))
            print(f"{count} students: {times}", flush=True)
    columns = ("students", "one run, ms a step", "apart, ms", "apart / one run", "one run, tokens/s", "apart, tokens/s", "compiled in s")
    print(markdown_table(rows, columns), end="")


if __name__ == "__main__":
    main()
