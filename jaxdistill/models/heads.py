"""Heads on top of an encoder: BERT's pooler and the masked language model."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxdistill.models.config import EncoderConfig
from jaxdistill.models.encoder import ACTIVATIONS, layer_norm, linear
from jaxdistill.shapes import Array, Float


class Pooler(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = linear(config.hidden_size, config.hidden_size, config, dtype, rngs)

    def __call__(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        return jnp.tanh(self.dense(hidden[:, 0]))


class MLMHead(nnx.Module):
    """Transform, norm, and a decoder: the word embeddings when tied, else its own kernel."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs, *, tied: bool = True):
        self.config, self.dtype = config, dtype
        self.dense = linear(config.hidden_size, config.hidden_size, config, dtype, rngs)
        self.norm = layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))
        if not tied:
            init = nnx.initializers.truncated_normal(config.initializer_range)
            self.decoder = nnx.Param(init(rngs.params(), (config.hidden_size, config.vocab_size), jnp.float32))

    def __call__(self, hidden: Float[Array, "*B S D"], word_embedding: Float[Array, "V D"]) -> Float[Array, "*B S V"]:
        activation = ACTIVATIONS[self.config.activation] if self.config.family == "bert" else ACTIVATIONS["gelu"]
        x = self.norm(activation(self.dense(hidden))).astype(self.dtype)
        kernel = self.decoder[...] if hasattr(self, "decoder") else word_embedding.T
        logits = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits + jnp.broadcast_to(self.bias[...], logits.shape)
