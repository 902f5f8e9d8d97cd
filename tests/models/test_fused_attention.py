"""Fused attention: when it is taken, that it is lowered for CUDA, and that what it is given hides the right keys."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax._src.cudnn.fused_attention_stablehlo as fused
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params, tiny_config, tiny_rows

from jaxdistill.config import MeshConfig
from jaxdistill.features import Feature, all_features
from jaxdistill.kernels import Kernels
from jaxdistill.models import attention_kernel, forward, not_fused
from jaxdistill.row_keys import RowKeys
from jaxdistill.sharding import create_mesh

GPU, TPU = Kernels("gpu"), Kernels("tpu")
CONFIG = tiny_config(num_layers=2, hidden_size=64, num_heads=4)


@pytest.mark.parametrize(
    ("kernels", "dtype", "hidden_size", "length", "dropout", "name"),
    [
        (GPU, "bfloat16", 64, 128, False, "cudnn"),
        (GPU, "bfloat16", 64, 9, False, "cudnn"),
        (GPU, "bfloat16", 64, 128, True, "plain"),
        (GPU, "float32", 64, 128, False, "plain"),
        (GPU, "bfloat16", 48, 128, False, "plain"),  # heads of 12
        (GPU, "bfloat16", 4 * 128, 128, False, "cudnn"),
        (GPU, "bfloat16", 4 * 136, 128, False, "plain"),
        (Kernels("gpu", attention="plain"), "bfloat16", 64, 128, False, "plain"),
        (TPU, "bfloat16", 64, 512, False, "splash"),
        (TPU, "bfloat16", 64, 512, True, "plain"),
        (TPU, "float32", 64, 512, False, "plain"),
        (TPU, "bfloat16", 64, 520, False, "plain"),
        (TPU, "bfloat16", 64, 128, False, "plain"),
        (Kernels("tpu", attention="splash"), "bfloat16", 64, 128, False, "splash"),
        (Kernels("cpu"), "bfloat16", 64, 512, False, "plain"),
    ],
)
def test_what_auto_picks(kernels, dtype, hidden_size, length, dropout, name):
    config = dataclasses.replace(CONFIG, hidden_size=hidden_size)
    assert attention_kernel(kernels, config, dtype, length, dropout=dropout) == name


@pytest.mark.parametrize(
    ("name", "kernels", "change", "reason"),
    [
        ("cudnn", GPU, {}, None),
        ("cudnn", Kernels("cpu"), {}, "cudnn is for NVIDIA GPUs, and the devices are of kind cpu"),
        ("cudnn", GPU, {"dtype": "float32"}, "cudnn multiplies in bfloat16, and training.precision is float32"),
        ("cudnn", GPU, {"dropout": True}, "cannot drop attention weights by row keys; set training.attention_dropout to 0"),
        ("cudnn", GPU, {"config": tiny_config()}, "a multiple of 8 up to 128, not of 12"),
        ("splash", TPU, {}, None),
        ("splash", GPU, {}, "splash is for TPUs, and the devices are of kind gpu"),
        ("splash", TPU, {"length": 200}, "rows of a multiple of 128, and data.sequence_length is 200"),
        ("splash", TPU, {"dropout": True}, "set training.attention_dropout to 0"),
    ],
)
def test_why_not(name, kernels, change, reason):
    said = not_fused(name, kernels, **{"config": CONFIG, "dtype": "bfloat16", "length": 128, "dropout": False} | change)
    assert said is None if reason is None else reason in said


@pytest.fixture
def cudnn_without_a_gpu(monkeypatch):
    """JAX asks the GPU for its kind before it lowers; here there is none to ask."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 92800)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)


@pytest.mark.parametrize("length", [18, 9])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_cudnn_is_lowered_for_cuda(cudnn_without_a_gpu, length, packed, training):
    """In every block below the last, forward and backward, and no [B, N, S, S] array beside it."""
    config = dataclasses.replace(CONFIG, attention_dropout=0.0)
    params, features = random_params(config), frozenset({Feature("query", 2)})
    ids, mask = tiny_rows(config, ((0, length), (0, 5)), length)

    def value(params):
        dropout = RowKeys.create(jax.random.key(0), jnp.arange(2, dtype=jnp.uint32))
        output = forward(
            config, params, jnp.asarray(ids), jnp.asarray(mask), None, jnp.asarray(mask) if packed else None,
            features=features, dtype="bfloat16", kernels=GPU, dropout=dropout if training else None,
        )  # fmt: skip
        return jnp.sum(output.query[2].astype(jnp.float32))

    function = jax.grad(value) if training else value
    text = jax.jit(function).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    bias = "ScaleBias" if packed else ""
    assert text.count(f"@__cudnn$fmha{bias}Softmax(") == 1
    assert text.count(f"@__cudnn$fmha{bias}SoftmaxBackward(") == training
    even = length + length % 2
    assert f"tensor<2x4x{even}x{even}x" not in text


def formula(query, key, value, bias=None, mask=None, *, scale, key_value_seq_lengths=None, implementation=None):
    """What cuDNN computes of its arguments, in float32."""
    assert implementation == "cudnn" and query.shape[1] % 2 == 0
    places = jnp.arange(key.shape[1])[None]
    seen = mask if mask is not None else (places < key_value_seq_lengths[:, None])[:, None, None, :]
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) * jnp.float32(scale)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min)), value)


@pytest.mark.parametrize("length", [18, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_what_cudnn_is_given_hides_the_right_keys(monkeypatch, length, packed):
    """The formula in its place, on the arguments that it would get: whole rows, padded, packed, odd, and all padding.

    With dropout of hidden states, which does not depend on the kernel.
    """
    monkeypatch.setattr(jax.nn, "dot_product_attention", formula)
    config = dataclasses.replace(CONFIG, attention_dropout=0.0)
    params = random_params(config)
    ids, mask = tiny_rows(config, ((0, length), (0, 5), (0, 1), (0, 0)), length)
    segments = jnp.where(jnp.arange(length)[None] < 3, mask, 2 * mask) if packed else None
    features = all_features(range(3))

    def run(kernels):
        dropout = RowKeys.create(jax.random.key(0), jnp.arange(4, dtype=jnp.uint32))
        batch = jnp.asarray(ids), jnp.asarray(mask), None, segments
        return forward(config, params, *batch, features=features, kernels=kernels, dropout=dropout)

    plain, given = run(Kernels("cpu")), run(Kernels("gpu", attention="cudnn"))
    for feature in features:
        real = mask[..., None].astype(np.float32)
        np.testing.assert_allclose(given[feature] * real, plain[feature] * real, rtol=1e-5, atol=1e-5)
        assert np.isfinite(given[feature]).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "8 devices"])
def test_splash_in_the_interpreter(packed, mesh):
    """The kernel itself against the formula, values and gradients, over padding and packed texts; also split over a mesh."""
    length, features = 256, frozenset({Feature("query", 2)})
    config = dataclasses.replace(CONFIG, max_position_embeddings=length)
    params = random_params(config)
    ids, mask = map(jnp.asarray, tiny_rows(config, ((0, length), (0, 130), (0, 1), (0, 0)), length))
    segments = jnp.where(jnp.arange(length)[None] < 100, mask, 2 * mask) if packed else None
    real = mask[..., None].astype(jnp.float32)

    def value(params, kernels):
        output = forward(config, params, ids, mask, None, segments, features=features, kernels=kernels)
        return jnp.sum(jnp.sin(output.query[2]) * real), output.query[2] * real

    def both(kernels):
        (_, query), gradient = jax.jit(jax.value_and_grad(partial(value, kernels=kernels), has_aux=True))(params)
        return query, gradient

    plain = both(Kernels("cpu"))
    fused = Kernels("tpu", attention="splash", interpret=True)
    if mesh is None:
        ours = both(fused)
    else:
        with jax.set_mesh(create_mesh(MeshConfig(**mesh))):
            ours = both(fused)
    for (path, got), wanted in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Softmax does not see a bias that all keys share: its gradient is what rounding leaves of a sum that is zero.
        scale = float(jnp.abs(plain[1]["layers"]["01"]["key"]["kernel"] if name.endswith("key/bias") else wanted).max())
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5 * max(scale, 1.0), err_msg=name)
