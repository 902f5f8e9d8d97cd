"""Encoders of a named shape with random weights, as folders that a config can name: for timing, where nothing is learnt."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxdistill.models import EncoderConfig, init_params, save_pretrained

_BASE = {"num_layers": 12, "num_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
_XLMR = {"family": "xlm-roberta", "vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
SHAPES = {
    "tiny": {"family": "bert", "vocab_size": 1000, "num_layers": 3, "num_heads": 4, "hidden_size": 64, "intermediate_size": 128},
    "bge-small": {"family": "bert", "vocab_size": 30522, "num_layers": 12, "num_heads": 12, "hidden_size": 384, "intermediate_size": 1536},
    "bert-base": {"family": "bert", "vocab_size": 30522} | _BASE,
    "xlmr-base": _XLMR | _BASE,
}


def write_teacher(folder: Path, shape: str, *, mlm: bool = False) -> Path:
    """A teacher of this shape, every parameter random, biases and norms too; with a tokenizer that knows no real text."""
    config = EncoderConfig(**SHAPES[shape])
    params = jax.jit(partial(init_params, config, mlm=mlm))(jax.random.key(0))
    save_pretrained(folder, config, with_noise(params, np.random.default_rng(0)), head="mlm" if mlm else None)
    _write_tokenizer(folder, config)
    return folder


def with_noise(params: dict, rng: np.random.Generator) -> dict:
    """Host arrays off by a normal of 0.02: no bias stays zero and no scale one, or an error there could not be seen."""
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.02, x.shape).astype(np.float32), params)


def random_batch(batch: int, length: int, config: EncoderConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, S], special ones left out, and lengths [B] of a quarter of S and more."""
    ids = rng.integers(config.vocab_size // 30, config.vocab_size, (batch, length)).astype(np.int32)
    return ids, rng.integers(max(length // 4, 1), length + 1, batch)


def _write_tokenizer(folder: Path, config: EncoderConfig) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    if config.family == "bert":
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        order = list(names.values())
    else:
        names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
        order = list(names.values())
    vocabulary = [*order, *(f"piece{i}" for i in range(len(order), config.vocab_size))]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token=names["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(names[kind], order.index(names[kind])) for kind in ("cls_token", "sep_token")]
    single = f"{names['cls_token']} $A {names['sep_token']}"
    backend.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B {names['sep_token']}", special_tokens=ends)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
