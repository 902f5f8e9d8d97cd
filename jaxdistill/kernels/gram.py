"""Relation and attention MSE from d x d products: the squares of S x S differences without the differences.

With queries a and keys b of the student, t and v of the teacher, and [a; t] their numbers side by side,

    || a b^T - t v^T ||^2 = || [a; t] [b; -v]^T ||^2 = < [a; t]^T [a; t], [b; -v]^T [b; -v] >,

an inner product of two Gram matrices of size d_s + d_t. In a packed row the texts do not see each other: there, and where a row is
no longer than d_s + d_t, the scores themselves are fewer numbers or the only ones, and are taken in blocks of queries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.kernels.choice import ON_CPU, Kernels
from jaxdistill.losses.relations import paired, split_relation_heads, visible_pairs
from jaxdistill.shapes import Array, Float, Int, Num

_BLOCK_ELEMENTS = 2**24  # scores of one block of queries, of the whole batch


def relation_mse(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_relation_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    student_keys: Float[Array, "B S Ds"] | None = None,
    teacher_keys: Float[Array, "B S Dt"] | None = None,
    kernels: Kernels = ON_CPU,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.relation_mse`; `kernels.relations: plain` is that formula itself.

    Raises:
      ValueError: R does not divide one of the widths, or keys of one side only.
    """
    if kernels.relations == "plain":
        keys = {"student_keys": student_keys, "teacher_keys": teacher_keys}
        return losses.relation_mse(student, teacher, mask, num_relation_heads=num_relation_heads, segment_ids=segment_ids, **keys)
    sides = paired((student, teacher), (student_keys, teacher_keys), mask)
    return _squares(sides, mask, segment_ids, num_relation_heads, scaled=False)


def attention_mse(
    student_query: Float[Array, "B S Ds"],
    student_key: Float[Array, "B S Ds"],
    teacher_query: Float[Array, "B S Dt"],
    teacher_key: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    kernels: Kernels = ON_CPU,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.attention_mse`; `kernels.relations: plain` is that formula itself."""
    if kernels.relations == "plain":
        vectors = student_query, student_key, teacher_query, teacher_key
        return losses.attention_mse(*vectors, mask, num_heads=num_heads, segment_ids=segment_ids)
    sides = paired((student_query, teacher_query), (student_key, teacher_key), mask)
    return _squares(sides, mask, segment_ids, num_heads, scaled=True)


def _squares(sides, mask, segment_ids, num_heads: int, *, scaled: bool):
    heads = [[split_relation_heads(x, num_heads) for x in side] for side in sides]
    if scaled:
        heads = [[queries * jnp.float32(queries.shape[-1] ** -0.5), keys] for queries, keys in heads]
    length, size = mask.shape[1], sum(side[0].shape[-1] for side in heads)
    real = (mask > 0).astype(jnp.float32)
    if segment_ids is None and length > size:
        tokens = jnp.sum(real, axis=1)
        return _by_gram_matrices(*heads), jnp.sum(jnp.square(tokens)) * num_heads
    segments = jnp.where(mask > 0, 1 if segment_ids is None else segment_ids, 0)
    return _by_query_blocks(*heads, segments)


def _by_gram_matrices(student, teacher):
    (a, b), (t, v) = student, teacher
    if a.shape[-1] == t.shape[-1]:
        # a b^T - t v^T = (a - t) b^T + t (b - v)^T: with a student close to its teacher every term is small, none cancels.
        left, right = jnp.concatenate([a - t, t], axis=-1), jnp.concatenate([b, b - v], axis=-1)
    else:
        left, right = jnp.concatenate([a, t], axis=-1), jnp.concatenate([b, -v], axis=-1)
    return jnp.sum(_gram(left) * _gram(right))


def _gram(vectors: Float[Array, "B R S H"]) -> Float[Array, "B R H H"]:
    # What is left is a difference of large sums: the products need every bit, and are few.
    return jnp.einsum("brsh,brsg->brhg", vectors, vectors, precision=jax.lax.Precision.HIGHEST)


def _by_query_blocks(student, teacher, segments):
    """(sum, count); the scores of a block are computed again for the gradient."""
    batch, heads, length, _ = student[0].shape
    fitting = max(_BLOCK_ELEMENTS // (batch * heads * length), 1)
    blocks = -(-length // fitting)
    size = -(-length // blocks)

    def cut(x, dim: int):
        padding = [(0, blocks * size - length) if i == dim else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, padding)
        return jnp.moveaxis(padded.reshape(*x.shape[:dim], blocks, size, *x.shape[dim + 1 :]), dim, 0)

    @jax.checkpoint
    def of_block(student_queries, teacher_queries, rows):
        scores = [
            jnp.einsum("brqh,brkh->brqk", queries, keys) for queries, keys in ((student_queries, student[1]), (teacher_queries, teacher[1]))
        ]
        pairs = visible_pairs(segments, None) & (rows[:, None, :, None] == segments[:, None, None, :])
        difference = jnp.where(pairs, scores[0] - scores[1], 0.0)
        return jnp.sum(jnp.square(difference)), jnp.sum(pairs.astype(jnp.float32)) * heads

    def body(total, block):
        return jax.tree.map(jnp.add, total, of_block(*block)), None

    parts = cut(student[0], 2), cut(teacher[0], 2), cut(segments, 1)
    return jax.lax.scan(body, (jnp.float32(0.0), jnp.float32(0.0)), parts)[0]
