"""Direct transfer (DirectMiniLM): the vectors themselves, head by head through a learned matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.losses.relations import zero_padding
from jaxdistill.shapes import Array, Float, Num


def direct_mse(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    projection: Float[Array, "R Hs Ht"],
    mask: Num[Array, "B S"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference between each of the student's heads, times its matrix, and the teacher's head: A_S W - A_T.

    udagawa2023 eq. 10. The matrices are rounded to the student's dtype; products and sums are float32.

    Args:
      student, teacher: vectors of one kind (query, key or value) from one layer, heads side by side; any float dtype.
      projection: W, a matrix [Ds/R, Dt/R] for each of the R heads.
      mask: 1 = real token.

    Returns:
      (sum, count): squares summed over real tokens and the teacher's width, and their number (real tokens x Dt).

    Raises:
      ValueError: the projection does not lead from Ds to Dt.
    """
    num_heads, student_size, teacher_size = projection.shape
    if (student.shape[-1], teacher.shape[-1]) != (num_heads * student_size, num_heads * teacher_size):
        raise ValueError(
            f"projection {projection.shape} leads from {num_heads * student_size} to {num_heads * teacher_size} numbers: "
            f"it does not fit student {student.shape} and teacher {teacher.shape}"
        )
    heads = zero_padding(student, mask).reshape(*student.shape[:2], num_heads, student_size)
    # Both in the student's dtype, so that float32 products are exact; XLA on CPU lacks a batched bfloat16 product with float32 sums.
    heads, weights = heads.astype(jnp.float32), projection.astype(student.dtype).astype(jnp.float32)
    projected = jnp.einsum("bsrh,rhk->bsrk", heads, weights).reshape(teacher.shape)
    difference = zero_padding(projected - jax.lax.stop_gradient(teacher).astype(jnp.float32), mask)
    return jnp.sum(jnp.square(difference)), jnp.sum((mask > 0).astype(jnp.float32)) * teacher.shape[-1]
