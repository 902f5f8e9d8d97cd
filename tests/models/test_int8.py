"""A frozen encoder in int8: the error that rounding leaves, and that nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params, tiny_config, tiny_rows

from jaxdistill.features import Feature, all_features
from jaxdistill.models import forward, in_int8
from jaxdistill.models.int8 import quantised

CONFIG = tiny_config("roberta", num_layers=2)


@pytest.mark.parametrize("axis", [0, 1])
def test_no_weight_moves_by_more_than_half_a_step(axis):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(30, 20)) * rng.uniform(1e-4, 10, (30, 20)), jnp.float32).at[3].set(0.0).at[:, 5].set(0.0)
    numbers, scale = quantised(matrix, axis)
    assert numbers.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == (matrix.shape[1 - axis],)
    step = jnp.expand_dims(scale, axis)
    error = jnp.abs(numbers.astype(jnp.float32) * step - matrix)
    assert jnp.all(error <= 0.5001 * step)
    largest = jnp.max(jnp.abs(numbers.astype(jnp.int32)), axis=axis)
    assert jnp.all((largest == 127) | (jnp.max(jnp.abs(matrix), axis=axis) == 0))  # the whole range is used, nothing cut off


def test_weights_on_the_grid_are_exact_in_both_precisions():
    """Kernels that int8 holds exactly: the same features as from floats, so scales and products are where they belong."""
    params = random_params(CONFIG, mlm=True)
    quantised_params = in_int8(params)
    word = quantised_params["embeddings"]["word"]
    exact = jax.tree.map(jnp.asarray, params)
    exact["embeddings"]["word"] = {"embedding": word["embedding"].astype(jnp.float32) * word["embedding_scale"][:, None]}
    for name, layer in quantised_params["layers"].items():
        for key, module in layer.items():
            if "kernel" in module:
                exact["layers"][name][key]["kernel"] = module["kernel"].astype(jnp.float32) * module["kernel_scale"][None, :]
    ids, mask = map(jnp.asarray, tiny_rows(CONFIG, ((0, 9), (0, 5)), 9))
    features = all_features(range(3)) | {Feature("logits", 2)}
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.03)):
        ours = forward(CONFIG, quantised_params, ids, mask, features=features, dtype=dtype)
        theirs = forward(CONFIG, exact, ids, mask, features=features, dtype="float32")
        for feature in features:
            own, other = (x[feature].dense() if feature.kind == "logits" else x[feature].astype(jnp.float32) for x in (ours, theirs))
            difference, size = own - other, jnp.linalg.norm(other)
            assert jnp.linalg.norm(difference) < bound * size, (feature, dtype)


def test_what_is_quantised():
    params = random_params(CONFIG, mlm=True)
    small = in_int8(params)
    assert set(small) == set(params)
    kinds = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(small)
        if x.dtype == np.int8
    }
    matrices = ("query", "key", "value", "attention_output", "intermediate", "output")
    assert kinds == {"embeddings/word/embedding"} | {f"layers/0{i}/{name}/kernel" for i in (1, 2) for name in matrices}
