"""Memory of an output-distribution step from an XLM-R-sized vocabulary, compiled for a TPU that need not be here.

    pip install '.[tpu]'; JAX_PLATFORMS=cpu python benchmarks/compiled_vocabulary.py [--topology v5e:4x4] [--forms blocks,plain]

XLM-R-base's shape (12 x 768, 250,002 pieces) with its MLM head teaches 6 x 768 by `output_kl`, 32 x 256 tokens per chip, every position
counted. The teacher's weights are never read: its folder holds a config, the name of an MLM head and a tokenizer of numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxdistill.config import load_config
from jaxdistill.plan import compile_ahead, topology_devices
from jaxdistill.resolve import resolve

XLMR_BASE = {
    "architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta", "vocab_size": 250002, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
ROWS, LENGTH = 32, 256


def write_teacher(folder: Path) -> Path:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(str, range(XLMR_BASE["vocab_size"] - 5))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "<s>", "sep_token": "</s>"} | SPECIAL
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(XLMR_BASE))
    save_file({"lm_head.bias": np.zeros(1, np.float32)}, folder / "model.safetensors")  # only whether there is a head is looked up
    return folder


def compiled(teacher: Path, folder: Path, topology: str, form: str, positions: str) -> str:
    devices = topology_devices(topology)
    config = {
        "teacher": str(teacher),
        "data": {"sources": [str(folder / "no-text.txt")], "sequence_length": LENGTH},
        "students": {"student": {"num_layers": 6, "hidden_size": 768, "num_heads": 12}},
        "objective": [{"kind": "output_kl", "positions": positions}],
        "training": {"steps": 1000, "batch_size": ROWS * len(devices), "dropout": 0.0},
        "kernels": {"logits": form},
        "output": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    run = resolve(load_config(path), num_devices=len(devices), platform="tpu")
    start = time.perf_counter()
    memory = compile_ahead(run, devices).memory_analysis()
    seconds = time.perf_counter() - start
    sizes = memory.temp_size_in_bytes / 1e9, memory.argument_size_in_bytes / 1e9
    return f"| {form} | {positions} | {sizes[0]:.2f} | {sizes[1]:.2f} | {seconds:.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--forms", default="blocks,plain")
    parser.add_argument("--positions", default="all", choices=("all", "masked"))
    options = parser.parse_args()
    print(f"{options.topology}, {ROWS} x {LENGTH} tokens per chip")
    print("| kernels.logits | positions | temporaries, GB per chip | arguments, GB per chip | compiled in s |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = folder / "teacher"
        teacher.mkdir()
        write_teacher(teacher)
        for form in options.forms.split(","):
            try:
                print(compiled(teacher, folder, options.topology, form, options.positions), flush=True)
            except RuntimeError as error:  # the compiler refuses what does not fit the chip, and says how much it would be
                print(f"| {form} | {options.positions} | refused: {str(error).splitlines()[0][:200]} |", flush=True)


if __name__ == "__main__":
    main()
