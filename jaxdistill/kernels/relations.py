"""Relation and attention KL block by block, value and gradient in one pass.

The plain form holds several [B, R, S, S] arrays for each kind of vectors and walks them again for the gradient. Here one
block of relation heads is finished before the next is begun: its scores stay in cache, memory is one block, and since the
cotangent of a sum is one scalar the gradient can be written down in the forward pass,

    d KL / d q = delta k / sqrt(d),   d KL / d k = delta^T q / sqrt(d),   delta = (P_S - P_T) on rows of real queries,

and their sum where queries and keys are the same vectors.

On a CPU (16 x 128 tokens, R 48, width 384) this takes 19 ms for a kind instead of 84, and 12 MB instead of 255.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdistill.losses.relations import check_keys, visible_pairs, zero_padding
from jaxdistill.shapes import Array, Float, Int, Num
from jaxdistill.sharding import LOGICAL_TO_MESH

# Scores of one block: what fits in a core's cache, or what fills an accelerator.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_ACCELERATOR_BLOCK_ELEMENTS = 2**26


def relation_kl(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_relation_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    student_keys: Float[Array, "B S Ds"] | None = None,
    teacher_keys: Float[Array, "B S Dt"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.relation_kl`; no gradient reaches the teacher. Under a mesh each device does its own rows and heads."""
    check_keys(student_keys, teacher_keys)
    # A side is (vectors,) or (queries, keys): its first and last are what is multiplied.
    student, teacher = (
        tuple(zero_padding(x, mask) for x in side if x is not None) for side in ((student, student_keys), (teacher, teacher_keys))
    )
    teacher = jax.lax.stop_gradient(teacher)
    for vectors in (*student, *teacher):
        if vectors.shape[-1] % num_relation_heads:
            raise ValueError(f"{num_relation_heads} relation heads do not divide the hidden size {vectors.shape[-1]}")
    segments = (mask > 0).astype(jnp.int32) if segment_ids is None else jnp.where(mask > 0, segment_ids, 0)
    count = jnp.sum((mask > 0).astype(jnp.float32)) * num_relation_heads
    mesh = jax.sharding.get_abstract_mesh()
    batch, heads = LOGICAL_TO_MESH["batch"], LOGICAL_TO_MESH["heads"]
    if mesh.empty or mesh.size == 1:
        return _divergence(student, teacher, segments, num_relation_heads), count
    if mask.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        batch = None
    if num_relation_heads % mesh.shape["tensor"]:
        heads = None
    local_heads = num_relation_heads // (mesh.shape["tensor"] if heads else 1)
    axes = tuple(axis for axis in (*(batch or ()), heads) if axis)

    def local(student, teacher, segments):
        return jax.lax.psum(_divergence(student, teacher, segments, local_heads), axes)

    vectors, rows = PartitionSpec(batch, None, heads), PartitionSpec(batch)
    total = jax.shard_map(local, in_specs=(vectors, vectors, rows), out_specs=PartitionSpec(), check_vma=False)
    return total(student, teacher, segments), count


def attention_kl(
    student_query: Float[Array, "B S Ds"],
    student_key: Float[Array, "B S Ds"],
    teacher_query: Float[Array, "B S Dt"],
    teacher_key: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.attention_kl`."""
    keys = {"student_keys": student_key, "teacher_keys": teacher_key}
    return relation_kl(student_query, teacher_query, mask, num_relation_heads=num_heads, segment_ids=segment_ids, **keys)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _divergence(student, teacher, segments, num_relation_heads: int) -> jax.Array:
    """Sum of the KL over real queries and heads. Segments [B, S]: 0 = padding; a query sees keys of its own number."""
    return _scan_blocks(_block_value, student, teacher, segments, num_relation_heads)[0]


def _forward(student, teacher, segments, num_relation_heads: int):
    total, gradients = _scan_blocks(_block_value_and_gradient, student, teacher, segments, num_relation_heads)
    joined = tuple(_join_blocks(gradient, own.shape).astype(own.dtype) for gradient, own in zip(gradients, student, strict=True))
    return total, (joined, teacher)


def _backward(num_relation_heads: int, residual, cotangent):
    gradients, teacher = residual
    scaled = tuple((cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients)
    return scaled, jax.tree.map(jnp.zeros_like, teacher), None


_divergence.defvjp(_forward, _backward)


def _scan_blocks(block, student, teacher, segments, num_relation_heads: int):
    """`block` over groups of relation heads, one after the other: the summed values, and the stacked rest."""
    group = _heads_per_block(segments.shape[0] * num_relation_heads, segments.shape[1])
    split = partial(_split_blocks, num_relation_heads=num_relation_heads, group=group)
    rows = jnp.repeat(segments, num_relation_heads, axis=0).reshape(-1, group, segments.shape[1])

    def body(total, operands):
        value, rest = block(*operands)
        return total + value, rest

    return jax.lax.scan(body, jnp.float32(0.0), (*jax.tree.map(split, (student, teacher)), rows))


def _heads_per_block(num_heads: int, length: int) -> int:
    """The largest divisor of `num_heads` (of the whole batch) whose scores make one block."""
    fitting = max(_BLOCK_ELEMENTS.get(jax.default_backend(), _ACCELERATOR_BLOCK_ELEMENTS) // length**2, 1)
    return max(n for n in range(1, min(num_heads, fitting) + 1) if num_heads % n == 0)


def _split_blocks(vectors: Float[Array, "B S D"], num_relation_heads: int, group: int) -> Float[Array, "blocks G S H"]:
    batch, length, width = vectors.shape
    heads = vectors.astype(jnp.float32).reshape(batch, length, num_relation_heads, width // num_relation_heads)
    return heads.transpose(0, 2, 1, 3).reshape(-1, group, length, width // num_relation_heads)


def _join_blocks(heads: Float[Array, "blocks G S H"], shape: tuple[int, int, int]) -> Float[Array, "B S D"]:
    _, _, length, size = heads.shape
    return heads.reshape(shape[0], -1, length, size).transpose(0, 2, 1, 3).reshape(shape)


def _softmax(queries: Float[Array, "G S H"], keys: Float[Array, "G S H"], visible):
    """Scores, their softmax over visible keys, the highest score of each query, and the log-sum-exp above it."""
    scores = jnp.einsum("gqh,gkh->gqk", queries, keys) * jnp.float32(queries.shape[-1] ** -0.5)
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return scores, weights / total, peak, jnp.log(total)[..., 0]


def _compare(student, teacher, segments):
    visible = visible_pairs(segments, segments)[:, 0]
    real = (segments > 0).astype(jnp.float32)
    student_scores, student_weights, student_peak, student_total = _softmax(student[0], student[-1], visible)
    teacher_scores, teacher_weights, teacher_peak, teacher_total = _softmax(teacher[0], teacher[-1], visible)
    # Peaks are taken off within the sum: large scores cancel there, and would leave their rounding behind outside it.
    difference = (teacher_scores - student_scores) - (teacher_peak - student_peak)
    difference = jnp.where(visible, teacher_weights * difference, 0.0)
    divergence = jnp.sum(difference, axis=-1) - teacher_total + student_total
    return jnp.sum(divergence * real), (student_weights - teacher_weights) * real[..., None]


def _block_value(student, teacher, segments):
    return _compare(student, teacher, segments)[0], ()


def _block_value_and_gradient(student, teacher, segments):
    value, delta = _compare(student, teacher, segments)
    queries, keys = student[0], student[-1]
    scale = jnp.float32(queries.shape[-1] ** -0.5)
    to_queries, to_keys = jnp.einsum("gqk,gkh->gqh", delta, keys), jnp.einsum("gqk,gqh->gkh", delta, queries)
    return value, ((to_queries + to_keys) * scale,) if len(student) == 1 else (to_queries * scale, to_keys * scale)
