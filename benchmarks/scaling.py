"""How a step grows from one chip to hundreds, by the compiler of chips that need not be here. Prints Markdown.

    pip install '.[tpu]'  &&  python benchmarks/scaling.py                                  # v5e of 1, 16, 64, 256 chips; v5p of 4 and 64
    python benchmarks/scaling.py v5e:16x16 --meshes fsdp tensor                             # other meshes than data

The job: BERT-base's shape (random weights), read at layer 11, to 6 x 768 by MiniLMv2 with R 48; bfloat16, no dropout, the same 64 rows of
128 tokens on every chip. Of the teacher no more than the shape is read.

"memory": arguments of the step, and its temporaries, on one chip. "sent": bytes of the collectives that one chip sends in a step, at
the least that any algorithm needs (2 (n - 1) / n of an all-reduce's arrays). "computes": the compiler's own cycles and what own kernels
declare. "sends": those bytes over all of the chip's links at their published rate, then over a single one in one direction; collectives
of a large torus lie between. "efficiency": computing over computing and sending one after the other, with all links and with a single
one; what the compiler overlaps makes it better. Hops add to that about a microsecond each, of which a ring over a side of 16 has 15.

Of a data mesh it is an error if the program holds anything but all-reduces, or if chips of one kind differ in memory by over 1 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

from synthetic import write_teacher

from jaxdistill.config import load_config
from jaxdistill.plan import parse_topology, stay_on_the_host
from jaxdistill.plan.ahead import devices_of
from jaxdistill.plan.compiled import CompiledStep, compile_run
from jaxdistill.plan.estimate import flops_per_token, tokens_per_step
from jaxdistill.plan.tables import compiler_seconds
from jaxdistill.plan.topology import Topology
from jaxdistill.resolve import Run, resolve

TOPOLOGIES = ("v5e:1x1", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4")
MESHES = {"data": {}, "fsdp": {"data": 1, "fsdp": -1}, "tensor": {"data": -1, "tensor": 4}}
COLUMNS = (
    "chips", "mesh", "memory, GB", "collectives", "sent, MB", "TFLOP", "FLOP a byte sent", "computes, ms", "sends, ms", "efficiency, %",
    "compiled in s",
)  # fmt: skip


def job(teacher: Path, topology: Topology, mesh: str, rows: int, length: int, overrides: list[str]) -> Run:
    tensor = MESHES[mesh].get("tensor", 1)
    fields = {
        "teacher": str(teacher),
        "data": {"sources": [str(teacher / "no-text.txt")], "sequence_length": length},
        "students": {"student": {"num_layers": 6, "hidden_size": 768, "num_heads": 12}},
        "objective": [{"kind": "relation_kl", "relation_heads": 48, "layer_map": {"strategy": "teacher_layer", "teacher_layer": -2}}],
        "training": {"steps": 1000, "batch_size": rows * topology.num_devices // tensor, "dropout": 0.0},
        "mesh": MESHES[mesh],
        "output": str(teacher / "run"),
    }
    return resolve(load_config(fields, overrides), num_devices=topology.num_devices, platform="tpu")


def row(run: Run, topology: Topology, mesh: str, step: CompiledStep) -> tuple[str, ...]:
    chip, devices = topology.chip, topology.num_devices
    together = [c for c in step.program.collectives if c.group > 1]
    counts = {kind: sum(c.times for c in together if c.kind == kind) for kind in sorted({c.kind for c in together})}
    sent = step.program.sent
    flops = sum(flops_per_token(run).values()) * tokens_per_step(run) / devices
    computes = compiler_seconds(chip, step.program)
    sends = (sent / chip.interconnect, sent / (chip.interconnect / (2 * chip.dimensions)))
    return (
        topology.name,
        mesh,
        f"{step.memory.arguments / 1e9:.3f} + {step.memory.temporaries / 1e9:.3f}",
        ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none",
        f"{sent / 1e6:.1f}",
        f"{flops / 1e12:.2f}",
        f"{flops / sent:,.0f}" if sent else "-",
        f"{computes * 1e3:.2f}",
        " to ".join(f"{seconds * 1e3:.2f}" for seconds in sends) if sent else "0",
        " to ".join(f"{100 * computes / (computes + seconds):.1f}" for seconds in reversed(sends)) if sent else "100",
        f"{step.seconds:.0f}",
    )


def wrong(memory: dict[str, dict[str, float]], kinds: set[str]) -> list[str]:
    """What a data mesh must not show."""
    found = [f"data: the program holds {', '.join(sorted(kinds - {'all-reduce'}))}"] if kinds - {"all-reduce"} else []
    for chip, sizes in memory.items():
        few, many = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
        if sizes[many] > 1.01 * sizes[few]:
            found.append(f"data: a {chip} holds {sizes[few] / 1e9:.3f} GB in {few} and {sizes[many] / 1e9:.3f} GB in {many}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", default=TOPOLOGIES, metavar="TOPOLOGY", help="as for `jaxdistill plan`, of TPUs")
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=["data"])
    parser.add_argument("--shape", default="64x128", metavar="ROWSxLENGTH", help="of a chip")
    parser.add_argument("--teacher", default="bert-base", help="a shape of synthetic.py, or the folder of a model")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the config")
    options = parser.parse_args()
    topologies = [parse_topology(name) for name in options.topologies]
    rows, length = map(int, options.shape.split("x"))
    stay_on_the_host(topologies[0].chip)
    memory: dict[str, dict[str, float]] = {}
    kinds: set[str] = set()
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(options.teacher) if Path(options.teacher).is_dir() else write_teacher(Path(folder), options.teacher)
        for topology in topologies:
            devices = devices_of(topology)
            for mesh in options.meshes:
                if mesh != "data" and math.prod(topology.shape) == 1:
                    continue
                run = job(teacher, topology, mesh, rows, length, options.set)
                step = compile_run(run, devices)
                print(f"| {' | '.join(row(run, topology, mesh, step))} |", flush=True)
                if mesh == "data" and len(devices) > 1:
                    memory.setdefault(topology.chip.name, {})[topology.name] = step.memory.arguments + step.memory.temporaries
                    kinds |= {c.kind for c in step.program.collectives if c.group > 1}
    if found := wrong(memory, kinds):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
