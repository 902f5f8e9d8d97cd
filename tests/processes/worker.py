"""One of several processes: does the jobs of a JSON file one after the other and writes what came of them.

A job is a config; {"config": ..., "until": STEP}: everybody stops after the checkpoint of that step, as if all were killed;
{"export": RUN, "to": FOLDER}; {"rows": config}; or "exchange".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["torch"] = None  # transformers would import it, which takes longer than everything else together

import jax
import numpy as np

from jaxdistill import processes
from jaxdistill.batches import training_batches
from jaxdistill.card import Published
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.config import load_config
from jaxdistill.distill import distill
from jaxdistill.export import export_checkpoint
from jaxdistill.resolve import resolve, resolve_stages
from jaxdistill.text import prepare_text


class Stopped(Exception):
    pass


def distil(config: dict, until: int | None = None) -> dict | None:
    """Records and parameters of a run."""
    save = Checkpoints.save

    def save_and_stop(self, step, *arguments):
        save(self, step, *arguments)
        if step == until:
            raise Stopped

    Checkpoints.save = save_and_stop
    try:
        done = distill(config)
    except Stopped:
        return None
    finally:
        Checkpoints.save = save
    return {"history": done.history, "sums": [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(done.students["small"][1])]}


def rows_of_mixed_devices(config: dict) -> list:
    """Of each own device, the rows of the first batch on a mesh in which the devices of the processes alternate."""
    run = resolve(load_config(config))
    per_process = jax.local_device_count()
    devices = [jax.devices()[process * per_process + i] for i in range(per_process) for process in range(jax.process_count())]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 1, 1), ("data", "fsdp", "tensor"))
    batch = next(training_batches(run, prepare_text(run, None), mesh, 0))
    return [[shard.index[1].start or 0, np.asarray(shard.data).tolist()] for shard in batch["input_ids"].addressable_shards]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("results", type=Path)
    for flag, kind in (("coordinator", str), ("processes", int), ("process", int)):
        parser.add_argument(f"--{flag}", type=kind)
    options = vars(parser.parse_args())
    jobs, results = json.loads(options.pop("jobs").read_text()), options.pop("results")
    found: dict = {}
    with processes.joined(**options):
        for name, job in jobs.items():
            if job == "exchange":
                found[name] = [processes.from_main(processes.index()), processes.gathered({"number": processes.index()})]
            elif "export" in job:
                runs = resolve_stages(load_config(job["export"], ["mesh={}"]), num_devices=1)
                what = {"step": None, "dtype": "float32", "overwrite": False, "publish": lambda *_: Published()}
                targets = {"small": Path(job["to"]) / "small"}
                found[name] = [str(path) for path in export_checkpoint(Path(job["export"]), runs, targets, **what)]
            elif "rows" in job:
                found[name] = rows_of_mixed_devices(job["rows"])
            else:
                found[name] = distil(job.get("config", job), job.get("until"))
        found |= {"devices": jax.device_count(), "main": processes.is_main()}
        (results / f"{processes.index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
