"""What a gradient computes again changes neither the gradient nor a dropped element, only what is kept."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params, tiny_config, tiny_rows

from jaxdistill.features import Feature
from jaxdistill.models import forward
from jaxdistill.row_keys import RowKeys

CONFIG = tiny_config(num_layers=3)
PARAMS = random_params(CONFIG)
FEATURES = frozenset({Feature("query", 3), Feature("value", 1), Feature("hidden", 2)})
IDS, MASK = map(jnp.asarray, tiny_rows(CONFIG, ((0, 9), (0, 5), (0, 0)), 9))


def value(params, what: str):
    dropout = RowKeys.create(jax.random.key(0), jnp.arange(3, dtype=jnp.uint32))
    output = forward(CONFIG, params, IDS, MASK, None, MASK, features=FEATURES, dropout=dropout, rematerialise=what)
    return sum(jnp.sum(jnp.sin(output[feature])) for feature in sorted(FEATURES))


@pytest.fixture(scope="module")
def kept():
    return jax.jit(jax.value_and_grad(partial(value, what="none")))(PARAMS)


@pytest.mark.parametrize("what", ["attention", "elementwise", "blocks"])
def test_value_and_gradient(what, kept):
    result = jax.jit(jax.value_and_grad(partial(value, what=what)))(PARAMS)
    assert float(result[0]) == pytest.approx(float(kept[0]), rel=1e-6)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(result[1]), jax.tree.leaves(kept[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def residuals(what: str) -> int:
    """Numbers that the forward pass hands to the backward one, without the parameters."""
    backward = jax.eval_shape(lambda params: jax.vjp(partial(value, what=what), params)[1], PARAMS)
    return sum(leaf.size for leaf in jax.tree.leaves(backward)) - sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def test_each_keeps_less_than_the_one_before():
    kept = [residuals(what) for what in ("none", "attention", "elementwise", "blocks")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    assert kept[-1] < kept[0] / 4
