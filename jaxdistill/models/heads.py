"""Heads on top of an encoder: BERT's pooler, the masked language model, sequence classification."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxdistill.features import VocabularyLogits
from jaxdistill.models.config import EncoderConfig
from jaxdistill.models.encoder import ACTIVATIONS, Keys, layer_norm, linear
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Float, Num


class Pooler(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys):
        self.dense = linear(config.hidden_size, config.hidden_size, config, dtype, rngs)

    def __call__(self, first: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return jnp.tanh(self.dense(first))


class MLMHead(nnx.Module):
    """Transform, norm, and a decoder: the word embeddings when tied, else its own kernel."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys, *, tied: bool = True):
        self.config, self.dtype = config, dtype
        self.dense = linear(config.hidden_size, config.hidden_size, config, dtype, rngs)
        self.norm = layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), jnp.float32))
        if not tied:
            init = nnx.initializers.truncated_normal(config.initializer_range)
            self.decoder = nnx.Param(init(rngs.params(), (config.hidden_size, config.vocab_size), jnp.float32))

    def __call__(
        self, hidden: Float[Array, "*B S D"], word_embedding: Num[Array, "V D"], scale: Float[Array, " V"] | None = None
    ) -> VocabularyLogits:
        """`scale`: of the rows of word embeddings in int8."""
        activation = ACTIVATIONS[self.config.activation] if self.config.family == "bert" else ACTIVATIONS["gelu"]
        vectors = self.norm(activation(self.dense(hidden))).astype(self.dtype)
        if hasattr(self, "decoder"):
            return VocabularyLogits(vectors, self.decoder[...].T, self.bias[...])
        return VocabularyLogits(vectors, word_embedding, self.bias[...], scale)


class Classifier(nnx.Module):
    """Sequence classification, or regression with one label, on the vector of each text's first token.

    BERT: dropout and a linear layer on the pooler's output. RoBERTa and XLM-R have no pooler but a layer of the same form in
    the head itself, with dropout before it too.
    """

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys):
        self.config = config
        if config.family != "bert":
            self.dense = linear(config.hidden_size, config.hidden_size, config, dtype, rngs)
        self.output = linear(config.hidden_size, len(config.labels), config, dtype, rngs)

    def __call__(self, first: Float[Array, "B D"], dropout: RowKeys | None) -> Float[Array, "B C"]:
        rate = self.config.hidden_dropout if self.config.classifier_dropout is None else self.config.classifier_dropout
        x = first
        if self.config.family != "bert":
            x = jnp.tanh(self.dense(dropout.dropout(x, rate) if dropout else x))
        return self.output(dropout.dropout(x, rate) if dropout else x).astype(jnp.float32)
