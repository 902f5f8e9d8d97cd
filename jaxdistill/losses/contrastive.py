"""Contrastive loss on text vectors: the teacher's vector of the same text among those of other texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.losses.hidden import unit_vectors
from jaxdistill.shapes import Array, Float, Num


def hidden_contrastive(
    student: Float[Array, "B P"],
    teacher: Float[Array, "B P"],
    *,
    temperature: float | Float[Array, ""],
    mask: Num[Array, " B"] | None = None,
    negatives: Float[Array, "K P"] | None = None,
    negatives_mask: Num[Array, " K"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE: -log softmax over texts j of cos(student i, teacher j) / temperature, read at j = i.

    Hid-CLS-Contrast of wang2023, after CoDIR (Sun et al. 2020). Over the global batch only: every row is a negative of
    the others, so parts of a batch do not add up to the batch. Both sides get a gradient, for both have a projection to
    train; a frozen teacher is stopped by the caller, before its projection.

    Args:
      student, teacher: projected vectors, one row per text; any float dtype and length. A zero vector has cosine 0.
      temperature: of the cosines; 0.07 in wang2023.
      mask: nonzero = a row that counts and is a negative of the others; None: all.
      negatives: more of the teacher's vectors (a memory bank), negatives of every row.
      negatives_mask: nonzero = a filled place of the bank; None: all.

    Returns:
      (sum, count): nats summed over the counted rows, and their number.
    """
    batch = student.shape[0]
    counted = jnp.ones((batch,), bool) if mask is None else mask != 0

    def scores(vectors, rows):
        keys = unit_vectors(jnp.where(rows[:, None], vectors, 0))
        # Full precision: a small temperature magnifies what a product in bfloat16 rounds away.
        cosines = jnp.matmul(queries, keys.T, precision="highest")
        return jnp.where(rows[None], cosines / temperature, jnp.finfo(jnp.float32).min)

    queries = unit_vectors(jnp.where(counted[:, None], student, 0))
    among = scores(teacher, counted)
    if negatives is not None:
        filled = jnp.ones(negatives.shape[:1], bool) if negatives_mask is None else negatives_mask != 0
        among = jnp.concatenate([among, scores(negatives, filled)], axis=1)
    own = jnp.eye(*among.shape, dtype=bool) & counted[:, None]
    return -jnp.sum(jnp.where(own, jax.nn.log_softmax(among, axis=-1), 0.0)), jnp.sum(counted.astype(jnp.float32))
