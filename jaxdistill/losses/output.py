"""Losses on the logits: the teacher's distribution over the vocabulary, and the masked tokens themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.shapes import Array, Float, Int, Num


def output_kl(
    student_logits: Float[Array, "B S V"],
    teacher_logits: Float[Array, "B S V"],
    mask: Num[Array, "B S"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of the output distributions.

    udagawa2023 eq. 5; Hinton et al. 2015 section 2, whose T^2 keeps the gradient's size when T changes.

    Args:
      student_logits, teacher_logits: over the same vocabulary; any float dtype.
      mask: nonzero = counted: the real tokens, or the masked ones alone.
      temperature: T; a traced scalar may change from step to step.

    Returns:
      (sum, count): nats times T^2 summed over the counted tokens, and their number.
    """
    counted = mask != 0

    def log_probabilities(logits):
        return jax.nn.log_softmax(jnp.where(counted[..., None], logits, 0).astype(jnp.float32) / temperature, axis=-1)

    teacher_log = jax.lax.stop_gradient(log_probabilities(teacher_logits))
    divergence = jnp.sum(jnp.exp(teacher_log) * (teacher_log - log_probabilities(student_logits)))
    return divergence * temperature * temperature, jnp.sum(counted.astype(jnp.float32))


def mlm_cross_entropy(logits: Float[Array, "B S V"], labels: Int[Array, "B S"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the tokens to predict, the masked language model of BERT (Devlin et al. 2019, section 3.1).

    Args:
      logits: any float dtype.
      labels: token ids, -100 = not predicted. Another label outside the vocabulary makes the sum NaN.

    Returns:
      (sum, count): nats summed over the predicted tokens, and their number.
    """
    predicted = labels != -100
    log = jax.nn.log_softmax(jnp.where(predicted[..., None], logits, 0).astype(jnp.float32), axis=-1)
    # Negative ids would count from the end of the vocabulary.
    places = jnp.where(predicted, jnp.where(labels < 0, logits.shape[-1], labels), 0)
    own = jnp.take_along_axis(log, places[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return -jnp.sum(jnp.where(predicted, own, 0.0)), jnp.sum(predicted.astype(jnp.float32))
