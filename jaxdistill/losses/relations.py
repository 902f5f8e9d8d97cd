"""Self-attention relations (MiniLMv2): how the tokens of a text relate, under queries, keys or values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.shapes import Array, Bool, Float, Int, Num


def split_relation_heads(vectors: Float[Array, "B S D"], num_relation_heads: int) -> Float[Array, "B R S H"]:
    """[B, S, D] -> R heads of D/R numbers each, whatever the native heads are; float32.

    Raises:
      ValueError: R does not divide D.
    """
    batch, length, width = vectors.shape
    if width % num_relation_heads:
        raise ValueError(f"{num_relation_heads} relation heads do not divide the hidden size {width}")
    heads = vectors.astype(jnp.float32).reshape(batch, length, num_relation_heads, width // num_relation_heads)
    return heads.transpose(0, 2, 1, 3)


def visible_pairs(mask: Num[Array, "B S"], segment_ids: Int[Array, "B S"] | None) -> Bool[Array, "B 1 Q S"]:
    """Which keys a query sees: real tokens, with packed rows those of its own segment (Q is S then, else 1)."""
    visible = (mask > 0)[:, None, None, :]
    if segment_ids is None:
        return visible
    return visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def log_relations(
    vectors: Float[Array, "B S D"], visible: Bool[Array, "B 1 Q S"], num_relation_heads: int
) -> Float[Array, "B R S S"]:
    """log softmax(A A^T / sqrt(D/R)) over the visible keys (udagawa2023 eq. 7); finite where a query sees nothing."""
    heads = split_relation_heads(vectors, num_relation_heads)
    scores = jnp.einsum("brqh,brkh->brqk", heads, heads) * jnp.float32(heads.shape[-1] ** -0.5)
    return jax.nn.log_softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)


def relation_kl(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_relation_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """KL(teacher relations || student relations) of one kind of vectors: query, key or value.

    udagawa2023 eq. 7-9; MiniLMv2 (Wang et al. 2021) section 3.1. Each side is re-split into R relation heads of its own
    size D/R and scaled by that size. This is the plain form, [B, R, S, S] in memory, and the oracle of faster ones.

    Args:
      student, teacher: vectors of one kind from one layer, native heads side by side; any float dtype.
      mask: 1 = real token.
      num_relation_heads: R, a divisor of Ds and Dt, free of the native head counts.
      segment_ids: numbers of the texts packed in a row, 0 = padding; None: a row is one text.

    Returns:
      (sum, count): nats summed over the counted queries and relation heads, and their number (real tokens x R).

    Raises:
      ValueError: R does not divide one of the widths.
    """
    visible = visible_pairs(mask, segment_ids)
    student_log = log_relations(student, visible, num_relation_heads)
    teacher_log = jax.lax.stop_gradient(log_relations(teacher, visible, num_relation_heads))
    difference = jnp.where(visible, teacher_log - student_log, 0.0)
    divergence = jnp.sum(jnp.exp(teacher_log) * difference, axis=-1)
    real = (mask > 0).astype(jnp.float32)
    return jnp.sum(divergence * real[:, None, :]), jnp.sum(real) * num_relation_heads
