"""What real data costs a training step: the loop on the token store against the loop on one fixed batch.

    python benchmarks/input_pipeline.py CONFIG [key=value ...]

Takes the config's teacher, text and first students, trains `--steps` steps each way in alternation, and prints the median step
times and their ratio. The output folder of the config is not touched; its token store is made if it is not there.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax

from jaxdistill import runtime
from jaxdistill.batches import training_batches
from jaxdistill.config import load_config
from jaxdistill.data import prepare
from jaxdistill.models import load_pretrained
from jaxdistill.resolve import resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state, compile_step, initial_state, place_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=10, help="of one round")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    runtime.configure()
    run = resolve(load_config(arguments.config, arguments.overrides))
    store = prepare(run.config.data, tokenizer=run.tokenizer, store=run.store)
    mesh = create_mesh(run.config.mesh)
    _, params = load_pretrained(run.teacher_folder)
    times: dict[str, list[float]] = {"fixed": [], "data": []}
    with jax.set_mesh(mesh):
        like = abstract_state(run, params, mesh)
        state = jax.jit(lambda p: initial_state(run, p), out_shardings=jax.tree.map(lambda x: x.sharding, like))(params)
        teacher = place_teacher(run, params, mesh)
        batches = training_batches(run, store, mesh, 0)
        fixed = next(batches)
        step = compile_step(run, state, teacher, fixed)
        for _ in range(2):
            state, metrics = step(state, teacher, fixed)
        jax.block_until_ready(metrics)
        for _ in range(arguments.rounds):
            for name in times:
                for _ in range(arguments.steps):
                    start = time.perf_counter()
                    batch = fixed if name == "fixed" else next(batches)
                    state, metrics = step(state, teacher, batch)
                    jax.block_until_ready(metrics)
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = run.config.training.batch_size * run.config.data.sequence_length
    for name, median in medians.items():
        print(f"{name:6} {1000 * median:8.1f} ms a step, {tokens / median:10,.0f} tokens/s")
    print(f"ratio  {medians['data'] / medians['fixed']:8.3f}")


if __name__ == "__main__":
    main()
