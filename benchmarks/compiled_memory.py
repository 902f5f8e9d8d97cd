"""Memory and time of the real step, by the compiler of a TPU or GPU that need not be here. Prints Markdown.

    pip install '.[tpu]'      &&  python benchmarks/compiled_memory.py                          # v5e:4x4
    pip install '.[cuda13]'   &&  python benchmarks/compiled_memory.py --topology h200
    python benchmarks/compiled_memory.py --job vocabulary                                       # OD from 250,002 pieces

relations: BERT-base's shape, read at layer 11, to 6 x 768; R 48, bfloat16, no dropout, no rematerialisation. The plain losses (S x S
matrices), what `kernels.relations: auto` picks, and the same step without them: the same encoders to the same layers, queries, keys
and values still computed, compared number by number through DirectMiniLM's projections.
vocabulary: XLM-R-base's shape with its MLM head to 6 x 768 by `output_kl`, every position counted.
Of the teacher, whose weights are random, no more than the shape is read.

Time is the TPU compiler's own cycles, loops as often as they run, and beside it what own kernels declare (`pl.CostEstimate`: products,
exponentials and bytes, the longest of the three), since the compiler counts nothing for them. That is a lower bound: units that wait
for one another are not in it. The schedule that LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true" leaves
(*relation_kl*final_bundles*, loops times their trips) is 5.4 ms for the relations at 16 x 512 on a v5e and 2.1 ms at 64 x 128.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from synthetic import write_teacher

from jaxdistill.config import load_config
from jaxdistill.plan import parse_topology, stay_on_the_host
from jaxdistill.plan.ahead import devices_of
from jaxdistill.plan.compiled import DoesNotFitError, compile_run
from jaxdistill.plan.tables import compiler_seconds
from jaxdistill.resolve import resolve

LAYER_11 = {"relation_heads": 48, "layer_map": {"strategy": "teacher_layer", "teacher_layer": 11}}


@dataclass(frozen=True)
class Job:
    teacher: str  # its shape, of `synthetic.py`
    forms: dict[str, tuple[dict, dict]]  # name -> (term, kernels)
    shapes: dict[str, tuple[tuple[int, int], ...]]  # kind of the devices -> rows x length of each


JOBS = {
    "relations": Job(
        "bert-base",
        {
            "plain": ({"kind": "relation_kl"} | LAYER_11, {"relations": "plain"}),
            "auto": ({"kind": "relation_kl"} | LAYER_11, {}),
            "without": ({"kind": "direct_mse"} | LAYER_11, {}),
        },
        {"tpu": ((16, 512), (64, 128)), "gpu": ((32, 512), (128, 128))},
    ),
    "vocabulary": Job(
        "xlmr-base",
        {"plain": ({"kind": "output_kl"}, {"logits": "plain"}), "auto": ({"kind": "output_kl"}, {})},
        {"tpu": ((32, 256),), "gpu": ((32, 256),)},
    ),
}


def row(job: Job, form: str, rows: int, length: int, layers: int, teacher: Path, topology, devices, overrides: list[str]) -> str:
    term, kernels = job.forms[form]
    if "layer_map" in term:
        term = term | {"layer_map": term["layer_map"] | {"teacher_layer": 2 * layers - 1}}
    fields = {
        "teacher": str(teacher),
        "data": {"sources": [str(teacher / "no-text.txt")], "sequence_length": length},
        "students": {"student": {"num_layers": layers, "hidden_size": 768, "num_heads": 12}},
        "objective": [term],
        "training": {"steps": 1000, "batch_size": rows * len(devices), "dropout": 0.0},
        "kernels": kernels,
        "output": str(teacher / "run"),
    }
    run = resolve(load_config(fields, overrides), num_devices=len(devices), platform=topology.chip.platform)
    try:
        step = compile_run(run, devices)
    except DoesNotFitError as error:
        return f"| {rows} x {length} | {form} | {error} | | | |"
    total = compiler_seconds(topology.chip, step.program)
    cycles = step.program.total_cycles / topology.chip.clock if total else None
    times = f"{cycles * 1e3:.2f} | {(total - cycles) * 1e3:.2f}" if total else "- | -"
    return f"| {rows} x {length} | {form} | {step.memory.temporaries / 1e9:.2f} | {times} | {step.seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="as for `jaxdistill plan`")
    parser.add_argument("--job", choices=JOBS, default="relations")
    parser.add_argument("--forms", nargs="+", help="of the job; default: all")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxLENGTH", help="of a device; default: the job's")
    parser.add_argument("--layers", type=int, default=6, help="of the student; the teacher is read at twice as many less one")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the config, such as kernels.relations=attend")
    options = parser.parse_args()
    job, topology = JOBS[options.job], parse_topology(options.topology)
    if unknown := [form for form in options.forms or () if form not in job.forms]:
        parser.error(f"--forms: {options.job} has {', '.join(job.forms)}, not {unknown[0]}")
    stay_on_the_host(topology.chip)
    devices = devices_of(topology)
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes] if options.shapes else job.shapes[topology.chip.platform]
    print(f"{options.topology}, {options.job}\n")
    print("| rows x length | form | temporaries, GB | compiler's cycles, ms | own kernels declare, ms | compiled in s |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_teacher(Path(folder), job.teacher, mlm=options.job == "vocabulary")
        for rows, length in shapes:
            for form in options.forms or job.forms:
                print(row(job, form, rows, length, options.layers, Path(folder), topology, devices, options.overrides), flush=True)


if __name__ == "__main__":
    main()
