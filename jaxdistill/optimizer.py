"""AdamW with warmup, decay of kernels and embeddings only, and clipping by the global norm."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.config import OptimizerConfig
from jaxdistill.features import Feature
from jaxdistill.models import is_read


def learning_rate(config: OptimizerConfig, steps: int):
    """Schedule: update number (0, 1, ...) -> learning rate. Neither the first nor the last update is lost to a rate of 0."""
    warmup = max(round(config.warmup * steps), 1)

    def rate(count):
        xp = jnp if isinstance(count, jax.Array) else np  # of a number that the host knows, no device is asked
        done = xp.asarray(count, xp.float32) + 1.0
        progress = xp.clip((done - warmup) / (steps - warmup + 1), 0.0, 1.0)
        decayed = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + xp.cos(xp.pi * progress))}
        return config.learning_rate * xp.minimum(done / warmup, decayed[config.schedule])

    return rate


def decay_mask(trained: dict, features: Iterable[Feature] | None = None) -> dict:
    """True for the leaves that weight decay applies to: kernels and embeddings, not biases and norms.

    With `features`, what a student's losses read of it: nothing of what they do not reach (PyTorch skips what has no
    gradient), or a run would shrink the last block's feed-forward that MiniLM leaves alone.
    """

    def decayed(path, _) -> bool:
        names = tuple(key.key for key in path)
        reached = features is None or names[0] != "params" or is_read(names[1:], features)
        return reached and names[-1] in ("kernel", "embedding", "decoder")

    return jax.tree_util.tree_map_with_path(decayed, trained)


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, which takes the norm as `gradient_norm` where the caller has it: a pass over all gradients less."""

    def update(gradients, state, params=None, *, gradient_norm=None, **_):
        norm = optax.tree.norm(gradients) if gradient_norm is None else gradient_norm
        return jax.tree.map(lambda x: jnp.where(norm < largest, x, (x / norm.astype(x.dtype)) * largest), gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def create_optimizer(
    config: OptimizerConfig, steps: int, features: Iterable[Feature] | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW for {"params": ..., "projections": ...}; `features`: see `decay_mask`. Its update takes `gradient_norm` if it is known."""
    clip = clip_by_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=partial(decay_mask, features=features))
    chain = optax.chain(clip, adam, decay, optax.scale_by_learning_rate(learning_rate(config, steps)))
    return optax.with_extra_args_support(chain)
