"""bfloat16 products, as on accelerators: what has to stay in float32 does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import random_params, tiny_config

from jaxdistill.features import Feature
from jaxdistill.models import forward


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    """4,096 contributions to one row: summed in bfloat16, those after the first few hundred would be lost."""
    config = tiny_config(hidden_size=16, num_heads=2)
    params, layer_zero = random_params(config), Feature("hidden", 0)
    ids = jnp.full((128, 32), 7, jnp.int32)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (128, 32, 16)), jnp.float32)

    def gradient(dtype: str) -> np.ndarray:
        def loss(embedding):
            changed = params | {"embeddings": params["embeddings"] | {"word": {"embedding": embedding}}}
            hidden = forward(config, changed, ids, jnp.ones_like(ids), features=frozenset([layer_zero]), dtype=dtype)[layer_zero]
            assert hidden.dtype == dtype
            return jnp.sum(hidden.astype(jnp.float32) * weights)

        return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(params["embeddings"]["word"]["embedding"]))[7])

    full, half = gradient("float32"), gradient("bfloat16")
    assert np.abs(full - half).max() < 0.01 * np.abs(full).max()
