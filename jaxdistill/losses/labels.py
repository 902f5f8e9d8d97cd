"""Losses on the logits of a classification head: the teacher's distribution over a task's labels, its logits, the labels themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.shapes import Array, Float, Int, Num


def _counted(logits: Float[Array, "B C"], mask: Num[Array, " B"]) -> Float[Array, "B C"]:
    """In float32 and 0 in rows that do not count: before anything is computed, so that a NaN there never comes back in the gradient."""
    return jnp.where((mask != 0)[:, None], logits, 0).astype(jnp.float32)


def label_kl(
    student_logits: Float[Array, "B C"],
    teacher_logits: Float[Array, "B C"],
    mask: Num[Array, " B"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of the classes.

    Prediction layer transfer of wang2023 (section 3); the soft loss of whatslost2023 with T = 2; Hinton et al. 2015, section 2.

    Args:
      student_logits, teacher_logits: of each example over the same classes; any float dtype.
      mask: nonzero = counted; 0 is a row that only fills a batch up.
      temperature: T; a traced scalar may change from step to step.

    Returns:
      (sum, count): nats times T^2 summed over the counted examples, and their number.
    """
    teacher_log = jax.lax.stop_gradient(jax.nn.log_softmax(_counted(teacher_logits, mask) / temperature, axis=-1))
    student_log = jax.nn.log_softmax(_counted(student_logits, mask) / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(teacher_log) * (teacher_log - student_log))
    return divergence * temperature * temperature, jnp.sum((mask != 0).astype(jnp.float32))


def label_cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], mask: Num[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the examples' own labels: what fine-tuning minimises (Devlin et al. 2019, section 4.1).

    Args:
      logits: of each example over the classes; any float dtype.
      labels: 0..C-1. Another one in a counted row makes the sum NaN.
      mask: nonzero = counted.

    Returns:
      (sum, count): nats summed over the counted examples, and their number.
    """
    counted = mask != 0
    log = jax.nn.log_softmax(_counted(logits, mask), axis=-1)
    # Negative numbers would count from the last class.
    places = jnp.where(counted, jnp.where(labels < 0, logits.shape[-1], labels), 0)
    own = jnp.take_along_axis(log, places[:, None], axis=-1, mode="fill", fill_value=jnp.nan)[:, 0]
    return -jnp.sum(jnp.where(counted, own, 0.0)), jnp.sum(counted.astype(jnp.float32))


def label_mse(
    student_logits: Float[Array, "B C"], targets: Float[Array, "B C"], mask: Num[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference of the logits (Ba and Caruana 2014); of a regression, that of the values.

    Args:
      student_logits: of each example; any float dtype.
      targets: the teacher's logits, which get no gradient, or a regression's labels [B, 1].
      mask: nonzero = counted.

    Returns:
      (sum, count): squares summed over the counted examples and the classes, and their number (examples x C).
    """
    difference = _counted(student_logits, mask) - jax.lax.stop_gradient(_counted(targets, mask))
    return jnp.sum(jnp.square(difference)), jnp.sum((mask != 0).astype(jnp.float32)) * student_logits.shape[-1]
