"""A target made of several teacher layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdistill.losses.hidden import in_teacher_width, unit_vectors
from jaxdistill.shapes import Array, Float, Num


def attended_layers(
    student: Float[Array, "B S Ds"],
    teachers: Sequence[Float[Array, "B S Dt"]],
    mask: Num[Array, "B S"],
    projection: Float[Array, "_ _"] | None = None,
    *,
    temperature: float,
) -> Float[Array, "B S Dt"]:
    """For each token the teacher's layers, weighted by softmax(cos(student, layer) / temperature); float32.

    Attention over layers as in ALP-KD (Passban et al. 2021), with cosines, and token by token, so that neither padding nor
    packing shows. No gradient passes through the weights: they follow the student as it learns.

    Args:
      student: hidden states of one student layer; any float dtype.
      teachers: hidden states of the teacher's layers.
      mask: 1 = real token; the target is zero elsewhere.
      projection: [Ds, Dt], where the widths differ.
      temperature: of the cosines; small: nearly one layer, large: their mean.

    Raises:
      ValueError: the widths do not fit, as `hidden_mse`.
    """
    vectors = [in_teacher_width(student, teacher, mask, projection) for teacher in teachers]
    query = unit_vectors(vectors[0][0])
    scores = jnp.stack([jnp.sum(query * unit_vectors(layer), axis=-1) for _, layer in vectors])
    weights = jax.nn.softmax(scores / temperature, axis=0)
    return jax.lax.stop_gradient(sum(weight[..., None] * layer for weight, (_, layer) in zip(weights, vectors, strict=True)))
