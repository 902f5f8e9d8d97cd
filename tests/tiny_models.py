"""Tiny encoders whose every parameter is random, as our arrays, as a folder and as a PyTorch model; rows for them to read.

Random also where initialisation would give zeros and ones: a bias that is loaded into the wrong place is seen only then.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np

from jaxdistill.models import EncoderConfig, init_params, save_pretrained

FAMILIES = ("bert", "roberta", "xlm-roberta")


def tiny_config(family: str = "bert", **changes) -> EncoderConfig:
    """3 layers x 48; odd sizes where a power of two would hide a mistake. Roberta's kind pads with 1, as the real ones do."""
    sizes = {"vocab_size": 101, "num_layers": 3, "num_heads": 4, "hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 40}
    if family == "bert":
        own = {"type_vocab_size": 3, "layer_norm_eps": 1e-3, "pad_token_id": 0}
    else:
        own = {"type_vocab_size": 1 if family == "xlm-roberta" else 2, "layer_norm_eps": 1e-5, "pad_token_id": 1}
        own |= {"bos_token_id": 0, "eos_token_id": 2}
    return EncoderConfig(family=family, **(sizes | own | changes))


def random_params(config: EncoderConfig, seed: int = 0, *, pooler: bool = False, mlm: bool = False, tied: bool = True) -> dict:
    """Parameters as arrays on the host; with a classification head where the config has labels."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        values = rng.normal(0.0, 0.2, leaf.shape)
        return (values + (path[-1].key == "scale")).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(fill, _shapes(config, pooler, mlm))
    if not tied:
        params["mlm"]["decoder"] = rng.normal(0.0, 0.2, (config.hidden_size, config.vocab_size)).astype(np.float32)
    return params


@lru_cache
def _shapes(config: EncoderConfig, pooler: bool, mlm: bool) -> dict:
    return jax.eval_shape(partial(init_params, config, pooler=pooler, mlm=mlm, classifier=bool(config.labels)), jax.random.key(0))


def write_model(folder: Path, config: EncoderConfig, seed: int = 0, *, pooler: bool = False, mlm: bool = False, **options) -> dict:
    """A model folder with random weights; returns them."""
    params = random_params(config, seed, pooler=pooler, mlm=mlm)
    head = "mlm" if mlm else "classifier" if config.labels else None
    save_pretrained(folder, config, params, head=head, **options)
    return params


def tiny_rows(config: EncoderConfig, layout: tuple[tuple[int, int], ...], length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask) [B, S]; `layout` holds the first slot and the number of the real tokens of each row."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((len(layout), length), np.int32)
    for row, (first, count) in zip(mask, layout, strict=True):
        row[first : first + count] = 1
    ids = rng.integers(5, config.vocab_size, mask.shape)
    return np.where(mask, ids, config.pad_token_id).astype(np.int32), mask


def torch_model(kind: str, config: EncoderConfig, seed: int = 0, *, tied: bool = True):
    """A transformers model (`kind`: AutoModel, AutoModelForMaskedLM) of this shape in eval mode, every parameter random."""
    import torch
    import transformers

    torch.set_num_threads(1)  # at these sizes a second thread only waits
    hub_config = transformers.AutoConfig.for_model(
        config.family,
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        hidden_act=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=tied,
        **({"num_labels": len(config.labels)} if config.labels else {}),
    )
    model = getattr(transformers, kind).from_config(hub_config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.lower().endswith(("layernorm.weight", "layer_norm.weight")) else 0.0, 0.2, generator=generator)
    return model
