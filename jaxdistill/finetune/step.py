"""One update of fine-tuning, and what it starts from.

Several texts share a row, so that hardly any padding is computed; each sees itself alone. Of the word embeddings only those
rows are trained that the task's texts use: the others have no gradient, and AdamW moves them by weight decay alone, which is
made up for at the end.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.config import Protocol
from jaxdistill.features import Feature
from jaxdistill.models import EncoderConfig, forward, init_params, label_logits
from jaxdistill.optimizer import decay_mask
from jaxdistill.row_keys import RowKeys
from jaxdistill.train_step import precision

Batch = dict  # input_ids, token_type_ids, segment_ids [R, S]; row, slot, labels, weight [B]; with seeds a leading axis K


@dataclass(frozen=True)
class Settings:
    """What the step's code depends on; hashable, so that equal models share one compilation."""

    model: EncoderConfig
    dtype: str
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float

    @classmethod
    def create(cls, model: EncoderConfig, dtype: str, protocol: Protocol) -> Settings:
        return cls(model, dtype, protocol.b1, protocol.b2, protocol.eps, protocol.weight_decay, protocol.clip_norm)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW without its learning rate, which is an argument of the step."""
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return optax.chain(clip, adam, optax.add_decayed_weights(self.weight_decay, mask=decay_mask))


def predict(settings: Settings, params: dict, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Logits [B, C] in float32; with a key, under dropout."""
    config = settings.model
    last = Feature("hidden", config.num_layers)
    segments = batch["segment_ids"]
    dropout = None if key is None else RowKeys.create(key, jnp.arange(segments.shape[0], dtype=jnp.uint32))
    hidden = forward(
        config, params, batch["input_ids"], (segments > 0).astype(jnp.int32), batch["token_type_ids"], segments,
        features=frozenset({last}), dropout=dropout, dtype=settings.dtype,
    )[last]  # fmt: skip
    first = hidden[batch["row"], batch["slot"]]
    if key is not None:
        dropout = RowKeys.create(jax.random.fold_in(key, 1), jnp.arange(first.shape[0], dtype=jnp.uint32))
    return label_logits(config, params, first, dropout=dropout, dtype=settings.dtype)


def example_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B]: cross entropy in nats of [B, C] logits, or the squared error of a regression (C = 1, float labels)."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return (logits[:, 0] - labels) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def finetune_step(settings: Settings, params: dict, optimizer: optax.OptState, batch: Batch, rate, seed, step):
    """One update; returns the parameters, the optimizer state and the mean loss over the batch's examples."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"dropout")), step)

    def loss(params):
        losses = example_losses(predict(settings, params, batch, key), batch["labels"])
        return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])

    value, gradients = jax.value_and_grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of int32 counters
        updates, optimizer = settings.optimizer.update(gradients, optimizer, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), optimizer, value


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train(settings: Settings, params, optimizer, batch, rate, seed, step):
    with precision(settings.dtype, jax.default_backend()):
        return finetune_step(settings, params, optimizer, batch, rate, seed, step)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_seeds(settings: Settings, params, optimizer, batch, rate, seed, step):
    with precision(settings.dtype, jax.default_backend()):
        return jax.vmap(partial(finetune_step, settings), in_axes=(0, 0, 0, None, 0, None))(params, optimizer, batch, rate, seed, step)


@partial(jax.jit, static_argnums=0)
def predict_one(settings: Settings, params, batch):
    with precision(settings.dtype, jax.default_backend()):
        return predict(settings, params, batch)


@partial(jax.jit, static_argnums=0)
def predict_seeds(settings: Settings, params, batch):
    with precision(settings.dtype, jax.default_backend()):
        return jax.vmap(partial(predict, settings), in_axes=(0, None))(params, batch)


def start_params(config: EncoderConfig, params: dict, seed: int) -> dict:
    """The encoder with a new classification head for `config.labels`, and BERT's pooler where the model has none."""
    heads = jax.jit(partial(_heads, config))(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"classification head")))
    pooler = {"pooler": params.get("pooler", heads.get("pooler"))} if config.family == "bert" else {}
    return {"embeddings": params["embeddings"], "layers": params["layers"], "classifier": heads["classifier"]} | pooler


def _heads(config: EncoderConfig, key: jax.Array) -> dict:
    small = dataclasses.replace(config, num_layers=0, vocab_size=1)
    return {name: value for name, value in init_params(small, key, classifier=True).items() if name in ("pooler", "classifier")}


def with_words(params: dict, vocabulary: np.ndarray, divisor: int) -> dict:
    """The parameters with these rows of the word embeddings alone, and rows of zeros up to a multiple of `divisor`."""
    table = np.asarray(params["embeddings"]["word"]["embedding"])[vocabulary]
    table = np.pad(table, ((0, -len(table) % divisor), (0, 0)))
    return params | {"embeddings": params["embeddings"] | {"word": {"embedding": table}}}


def with_all_words(params: dict, before: dict, vocabulary: np.ndarray, decayed: float) -> dict:
    """The parameters with the whole table again. `decayed`: what weight decay left of the rows that were not trained."""
    table = np.asarray(before["embeddings"]["word"]["embedding"], np.float32) * np.float32(decayed)
    table[vocabulary] = np.asarray(params["embeddings"]["word"]["embedding"])[: len(vocabulary)]
    return params | {"embeddings": params["embeddings"] | {"word": {"embedding": table}}}
