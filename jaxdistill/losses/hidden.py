"""Losses on hidden states: squared distance and angle, through a projection where the widths differ."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.losses.relations import visible_pairs
from jaxdistill.shapes import Array, Float, Int, Num


def first_tokens(mask: Num[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None) -> Int[Array, "B S"]:
    """1 at the first real token (CLS) of every text, whatever side the padding is on; else 0; int32.

    Args:
      mask: 1 = real token.
      segment_ids: numbers of the texts packed in a row, 0 = padding; None: a row is one text.
    """
    real = mask > 0 if segment_ids is None else (mask > 0) & (segment_ids != 0)
    first = jnp.argmax(visible_pairs(mask, segment_ids)[:, 0], axis=-1)  # that a token sees
    return (real & (first == jnp.arange(mask.shape[1])[None])).astype(jnp.int32)


def in_teacher_width(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    projection: Float[Array, "_ _"] | None,
) -> tuple[Float[Array, "B S Dt"], Float[Array, "B S Dt"]]:
    """(student, teacher) in float32, both of the teacher's width and zero under the padding; no gradient to the teacher.

    Raises:
      ValueError: the widths differ and there is no projection, or it is not [Ds, Dt].
    """
    widths = student.shape[-1], teacher.shape[-1]
    # Before anything is computed: a NaN under the padding, once in a product, would come back in the gradient.
    student, teacher = (jnp.where((mask > 0)[..., None], x, 0) for x in (student, teacher))
    if projection is not None:
        if projection.shape != widths:
            raise ValueError(f"hidden sizes {widths[0]} (student) and {widths[1]} (teacher) with a projection of shape {projection.shape}")
        student = jnp.matmul(student, projection.astype(student.dtype), preferred_element_type=jnp.float32)
    elif widths[0] != widths[1]:
        raise ValueError(f"hidden sizes {widths[0]} (student) and {widths[1]} (teacher) differ: a projection is needed")
    return student.astype(jnp.float32), jax.lax.stop_gradient(teacher.astype(jnp.float32))


def unit_vectors(vectors: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length 1; float32. A zero vector (or one too short for a finite gradient) gives zeros, and gets no gradient."""
    vectors = vectors.astype(jnp.float32)
    # The direction does not depend on the scale, so the scale needs no gradient; without it, squares of 1e20 overflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    long = largest > 1e-30
    scaled = jnp.where(long, vectors / jnp.where(long, largest, 1.0), 0.0)
    square = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(long, square, 1.0))


def hidden_mse(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    projection: Float[Array, "_ _"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared distance of the hidden states, (H_S W - H_T)^2.

    udagawa2023 eq. 6; Hid-Seq of wang2023, and with the mask of `first_tokens` their Hid-CLS.

    Args:
      student, teacher: hidden states of one layer; any float dtype.
      mask: 1 = real token.
      projection: W [Ds, Dt], trained with the student; None where Ds = Dt.

    Returns:
      (sum, count): squares summed over the counted tokens and the teacher's width, and their number (tokens x Dt).

    Raises:
      ValueError: the widths differ and there is no projection, or it is not [Ds, Dt].
    """
    student, teacher = in_teacher_width(student, teacher, mask, projection)
    return jnp.sum(jnp.square(student - teacher)), jnp.sum((mask > 0).astype(jnp.float32)) * teacher.shape[-1]


def hidden_cosine(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    projection: Float[Array, "_ _"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """1 - cos of the angle between the hidden states (DistilBERT, Sanh et al. 2019, section 3).

    Args:
      student, teacher: hidden states of one layer; any float dtype. A zero vector has cosine 0 with everything.
      mask: 1 = real token.
      projection: W [Ds, Dt], trained with the student; None where Ds = Dt.

    Returns:
      (sum, count): 1 - cos summed over the counted tokens, and their number.

    Raises:
      ValueError: the widths differ and there is no projection, or it is not [Ds, Dt].
    """
    student, teacher = in_teacher_width(student, teacher, mask, projection)
    cosine = jnp.sum(unit_vectors(student) * unit_vectors(teacher), axis=-1)
    return jnp.sum(jnp.where(mask > 0, 1.0 - cosine, 0.0)), jnp.sum((mask > 0).astype(jnp.float32))
