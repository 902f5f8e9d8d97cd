"""Attention of the encoders: the formula, which every device computes, cuDNN's fused form of it on NVIDIA and splash on TPUs.

All give the same context. The fused ones keep no [B, N, S, S] array; they cannot draw the dropout of `row_keys.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdistill.kernels import Kernels
from jaxdistill.models.config import EncoderConfig
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Bool, Float, Int, Num
from jaxdistill.sharding import LOGICAL_TO_MESH

# query, key, value [B, S, D] -> context [B, S, D]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
_FUSED = {"gpu": "cudnn", "tpu": "splash"}
_LARGEST_CUDNN_HEAD = 128  # on Ampere; on Hopper 256
_SPLASH_BLOCKS = (512, 256, 128)  # slots of a row that one program holds
_SHORTEST_SPLASH = 512  # below it XLA keeps the weights of a row on the chip, and splash gains nothing


def attention_kernel(kernels: Kernels, config: EncoderConfig, dtype, length: int, *, dropout: bool) -> str:
    """Which implementation `forward` takes for an encoder: "plain", "cudnn" or "splash".

    Args:
      dtype: of the matrix products.
      length: slots of a row.
      dropout: whether weights are dropped in this pass: of a student in training, at a rate over 0; never of a teacher.
    """
    if kernels.attention != "auto":
        return kernels.attention
    name = _FUSED.get(kernels.platform)
    if name is None or (name == "splash" and length < _SHORTEST_SPLASH):
        return "plain"
    return "plain" if not_fused(name, kernels, config, dtype, length, dropout=dropout) else name


def not_fused(name: str, kernels: Kernels, config: EncoderConfig, dtype, length: int, *, dropout: bool) -> str | None:
    """Why cudnn or splash cannot compute this attention, and what would let it; None: it can (cudnn from Ampere on)."""
    if _FUSED.get(kernels.platform) != name and not (name == "splash" and kernels.interpret):
        return f"{name} is for {'NVIDIA GPUs' if name == 'cudnn' else 'TPUs'}, and the devices are of kind {kernels.platform}"
    if jnp.dtype(dtype) != jnp.bfloat16 and not kernels.interpret:
        return f"{name} multiplies in bfloat16, and training.precision is {jnp.dtype(dtype).name}"
    if name == "cudnn" and (config.head_size % 8 or config.head_size > _LARGEST_CUDNN_HEAD):
        return f"cudnn wants heads of a multiple of 8 up to {_LARGEST_CUDNN_HEAD}, not of {config.head_size}"
    if name == "splash" and length % _SPLASH_BLOCKS[-1]:
        return f"splash wants rows of a multiple of {_SPLASH_BLOCKS[-1]}, and data.sequence_length is {length}"
    if dropout:
        return f"{name} cannot drop attention weights by row keys; set training.attention_dropout to 0"
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
    drops = dropout is not None and config.attention_dropout > 0
    name = attention_kernel(kernels, config, dtype, attention_mask.shape[1], dropout=drops)
    if name != "plain":
        fused = (_cudnn if name == "cudnn" else _splash)(kernels, config, attention_mask, segment_ids)
        if dropout is None:
            return fused
        # The site of the weights is passed over, so that what is dropped elsewhere does not depend on the kernel.
        return lambda query, key, value: fused(dropout.dropout(query, 0.0), key, value)
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


def _cudnn(kernels: Kernels, config: EncoderConfig, attention_mask: jax.Array, segment_ids: jax.Array | None) -> Attention:
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


def _splash(kernels: Kernels, config: EncoderConfig, attention_mask: jax.Array, segment_ids: jax.Array | None) -> Attention:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    length = attention_mask.shape[1]
    # Padding is a segment of its own: its slots see one another.
    segments = jnp.where(attention_mask > 0, jnp.int32(1) if segment_ids is None else segment_ids, 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    block = next(size for size in _SPLASH_BLOCKS if length % size == 0)
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})

    def local(query, key, value, segments):
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((length, length))] * query.shape[2])
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=kernels.interpret)
        by_head = [x.transpose(0, 2, 1, 3) for x in (query, key, value)]
        context = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(*by_head, segments)
        return context.transpose(0, 2, 1, 3)

    def attend(query, key, value):
        scaled = query * jnp.asarray(config.head_size**-0.5, query.dtype)
        split = [_heads(x, config) for x in (scaled, key, value)]
        return _on_each_device(local, split, segments).reshape(query.shape)

    return attend


def _on_each_device(local: Callable, split: list[jax.Array], segments: jax.Array) -> jax.Array:
    """The compiler cannot split a Pallas kernel: under a mesh each device calls it with its own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(*split, segments)
    batch, heads = LOGICAL_TO_MESH["batch"], LOGICAL_TO_MESH["heads"]
    batch = None if segments.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) else batch
    heads = None if split[0].shape[2] % mesh.shape[heads] else heads
    vectors = PartitionSpec(batch, None, heads)
    specs = (vectors, vectors, vectors, PartitionSpec(batch))
    return jax.shard_map(local, in_specs=specs, out_specs=vectors, check_vma=False)(*split, segments)


def _heads(x: jax.Array, config: EncoderConfig) -> jax.Array:
    return x.reshape(*x.shape[:2], config.num_heads, config.head_size)


def visible_keys(attention_mask, segment_ids) -> Bool[Array, "B 1 S Q"]:
    """Which keys a query sees: real tokens, and with packed rows those of its own segment (Q is S then, else 1)."""
    real = (attention_mask > 0)[:, None, :, None]
    if segment_ids is None:
        return real
    return real & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
