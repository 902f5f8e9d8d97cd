"""Temporaries and cycles of an output-distribution step from an XLM-R-sized vocabulary, compiled ahead of time for a TPU that need not be here.

    pip install '.[tpu]'; JAX_PLATFORMS=cpu python benchmarks/compiled_vocabulary.py [--topology v5e:4x4] [--forms blocks,plain]

XLM-R-base's shape (12 x 768, 250,002 pieces) with its MLM head teaches 6 x 768 by `output_kl`, 32 x 256 tokens per chip, every position
counted. The teacher's weights are never read: its folder holds a config, an empty MLM head and a tokenizer of eight words.
Cycles: the compiler's own estimates, the body of a loop as often as it runs when all tokens are counted.
"""

from __future__ import annotations

import argparse
import json
import re
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
CLOCK = {"v5e": 1.5e9}  # Hz


def write_teacher(folder: Path) -> Path:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "<s>", "sep_token": "</s>"} | SPECIAL
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(XLMR_BASE))
    save_file({"lm_head.bias": np.zeros(1, np.float32)}, folder / "model.safetensors")  # only whether there is a head is looked up
    return folder


def cycles(text: str, trips: dict[str, int]) -> tuple[int, dict[str, int]]:
    """The entry computation's cycles with its loops, and those of each loop's body, by the loops' place in the program."""
    own, loops, name = {}, {}, ""
    for line in text.splitlines():
        if header := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[1]
            own[name], loops[name] = 0, []
            entry = name if line.startswith("ENTRY") else locals().get("entry")
        elif name:
            own[name] += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
            loops[name] += re.findall(r" while\(.*body=%?([\w.\-]+)", line)
            loops[name] += re.findall(r"(?:true_computation|false_computation|to_apply)=%?([\w.\-]+)", line) if " conditional(" in line else []
    return own, loops, entry
