"""BERT, RoBERTa and XLM-R as one encoder that returns its features as values.

Layers are numbered as in the papers: 0 is the embedding output, 1..L are the blocks. The encoder stops at the deepest
feature asked for; in that last block a query, key or value needs its projection and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.features import EncoderOutput, Feature, deepest_layer
from jaxdistill.models.config import EncoderConfig
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Bool, Float, Int, Num


def layer_name(layer: int) -> str:
    """Key of block `layer` (1..L) in the parameters; padded, so that sorting by name is sorting by number."""
    return f"{layer:02d}"


def gelu(x: jax.Array) -> jax.Array:
    """The exact form that BERT uses; by erf, which is cheaper on a CPU than the erfc of `jax.nn.gelu`."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * jnp.asarray(2**-0.5, x.dtype)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def rows_product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"], dimensions, **options) -> Float[Array, "*B O"]:
    """x @ kernel with all rows of x as one dimension; an `nnx.Linear.dot_general`.

    Of the gradient of a product with two, XLA's CPU backend makes a transposed copy of x and a product three times as slow.
    """
    product = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(num_in: int, num_out: int, config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.truncated_normal(config.initializer_range)
    return nnx.Linear(num_in, num_out, kernel_init=init, dtype=dtype, dot_general=rows_product, rngs=rngs)


def layer_norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels badly in float32: parity with PyTorch needs the two-pass form.
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def embed(num: int, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.truncated_normal(config.initializer_range)
    return nnx.Embed(num, config.hidden_size, embedding_init=init, rngs=rngs)


def look_up(table: nnx.Embed, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Rows of the table in float32, whatever the products are in: the gradient of a frequent token is a sum of thousands."""
    return jnp.take(table.embedding[...], ids, axis=0).astype(jnp.float32)


class Embeddings(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.word = embed(config.vocab_size, config, rngs)
        self.position = embed(config.max_position_embeddings, config, rngs)
        self.token_type = embed(config.type_vocab_size, config, rngs)
        self.norm = layer_norm(config, rngs)

    def __call__(self, input_ids, token_type_ids, segment_ids, dropout: RowKeys | None):
        x = look_up(self.word, input_ids) + look_up(self.position, position_ids(self.config, input_ids, segment_ids))
        if token_type_ids is None:
            x = x + self.token_type.embedding[None, :1].astype(jnp.float32)
        else:
            x = x + look_up(self.token_type, token_type_ids)
        x = self.norm(x).astype(self.dtype)
        return dropout.dropout(x, self.config.hidden_dropout) if dropout else x


class Block(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width, inner = config.hidden_size, config.intermediate_size
        self.query = linear(width, width, config, dtype, rngs)
        self.key = linear(width, width, config, dtype, rngs)
        self.value = linear(width, width, config, dtype, rngs)
        self.attention_output = linear(width, width, config, dtype, rngs)
        self.attention_norm = layer_norm(config, rngs)
        self.intermediate = linear(width, inner, config, dtype, rngs)
        self.output = linear(inner, width, config, dtype, rngs)
        self.output_norm = layer_norm(config, rngs)

    def __call__(self, x, query, key, value, visible, dropout: RowKeys | None):
        config = self.config
        context = self.attention_output(attention(query, key, value, visible, config, dropout))
        x = self._add_and_norm(x, context, self.attention_norm, dropout)
        inner = ACTIVATIONS[config.activation](self.intermediate(x))
        return self._add_and_norm(x, self.output(inner), self.output_norm, dropout)

    def _add_and_norm(self, x, update, norm, dropout: RowKeys | None):
        if dropout:
            update = dropout.dropout(update, self.config.hidden_dropout)
        return norm(x + update).astype(self.dtype)


class Encoder(nnx.Module):
    """Parameters in float32; matrix products in `dtype`; softmax and norms in float32."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, dtype, rngs)
        self.layers = nnx.Dict({layer_name(i): Block(config, dtype, rngs) for i in range(1, config.num_layers + 1)})

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Num[Array, "B S"],
        token_type_ids: Int[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        *,
        features: frozenset[Feature],
        dropout: RowKeys | None,
    ) -> EncoderOutput:
        output = EncoderOutput({}, {}, {}, {})
        x = self.embeddings(input_ids, token_type_ids, segment_ids, dropout)
        if Feature("hidden", 0) in features:
            output.hidden[0] = x
        visible = visible_keys(attention_mask, segment_ids)
        deepest = deepest_layer(features)
        for i in range(1, deepest + 1):
            block = self.layers[layer_name(i)]
            last = i == deepest and Feature("hidden", i) not in features
            vectors = {}
            for kind in ("query", "key", "value"):
                if not last or Feature(kind, i) in features:
                    vectors[kind] = getattr(block, kind)(x)
                if Feature(kind, i) in features:
                    getattr(output, kind)[i] = vectors[kind]
            if not last:
                x = block(x, vectors["query"], vectors["key"], vectors["value"], visible, dropout)
            if Feature("hidden", i) in features:
                output.hidden[i] = x
        return output


def attention(
    query: Float[Array, "B S D"],
    key: Float[Array, "B S D"],
    value: Float[Array, "B S D"],
    visible: Bool[Array, "B 1 S Q"],
    config: EncoderConfig,
    dropout: RowKeys | None,
) -> Float[Array, "B S D"]:
    """Scaled dot-product attention; a key that is not visible gets no probability, a query without any stays finite.

    Weights are [B, N, key, query]: on a CPU, XLA makes of this order a product six times faster than of the usual one.
    """
    batch, length, width = query.shape
    split = (batch, length, config.num_heads, config.head_size)
    query, key, value = (x.reshape(split) for x in (query, key, value))
    scores = jnp.einsum("bknh,bqnh->bnkq", key, query, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(config.head_size**-0.5)
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-2)
    if dropout:
        weights = dropout.dropout(weights, config.attention_dropout)
    context = jnp.einsum("bnkq,bknh->bqnh", weights.astype(value.dtype), value)
    return context.reshape(batch, length, width)


def visible_keys(attention_mask, segment_ids) -> Bool[Array, "B 1 S Q"]:
    """Which keys a query sees: real tokens, and with packed rows those of its own segment (Q is S then, else 1)."""
    real = (attention_mask > 0)[:, None, :, None]
    if segment_ids is None:
        return real
    return real & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def position_ids(config: EncoderConfig, input_ids: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"]:
    """Index into the position table of each slot; in packed rows every segment starts anew."""
    slots = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
    if segment_ids is None:
        if not config.positions_from_padding:
            return slots
        real = (input_ids != config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + config.pad_token_id
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    within = slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)
    if not config.positions_from_padding:
        return within
    return jnp.where(segment_ids > 0, within + config.pad_token_id + 1, config.pad_token_id)
