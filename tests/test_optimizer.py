"""The learning rate by hand, what decays, and the update against PyTorch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import random_params, tiny_config

from jaxdistill.config import OptimizerConfig
from jaxdistill.features import Feature
from jaxdistill.optimizer import clip_by_norm, create_optimizer, decay_mask, learning_rate


def rates(steps: int, **fields) -> list[float]:
    schedule = jax.jit(learning_rate(OptimizerConfig(learning_rate=1.0, **fields), steps))
    return [float(schedule(jnp.int32(i))) for i in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("constant", [1.0] * 6),
        ("linear", [6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("cosine", [0.950484, 0.811745, 0.611260, 0.388740, 0.188255, 0.049516]),  # (1 + cos(pi i / 7)) / 2
    ],
)
def test_by_hand(schedule, after_warmup):
    """10 updates, 4 of them warmup: neither the first nor the last is lost to a rate of 0, the fourth has the peak."""
    assert rates(10, schedule=schedule, warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, 1.0, *after_warmup], abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.05), (7, 0.0), (100, 0.06), (10, 0.99)])
def test_between_zero_and_the_peak(schedule, steps, warmup):
    values = rates(steps, schedule=schedule, warmup=warmup)
    assert min(values) > 0 and max(values) == 1.0
    peak = values.index(1.0)
    assert values[:peak] == sorted(values[:peak]) and values[peak:] == sorted(values[peak:], reverse=True)
    assert peak == max(round(warmup * steps), 1) - 1


def test_what_decays():
    params = random_params(tiny_config(num_layers=1), pooler=True, mlm=True, tied=False)
    leaves = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    mask = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    decayed = {name for name, leaf in mask.items() if leaf}
    assert decayed == {name for name in mask if not name.endswith(("bias", "scale"))}
    assert {"embeddings/word/embedding", "layers/01/query/kernel", "mlm/decoder", "pooler/dense/kernel"} <= decayed
    assert {"embeddings/norm/scale", "layers/01/query/bias", "mlm/bias"}.isdisjoint(decayed)


def weights(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"dense": {"kernel": rng.normal(0, 1, (5, 3)).astype(np.float32), "bias": rng.normal(0, 1, 3).astype(np.float32)}}


def updated(config: OptimizerConfig, gradients: list[dict]) -> dict:
    optimizer, params = create_optimizer(config, 10), weights(0)
    state = optimizer.init(params)

    @jax.jit
    def step(gradient, state, params):
        with jax.numpy_dtype_promotion("standard"):  # as the train step: optax raises floats to the power of int32 counters
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params


def test_first_update_by_hand():
    """Adam's first step is the gradient's sign; the kernel also shrinks by rate x decay, the bias does not."""
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0, weight_decay=0.5, eps=1e-12, clip_norm=None)
    start, gradient = weights(0)["dense"], weights(1)["dense"]
    after = updated(config, [{"dense": gradient}])["dense"]
    np.testing.assert_allclose(after["kernel"], start["kernel"] - 0.1 * (np.sign(gradient["kernel"]) + 0.5 * start["kernel"]), atol=1e-6)
    np.testing.assert_allclose(after["bias"], start["bias"] - 0.1 * np.sign(gradient["bias"]), atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
def test_updates_against_pytorch(clip_norm):
    import torch

    config = OptimizerConfig(learning_rate=0.05, warmup=0.3, weight_decay=0.1, eps=1e-3, clip_norm=clip_norm)
    gradients = [weights(seed) for seed in range(1, 7)]
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in weights(0)["dense"].items()}
    groups = [{"params": [theirs["kernel"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-3)
    for gradient, rate in zip(gradients, rates(10, warmup=0.3), strict=False):
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient["dense"][name])
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * rate
        optimizer.step()
    ours = updated(config, gradients)["dense"]
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_what_no_loss_reads_does_not_decay():
    """PyTorch skips what has no gradient; MiniLM's losses end at the last block's queries, keys and values."""
    names = ("query", "value", "attention_output", "intermediate", "output")
    blocks = {layer: {name: {"kernel": 0, "bias": 0} for name in names} for layer in ("01", "02", "03")}
    trained = {"params": {"embeddings": {"word": {"embedding": 0}}, "layers": blocks}, "projections": {"a": {"student": {"kernel": 0}}}}

    def decayed(*features: Feature) -> dict[str, list[str]]:
        mask = decay_mask(trained, features)
        assert mask["params"]["embeddings"]["word"]["embedding"] and mask["projections"]["a"]["student"]["kernel"]
        return {layer: [name for name in names if block[name]["kernel"]] for layer, block in mask["params"]["layers"].items()}

    everything, nothing = list(names), []
    assert decayed(Feature("query", 2), Feature("key", 2)) == {"01": everything, "02": ["query"], "03": nothing}
    assert decayed(Feature("value", 3), Feature("hidden", 1)) == {"01": everything, "02": everything, "03": ["value"]}
    assert decayed(Feature("value", 3), Feature("hidden", 3)) == {"01": everything, "02": everything, "03": everything}
    assert decayed(Feature("logits", 3))["03"] == everything


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
def test_a_norm_that_is_known_is_not_computed_again(clip_norm):
    """The same update bit for bit, with one sum of squares less for each array."""
    optimizer, params, gradients = create_optimizer(OptimizerConfig(clip_norm=clip_norm), 10), weights(0), weights(1)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        norm = optax.tree.norm(gradients)
        alone = optimizer.update(gradients, state, params)
        told = optimizer.update(gradients, state, params, gradient_norm=norm)
        program = str(jax.make_jaxpr(optimizer.update)(gradients, state, params, gradient_norm=norm))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(told), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "reduce_sum" not in program
    if clip_norm:
        theirs, _ = optax.clip_by_global_norm(clip_norm).update(gradients, optax.EmptyState())
        ours, _ = clip_by_norm(clip_norm).update(gradients, optax.EmptyState(), gradient_norm=norm)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(one, other)
