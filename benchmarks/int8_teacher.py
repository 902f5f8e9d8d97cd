"""What a teacher in int8 (training.teacher_weights: int8) is off, on real weights and real text, and what it saves.

    python benchmarks/int8_teacher.py MODEL TEXT.parquet [--rows 32] [--length 128]

For each layer the error |x - y| / |y| (Euclidean, over real tokens) of hidden states, queries, keys and values against the float32
teacher, and the relation KL from it (nats, 48 heads, mean of the three); beside it what bfloat16 products alone do.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet

from jaxdistill.data import load_tokenizer
from jaxdistill.features import KINDS, Feature, all_features
from jaxdistill.losses import relation_kl
from jaxdistill.models import forward, in_int8, load_pretrained
from jaxdistill.report import markdown_table


def rows(model: Path, text: Path, num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask) of the first documents of some length, cut to a row, with their padding."""
    tokenizer = load_tokenizer(model)
    documents = [line for line in parquet.read_table(text)["text"].to_pylist() if len(line) > 200][:num_rows]
    ids = np.full((num_rows, length), tokenizer.pad_id, np.int32)
    for row, tokens in zip(ids, tokenizer.encode(documents), strict=True):
        tokens = tokens[: length - 2]
        row[: len(tokens) + 2] = [tokenizer.cls_id, *tokens, tokenizer.sep_id]
    return ids, (ids != tokenizer.pad_id).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    config, params = load_pretrained(args.model)
    ids, mask = map(jnp.asarray, rows(args.model, args.text, args.rows, args.length))
    small, layers = jax.jit(in_int8)(params), range(1, config.num_layers + 1)

    @partial(jax.jit, static_argnames="dtype")
    def run(params, dtype):
        output = forward(config, params, ids, mask, features=all_features(layers), dtype=dtype)
        return jax.tree.map(lambda x: x.astype(jnp.float32), output)

    exact = run(params, "float32")
    ways = {"int8": run(small, "float32"), "bfloat16": run(params, "bfloat16"), "int8 and bfloat16": run(small, "bfloat16")}
    real = mask[..., None].astype(jnp.float32)

    @jax.jit
    def kl(theirs, exact, mask):
        total, count = relation_kl(theirs, exact, mask, num_relation_heads=48 if config.hidden_size % 48 == 0 else config.num_heads)
        return total / count

    table = []
    for layer in layers:
        row = [str(layer)]
        for output in ways.values():
            errors = [
                float(jnp.linalg.norm((output[f] - exact[f]) * real) / jnp.linalg.norm(exact[f] * real))
                for f in (Feature(kind, layer) for kind in KINDS)
            ]
            values = [float(kl(getattr(output, kind)[layer], getattr(exact, kind)[layer], mask)) for kind in KINDS[1:]]
            row += [" ".join(f"{100 * error:.2f}" for error in errors), f"{np.mean(values):.1e}"]
        table.append(tuple(row))
    columns = ["layer"] + [head for way in ways for head in (f"{way}: error of hidden, Q, K, V (%)", "relation KL (nats)")]
    print(markdown_table(table, tuple(columns)))
    sizes = {
        name: sum(x.nbytes for part in ("embeddings", "layers") for x in jax.tree.leaves(tree[part])) / 1e6
        for name, tree in {
            "float32": params,
            "bfloat16": jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params),
            "int8": small,
        }.items()
    }
    print("\nencoder: " + ", ".join(f"{size:.1f} MB in {name}" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
