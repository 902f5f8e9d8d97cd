"""Fine-tuning on a CPU against the Hugging Face Trainer: the same scores, and how much faster. Prints Markdown for docs/log.md.

    python benchmarks/finetune_against_trainer.py MODEL --data FOLDER --learning-rate 1e-4 --epochs 2 --train-limit 1500

MODEL is a folder or a Hub id, FOLDER holds GLUE (rte/train-*.parquet). Same rows, hyperparameters and number of threads: AdamW without
weight decay, linear decay without warmup, gradients clipped at norm 1, the model's own dropout, float32; the Trainer pads each batch to
its longest example. Each side has a process of its own; they train in turns, never at the same time, and by turns go first. Timed is
the training alone: no loading, no tokenising, no scoring, nothing logged or saved.

"Without compiling" counts every step as long as the mean of those during which nothing was compiled. OMP_WAIT_POLICY is passive unless
it is set from outside: OpenMP's threads would spin until they are preempted where other processes use the cores, and PyTorch be slower
by several times (8 steps of CoLA beside one other process: 37 s, passive 9 s). With --output every finished training is written at once,
and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from step_against_pytorch import machine
from timing import busy_seconds

SIDES = ("jaxdistill", "Trainer")


@contextmanager
def measured(result: dict) -> Iterator[None]:
    """Adds seconds, the CPU seconds of this process, and the share of the cores that other processes used meanwhile."""
    (busy, total), own, start = busy_seconds(), time.process_time(), time.perf_counter()
    yield
    result["seconds"], own = time.perf_counter() - start, time.process_time() - own
    after, total_after = busy_seconds()
    result |= {"cpu_seconds": own, "others": max(after - busy - own, 0.0) / max(total_after - total, 1e-9)}


# --- jaxdistill, in its own process


@cache
def compilations() -> list[float]:
    """When something had been traced or compiled; grows."""
    import jax

    times: list[float] = []

    def note(event: str, duration: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            times.append(time.perf_counter())

    jax.monitoring.register_event_duration_secs_listener(note)
    return times


@cache
def jax_trainer(options: str, task: str):
    from jaxdistill import runtime
    from jaxdistill.finetune import read_task, resolve_models, task_data, trainer_of
    from jaxdistill.models import load_pretrained
    from jaxdistill.tasks import TASKS

    runtime.configure()
    config = evaluation(json.loads(options))
    model = resolve_models(config)[0]
    data = task_data(read_task(TASKS[task], config), model, config)
    return trainer_of(model, load_pretrained(model.folder), data, config)


def train_jax(options: str, task: str, seed: int) -> dict:
    """One training: times, and logits of the dev set."""
    import jax

    from jaxdistill.finetune import Training

    trainer, compiled, values = jax_trainer(options, task), compilations(), json.loads(options)
    compiled.clear()
    cell, result = Training(values["learning_rate"], values["batch_size"], values["epochs"], seed), {}
    ticks = [time.perf_counter()]
    with measured(result):
        params = trainer.train([cell], None, lambda step, loss: ticks.append(time.perf_counter()))
        jax.block_until_ready(params)
        ticks.append(time.perf_counter())
    counts, _ = np.histogram(compiled, ticks)
    steps = np.diff(ticks)
    assert len(steps) == trainer.num_steps(cell)
    logits = trainer.logits(params, trainer.data.dev)
    warm = float(steps[counts == 0].mean()) * len(steps)
    return result | {"steps": len(steps), "without_compiling": warm, "compiled_in_steps": int((counts > 0).sum()), "logits": logits}


# --- the Trainer, in its own process, without this package


_first_steps_done: list[bool] = []


def train_torch(options: str, rows: dict, folder: str, seed: int) -> dict:
    """One training as most users write it: times, and logits of the dev set."""
    import datasets
    import torch
    import transformers

    values = json.loads(options)
    torch.set_num_threads(values["threads"])
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(values["model"])

    transformers.utils.logging.disable_progress_bar()

    def encoded(split: str) -> datasets.Dataset:
        texts, labels = rows[split]
        return datasets.Dataset.from_dict(dict(tokenizer(*texts, truncation=True, max_length=values["max_length"])) | {"labels": labels})

    def create(**changes) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            output_dir=folder, learning_rate=values["learning_rate"], per_device_train_batch_size=values["batch_size"],
            per_device_eval_batch_size=64, num_train_epochs=values["epochs"], lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0,
            adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0, seed=seed, use_cpu=True, logging_strategy="no",
            save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **changes,
        )  # fmt: skip
        transformers.set_seed(seed)  # of the new head
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            values["model"], num_labels=rows["num_labels"], dtype=torch.float32
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(model, arguments, collator, encoded("train"), processing_class=tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    if not _first_steps_done:  # what is imported and set up at the first step is left out, as compiling is
        create(max_steps=2).train()
        _first_steps_done.append(True)
    trainer, result = create(), {}
    with measured(result):
        trainer.train()
    return result | {"steps": trainer.state.global_step, "logits": trainer.predict(encoded("dev")).predictions}


# --- both sides in turns


def evaluation(values: dict):
    from jaxdistill.config.evaluation import EvaluationConfig

    protocol = {"train_limit": values["train_limit"], "max_length": values["max_length"], "epochs": values["epochs"]}
    return EvaluationConfig(models=(values["model"],), data=values["data"], precision="float32", protocol=protocol)


def plain_rows(task: str, values: dict) -> dict:
    """The rows that jaxdistill trains on and is scored on, as lists."""
    from jaxdistill.finetune import read_task
    from jaxdistill.tasks import TASKS

    found = read_task(TASKS[task], evaluation(values))
    train, dev = found.train.sample(values["train_limit"] or len(found.train)), found.tests[next(iter(found.tests))]
    return {"num_labels": TASKS[task].num_labels} | {
        split: (list(rows.texts), rows.labels.tolist()) for split, rows in (("train", train), ("dev", dev))
    }


def compare(values: dict, tasks: list[str], seeds: int, output: Path | None) -> dict:
    """Every training that is not in the output file yet; returns what is in it then."""
    from jaxdistill.tasks import TASKS, score

    record = {"settings": values, "machine": machine(values["threads"]), "runs": []}
    if output and output.exists():
        known = json.loads(output.read_text())
        if known["settings"] != values:
            raise SystemExit(f"{output}: holds runs with {known['settings']}, now it is {values}; give another --output")
        record["runs"] = known["runs"]
    done = {(run["task"], run["seed"], run["side"]) for run in record["runs"]}
    spawn, options = multiprocessing.get_context("spawn"), json.dumps(values)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
        for task in tasks:
            rows = plain_rows(task, values)
            for seed in range(seeds):
                for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
                    if (task, seed, side) in done:
                        continue
                    if side == SIDES[0]:
                        result = ours.submit(train_jax, options, task, seed).result()
                    else:
                        result = theirs.submit(train_torch, options, rows, folder, seed).result()
                    result["scores"] = score(TASKS[task], result.pop("logits"), np.asarray(rows["dev"][1]))
                    record["runs"].append({"task": task, "seed": seed, "side": side} | result)
                    if output:
                        output.write_text(json.dumps(record, indent=1))
                    numbers = " ".join(f"{metric} {100 * value:.1f}" for metric, value in result["scores"].items())
                    took = f"{result['seconds']:.0f} s, others used {result['others']:.0%} of the cores"
                    print(f"{task} seed {seed} {side}: {numbers} ({took})", file=sys.stderr, flush=True)
    return record


def table(record: dict, tasks: list[str]) -> list[str]:
    """A line for each task. `apart`: the difference of the means in units of the larger standard deviation."""
    from jaxdistill.tasks import TASKS

    lines = [
        "| task | steps | jaxdistill | Trainer | apart | jaxdistill, s | without compiling | Trainer, s | faster by | without compiling |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    total = np.zeros(3)
    for name in tasks:
        task = TASKS[name]
        ours, theirs = ([run for run in record["runs"] if (run["task"], run["side"]) == (name, side)] for side in SIDES)
        scores = [[100 * run["scores"][task.metrics[0]] for run in runs] for runs in (ours, theirs)]
        shown, apart = [f"{mean(values):.1f}" for values in scores], ""
        if len(ours) > 1:
            deviations = [stdev(values) for values in scores]
            shown = [f"{text} ± {deviation:.1f}" for text, deviation in zip(shown, deviations, strict=True)]
            apart = f"{(mean(scores[0]) - mean(scores[1])) / max(*deviations, 1e-9):+.1f} sd"
        each = (("seconds", ours), ("without_compiling", ours), ("seconds", theirs))
        seconds = np.array([mean(run[field] for run in runs) for field, runs in each])
        total += seconds
        steps = f"{ours[0]['steps']} x {record['settings']['batch_size']}"
        lines.append(f"| {task.title} {task.metrics[0]} | {steps} | {' | '.join(shown)} | {apart} | {times(seconds)} |")
    return [*lines, f"| all | | | | | {times(total)} |"]


def times(seconds: np.ndarray) -> str:
    ratios = [f"{seconds[2] / seconds[i]:.2f}" for i in (0, 1)]
    return " | ".join([f"{seconds[0]:.1f}", f"{seconds[1]:.1f}", f"{seconds[2]:.1f}", *ratios])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tuning on a CPU against the Hugging Face Trainer.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", required=True, help="folder of GLUE in the layout of the Hub's dataset")
    parser.add_argument("--tasks", nargs="+", default=["rte", "mrpc", "cola", "stsb"])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--train-limit", type=int, help="examples to train on, the same random ones for both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file of every training")
    options = parser.parse_args()
    if options.threads > len(cores := sorted(os.sched_getaffinity(0))):
        parser.error(f"--threads {options.threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[: options.threads])  # what XLA takes as the number of its threads; children inherit it
    return options


def main() -> None:
    options = parse()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "OMP_NUM_THREADS": str(options.threads)}
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    fields = ("model", "data", "epochs", "learning_rate", "batch_size", "max_length", "train_limit", "threads")
    values = {field: getattr(options, field) for field in fields}
    record = compare(values, options.tasks, options.seeds, options.output)
    others = {side: mean(run["others"] for run in record["runs"] if run["side"] == side) for side in SIDES}
    print(
        f"{Path(options.model).parent.name}/{Path(options.model).name}, learning rate {options.learning_rate:g}, {options.epochs} epochs,"
    )
    print(f"batch {options.batch_size}, {options.max_length} tokens, seeds 0 to {options.seeds - 1}. {record['machine']}.")
    print("Other processes used " + ", ".join(f"{share:.0%} of the cores beside {side}" for side, share in others.items()) + ".\n")
    print(*table(record, options.tasks), sep="\n")


if __name__ == "__main__":
    main()
