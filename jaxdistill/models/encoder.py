"""BERT, RoBERTa and XLM-R as one encoder that returns its features as values.

Layers are numbered as in the papers: 0 is the embedding output, 1..L are the blocks. The encoder stops at the deepest
feature asked for; in that last block a query, key or value needs its projection and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.features import EncoderOutput, Feature, deepest_layer
from jaxdistill.kernels import Kernels
from jaxdistill.models.attention import Attention, attention
from jaxdistill.models.config import EncoderConfig
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Float, Int, Key, Num
from jaxdistill.sharding import keep_rows, keep_vocabulary

_PROJECTIONS = ("query", "key", "value")


def layer_name(layer: int) -> str:
    """Key of block `layer` (1..L) in the parameters; padded, so that sorting by name is sorting by number."""
    return f"{layer:02d}"


class Keys:
    """The keys that `nnx.Rngs(params=key)` would give, counted in Python.

    NNX counts them in an array. Its sharding is asked for at every key, and under `jax.jit` the answer is an error whose text
    prints all the programs that led there: seconds for 12 layers, minutes for 44 students.
    """

    def __init__(self, key: Key[Array, ""]):
        self._key, self._count = key, 0

    def params(self) -> Key[Array, ""]:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


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


def linear(num_in: int, num_out: int, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys, *, int8: bool = False) -> nnx.Linear:
    init = nnx.initializers.truncated_normal(config.initializer_range)
    kind = Int8Linear if int8 else nnx.Linear
    return kind(num_in, num_out, kernel_init=init, dtype=dtype, dot_general=rows_product, rngs=rngs)


class Int8Linear(nnx.Linear):
    """A kernel of whole numbers, which every dtype of products holds exactly, and a float32 scale for each output (`int8.py`)."""

    def __init__(self, num_in: int, num_out: int, **options):
        super().__init__(num_in, num_out, **options)
        self.kernel_scale = nnx.Param(jnp.ones((num_out,), jnp.float32))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        product = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype), preferred_element_type=jnp.float32)
        shape = (1,) * (x.ndim - 1) + (-1,)
        y = product * self.kernel_scale[...].reshape(shape) + self.bias[...].astype(jnp.float32).reshape(shape)
        return y.astype(self.dtype)


def layer_norm(config: EncoderConfig, rngs: Keys) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels badly in float32: parity with PyTorch needs the two-pass form.
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def embed(num: int, config: EncoderConfig, rngs: Keys) -> nnx.Embed:
    init = nnx.initializers.truncated_normal(config.initializer_range)
    return nnx.Embed(num, config.hidden_size, embedding_init=init, rngs=rngs)


def look_up(table: nnx.Embed, ids: Int[Array, "B S"], scale: Float[Array, " V"] | None = None) -> Float[Array, "B S D"]:
    """Rows of the table in float32, whatever the products are in: the gradient of a frequent token is a sum of thousands."""
    rows = jnp.take(keep_vocabulary(table.embedding[...]), ids, axis=0).astype(jnp.float32)
    return rows if scale is None else rows * jnp.take(scale, ids, axis=0)[..., None]


class Embeddings(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys, *, int8: bool = False):
        self.config, self.dtype = config, dtype
        self.word = embed(config.vocab_size, config, rngs)
        if int8:
            self.word.embedding_scale = nnx.Param(jnp.ones((config.vocab_size,), jnp.float32))
        self.position = embed(config.max_position_embeddings, config, rngs)
        self.token_type = embed(config.type_vocab_size, config, rngs)
        self.norm = layer_norm(config, rngs)

    def __call__(self, input_ids, token_type_ids, segment_ids, dropout: RowKeys | None):
        scale = self.word.embedding_scale[...] if hasattr(self.word, "embedding_scale") else None
        x = look_up(self.word, input_ids, scale) + self._positions(input_ids, segment_ids)
        if token_type_ids is None:
            x = x + self.token_type.embedding[None, :1].astype(jnp.float32)
        else:
            x = x + look_up(self.token_type, token_type_ids)
        x = keep_rows(self.norm(x).astype(self.dtype))
        return dropout.dropout(x, self.config.hidden_dropout) if dropout else x

    def _positions(self, input_ids, segment_ids) -> Float[Array, "_ S D"]:
        if segment_ids is None and not self.config.positions_from_padding:  # the same in every row: no gather, no scatter of gradients
            return self.position.embedding[: input_ids.shape[1]][None].astype(jnp.float32)
        return look_up(self.position, position_ids(self.config, input_ids, segment_ids))


class Block(nnx.Module):
    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys, *, int8: bool = False):
        self.config, self.dtype = config, dtype
        width, inner = config.hidden_size, config.intermediate_size
        self.query = linear(width, width, config, dtype, rngs, int8=int8)
        self.key = linear(width, width, config, dtype, rngs, int8=int8)
        self.value = linear(width, width, config, dtype, rngs, int8=int8)
        self.attention_output = linear(width, width, config, dtype, rngs, int8=int8)
        self.attention_norm = layer_norm(config, rngs)
        self.intermediate = linear(width, inner, config, dtype, rngs, int8=int8)
        self.output = linear(inner, width, config, dtype, rngs, int8=int8)
        self.output_norm = layer_norm(config, rngs)

    def projections(self, x, kinds: Iterable[str]) -> dict[str, jax.Array]:
        return {kind: getattr(self, kind)(x) for kind in kinds}

    def __call__(self, x, attend: Attention, dropout: RowKeys | None):
        """The next hidden state, and the block's query, key and value."""
        vectors = self.projections(x, _PROJECTIONS)
        context = self.attention_output(attend(*(vectors[kind] for kind in _PROJECTIONS)))
        x = self._add_and_norm(x, context, self.attention_norm, dropout)
        inner = ACTIVATIONS[self.config.activation](self.intermediate(x))
        return self._add_and_norm(x, self.output(inner), self.output_norm, dropout), vectors

    def _add_and_norm(self, x, update, norm, dropout: RowKeys | None):
        if dropout:
            update = dropout.dropout(update, self.config.hidden_dropout)
        return keep_rows(norm(x + update).astype(self.dtype))


class Encoder(nnx.Module):
    """Parameters in float32, or with `int8` matrices of whole numbers; products in `dtype`; softmax and norms in float32."""

    def __init__(self, config: EncoderConfig, dtype: jnp.dtype, rngs: Keys, *, int8: bool = False):
        self.config, self.dtype = config, dtype
        self.embeddings = Embeddings(config, dtype, rngs, int8=int8)
        layers = range(1, config.num_layers + 1)
        self.layers = nnx.Dict({layer_name(i): Block(config, dtype, rngs, int8=int8) for i in layers})

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Num[Array, "B S"],
        token_type_ids: Int[Array, "B S"] | None,
        segment_ids: Int[Array, "B S"] | None,
        *,
        features: frozenset[Feature],
        dropout: RowKeys | None,
        kernels: Kernels,
        rematerialise: str,
    ) -> EncoderOutput:
        output = EncoderOutput({}, {}, {}, {})
        x = self.embeddings(input_ids, token_type_ids, segment_ids, dropout)
        if Feature("hidden", 0) in features:
            output.hidden[0] = x
        attend = attention(kernels, self.config, self.dtype, attention_mask, segment_ids, dropout)
        deepest = deepest_layer(features)
        for i in range(1, deepest + 1):
            block = self.layers[layer_name(i)]
            read = [kind for kind in _PROJECTIONS if Feature(kind, i) in features]
            if i == deepest and Feature("hidden", i) not in features:
                vectors = block.projections(x, read)
            else:
                x, vectors = _rematerialised(block, rematerialise)(x, attend, dropout)
            for kind in read:
                getattr(output, kind)[i] = vectors[kind]
            if Feature("hidden", i) in features:
                output.hidden[i] = x
        return output


def _rematerialised(block: Block, what: str) -> Callable:
    """The block, of which a gradient keeps less and computes `what` again. Made anew for each: jax.checkpoint traces a function once."""
    if what == "none":
        return block
    if what == "attention":
        return lambda x, attend, dropout: block(x, jax.checkpoint(lambda *vectors: attend(*vectors)), dropout)
    # Kept are the products with weights, or nothing but the block's input.
    policy = {"elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "blocks": None}[what]
    return lambda x, attend, dropout: jax.checkpoint(lambda x: block(x, attend, dropout), policy=policy)(x)


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
