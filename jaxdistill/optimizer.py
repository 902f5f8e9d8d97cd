"""AdamW with warmup, decay of kernels and embeddings only, and clipping by the global norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxdistill.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int):
    """Schedule: update number (0, 1, ...) -> learning rate. Neither the first nor the last update is lost to a rate of 0."""
    warmup = max(round(config.warmup * steps), 1)

    def rate(count):
        done = jnp.asarray(count, jnp.float32) + 1.0
        progress = jnp.clip((done - warmup) / (steps - warmup + 1), 0.0, 1.0)
        decayed = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress))}
        return config.learning_rate * jnp.minimum(done / warmup, decayed[config.schedule])

    return rate


def decay_mask(params: dict) -> dict:
    """True for the leaves that weight decay applies to: kernels and embeddings, not biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding", "decoder"), params)


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    return optax.chain(clip, adam, decay, optax.scale_by_learning_rate(learning_rate(config, steps)))
