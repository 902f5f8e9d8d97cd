"""Memory and cycles of the step with relation losses, by the compiler of a TPU or GPU that need not be here.

    pip install '.[tpu]'      &&  python benchmarks/compiled_memory.py --device v5e
    pip install '.[cuda13]'   &&  python benchmarks/compiled_memory.py --device h200 --target-config h200.txtpb

One table: temporaries per chip for the plain losses (S x S matrices), for what `kernels.relations: auto` picks, and for the same
step without them: the same encoders to the same layers, queries, keys and values still computed, compared number by number through
DirectMiniLM's small projections. The teacher has BERT-base's shape (a folder of its own is written, without weights) and is read at
layer 11, the student is 6 x 768; R 48, bfloat16, no dropout, no rematerialisation.

Cycles are the TPU compiler's own estimates, bodies of loops times their trips. Pallas kernels have none: what they say of their
products, exponentials and bytes (`pl.CostEstimate`) is divided by what a v5e does in a cycle, once as if the units worked at the
same time and once as if each waited for the others. Neither counts vector operations and latencies, so the truth is higher: the
schedule that LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true" leaves (*relation_kl*final_bundles*, loops times
their trips) is about 5.4 ms at 16 x 512 and 2.1 ms at 64 x 128.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path

STEPS = {
    "plain": (["kernels.relations=plain"], "relation_kl"),
    "auto": ([], "relation_kl"),
    "without": ([], "direct_mse"),
}
SHAPES = {"v5e": ((16, 512), (64, 128)), "h200": ((32, 512), (128, 128))}  # rows x length, per chip
# Of a v5e in one cycle of 1.5 GHz: operations of four 128 x 128 matrix units, exponentials of one register, bytes of the memory.
PER_CYCLE = {"flops": 2 * 4 * 128 * 128, "transcendentals": 8 * 128, "bytes_accessed": 819e9 / 1.5e9}


def write_teacher(folder: Path) -> Path:
    """A folder of BERT-base's shape: config, tokenizer of as many words, no weights."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 30522}
    shape |= {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    words = [*special.values(), *(f"w{number}" for number in range(shape["vocab_size"] - len(special)))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape | {"model_type": "bert", "architectures": ["BertModel"]}), encoding="utf-8")
    save_file({}, folder / "model.safetensors")
    return folder


def cycles(text: str) -> tuple[int, float, float]:
    """Of a compiled step: the compiler's estimates; what own kernels add, their units together and in turn."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if started := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = bodies.setdefault(started[2], [])
            entry = started[2] if started[1] else entry
        elif line.startswith(" "):
            current.append(line)

    def of(name: str) -> tuple[int, float, float]:
        total = (0, 0.0, 0.0)
        for line in bodies.get(name, ()):
            add = (sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line))), 0.0, 0.0)
            if '"cost_estimate"' in line and "tpu_custom_call" in line:
                spent = [int(re.search(rf'"{kind}":"(\d+)"', line)[1]) / rate for kind, rate in PER_CYCLE.items()]
                add = (0, max(spent), sum(spent))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            if body := re.search(r"\bwhile\(.*body=%?([\w.\-]+)", line):
                add = tuple(int(trips[1] if trips else 1) * x for x in of(body[1]))
            elif branches := re.search(r"\bconditional\(.*branch_computations=\{([^}]*)\}", line):
                add = max((of(branch.strip(" %")) for branch in branches[1].split(",")), key=sum)
            elif branches := re.search(r"\bconditional\(.*true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)", line):
                add = max(of(branches[1]), of(branches[2]), key=sum)
            elif called := re.search(r"\b(?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)", line):
                add = tuple(map(sum, zip(add, of(called[1]), strict=True)))
            total = tuple(map(sum, zip(total, add, strict=True)))
        return total

    return of(entry)


def compile_step(teacher: Path, devices, platform: str, kind: str, rows: int, length: int, layers: int, more: list[str]):
    from jaxdistill.config import load_config
    from jaxdistill.plan import compile_ahead
    from jaxdistill.resolve import resolve

    overrides, objective = STEPS[kind]
    fields = {
        "teacher": str(teacher),
        "data": {"sources": ["none.jsonl"], "sequence_length": length},
        "students": {"student": {"num_layers": layers, "hidden_size": 768, "num_heads": 12}},
        "objective": [
            {"kind": objective, "relation_heads": 48, "layer_map": {"strategy": "teacher_layer", "teacher_layer": 2 * layers - 1}}
        ],
        "training": {"steps": 1000, "batch_size": rows * len(devices), "dropout": 0.0},
        "output": str(teacher / "run"),
    }
    run = resolve(load_config(fields, [*overrides, *more]), num_devices=len(devices), platform=platform)
    start = time.perf_counter()
    return compile_ahead(run, devices), time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="v5e")
    parser.add_argument("--target-config", type=Path, help="description of the GPU (XLA's GpuTargetConfigProto as text); needed for h200")
    parser.add_argument("--topology", help="of the devices; default v5e:4x4, or one GPU")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxLENGTH", help="per chip; default those of the device")
    parser.add_argument("--layers", type=int, default=6, help="of the student; the teacher is read at twice as many less one")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the config, such as kernels.relations=attend")
    options = parser.parse_args()
    if options.device == "h200" and options.target_config is None:
        parser.error("--device h200 needs --target-config")
    return options


def main() -> None:
    options = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    gpu = options.device == "h200"
    if gpu:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"  # there is nothing to time on
    from jaxdistill.plan import topology_devices

    devices = topology_devices(options.topology or ("1x1x1" if gpu else "v5e:4x4"), options.target_config if gpu else None)
    if gpu:  # JAX asks the GPU that is not here
        from jax._src.cudnn import fused_attention_stablehlo

        fused_attention_stablehlo.check_cudnn_version = lambda: 91000
        fused_attention_stablehlo.check_compute_capability = lambda capability: True
        fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: False
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes] if options.shapes else SHAPES[options.device]
    print("| rows x length | step | temporaries GB | compiler's cycles, ms | own kernels, ms, units together and in turn | compiled in s |")
    print("|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_teacher(Path(folder))
        for rows, length in shapes:
            for kind in options.steps:
                arguments = kind, rows, length, options.layers, options.overrides
                compiled, seconds = compile_step(teacher, devices, "gpu" if gpu else "tpu", *arguments)
                estimated, together, in_turn = (number / 1.5e6 for number in cycles(compiled.as_text()))
                shown = "| | " if gpu else f"| {estimated:.2f} | {together:.2f}, {in_turn:.2f} "
                memory = compiled.memory_analysis().temp_size_in_bytes / 1e9
                print(f"| {rows} x {length} | {kind} | {memory:.2f} {shown}| {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
