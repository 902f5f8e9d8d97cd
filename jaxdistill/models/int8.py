"""Weights of a frozen encoder in int8: a matrix as whole numbers in -127..127, times one float32 scale per output.

The scale is that of the largest weight of its output column (of a word, of its row of the table), so that nothing is cut off;
the numbers are exact in every dtype of products, and the scale is multiplied into the product.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxdistill.shapes import Array, Float, Int


def quantised(matrix: Float[Array, "I O"], axis: int) -> tuple[Int[Array, "I O"], Float[Array, " scales"]]:
    """Whole numbers and the scales [O] of the columns (axis 0) or [I] of the rows (axis 1)."""
    matrix = matrix.astype(jnp.float32)
    largest = jnp.max(jnp.abs(matrix), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)  # a column of zeros stays one
    return jnp.round(matrix / scale).astype(jnp.int8), jnp.squeeze(scale, axis)


def in_int8(params: dict) -> dict:
    """The parameters of an encoder with the kernels of its blocks and the word table in int8, each beside its scale. Pure.

    All else stays: norms, biases, the short tables of positions and token types, heads.
    """

    def block(module: dict) -> dict:
        if "kernel" not in module:
            return module
        kernel, scale = quantised(jnp.asarray(module["kernel"]), axis=0)
        return module | {"kernel": kernel, "kernel_scale": scale}

    table, scale = quantised(jnp.asarray(params["embeddings"]["word"]["embedding"]), axis=1)
    embeddings = params["embeddings"] | {"word": {"embedding": table, "embedding_scale": scale}}
    layers = {name: {key: block(module) for key, module in layer.items()} for name, layer in params["layers"].items()}
    return params | {"embeddings": embeddings, "layers": layers}


def is_int8(params: dict) -> bool:
    return "embedding_scale" in params["embeddings"]["word"]
