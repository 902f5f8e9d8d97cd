"""Attention of the encoders: the formula, which every device computes, and cuDNN's fused form of it on NVIDIA.

Both give the same context. cuDNN keeps no [B, N, S, S] array; it cannot draw the dropout of `row_keys.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.kernels import Kernels, Platform
from jaxdistill.models.config import EncoderConfig
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Bool, Float, Int, Num

# query, key, value [B, S, D] -> context [B, S, D]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_LARGEST_HEAD = 128  # of cuDNN's on Ampere; on Hopper 256


def attention_kernel(kernels: Kernels, config: EncoderConfig, dtype, *, dropout: bool) -> str:
    """Which implementation `forward` takes for an encoder: "plain" or "cudnn".

    Args:
      dtype: of the matrix products.
      dropout: whether weights are dropped in this pass: of a student in training, at a rate over 0; never of a teacher.
    """
    if kernels.attention != "auto":
        return kernels.attention
    return "plain" if not_by_cudnn(kernels.platform, config, dtype, dropout=dropout) else "cudnn"


def not_by_cudnn(platform: Platform, config: EncoderConfig, dtype, *, dropout: bool) -> str | None:
    """Why cuDNN cannot compute this attention, and what would let it; None: it can (on a card of Ampere or newer)."""
    if platform != "gpu":
        return f"cudnn runs on NVIDIA's GPUs, and the devices are of kind {platform}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cudnn has no {jnp.dtype(dtype).name} attention; set training.precision to bfloat16"
    if config.head_size % 8 or config.head_size > _LARGEST_HEAD:
        return f"cudnn wants heads of a multiple of 8 up to {_LARGEST_HEAD}, not of {config.head_size}"
    if dropout:
        return "cudnn cannot draw the keyed dropout of attention weights; set training.attention_dropout to 0"
    return None


def attention(
    kernels: Kernels,
    config: EncoderConfig,
    dtype,
    attention_mask: Num[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
    dropout: RowKeys | None,
) -> Attention:
    """The attention of one pass over these rows, for every block of an encoder.

    cuDNN reads the padding of unpacked rows as their number of tokens: it has to be at their end (as in every store of rows).
    """
    if attention_kernel(kernels, config, dtype, dropout=dropout is not None and config.attention_dropout > 0) == "cudnn":
        return _cudnn(config, attention_mask, segment_ids)
    visible = visible_keys(attention_mask, segment_ids)
    return lambda query, key, value: plain_attention(query, key, value, visible, config, dropout)


def plain_attention(
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
    query, key, value = (_heads(x, config) for x in (query, key, value))
    scores = jnp.einsum("bknh,bqnh->bnkq", key, query, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(config.head_size**-0.5)
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-2)
    if dropout:
        weights = dropout.dropout(weights, config.attention_dropout)
    context = jnp.einsum("bnkq,bknh->bqnh", weights.astype(value.dtype), value)
    return context.reshape(*context.shape[:2], -1)


def _cudnn(config: EncoderConfig, attention_mask: jax.Array, segment_ids: jax.Array | None) -> Attention:
    odd = attention_mask.shape[1] % 2  # cuDNN has no gradient for odd lengths: a slot that nobody sees
    mask = jnp.pad(attention_mask > 0, ((0, 0), (0, odd)))
    hidden: dict[str, jax.Array] = {}
    if segment_ids is None:
        # A row of padding sees its first slot: no key at all would make its queries infinite.
        hidden["key_value_seq_lengths"] = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    else:
        segments = jnp.pad(segment_ids, ((0, 0), (0, odd)))
        hidden["mask"] = mask[:, None, None, :] & (segments[:, None, :, None] == segments[:, None, None, :])

    def attend(query, key, value):
        split = [jnp.pad(_heads(x, config), ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (query, key, value)]
        context = jax.nn.dot_product_attention(*split, **hidden, scale=config.head_size**-0.5, implementation="cudnn")
        return context[:, : query.shape[1]].reshape(query.shape)

    return attend


def _heads(x: jax.Array, config: EncoderConfig) -> jax.Array:
    return x.reshape(*x.shape[:2], config.num_heads, config.head_size)


def visible_keys(attention_mask, segment_ids) -> Bool[Array, "B 1 S Q"]:
    """Which keys a query sees: real tokens, and with packed rows those of its own segment (Q is S then, else 1)."""
    real = (attention_mask > 0)[:, None, :, None]
    if segment_ids is None:
        return real
    return real & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
