"""What one step changes of a student: its parameters, unless their gradient is not finite or the loss is a spike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxdistill.models import EncoderConfig
from jaxdistill.objective import features_read, loss
from jaxdistill.parts import BoundTerm, TextVectors

Input = Literal["clean", "masked"]
WARM_UP = 100  # losses in a running mean before anything is held against it, and the number of steps that it looks back


@dataclass(frozen=True)
class Student:
    """What stays fixed of a student in a run; its arrays are in `StudentState`."""

    name: str
    config: EncoderConfig
    terms: tuple[BoundTerm, ...]
    optimizer: optax.GradientTransformation
    input: Input = "clean"

    @property
    def has_mlm_head(self) -> bool:
        return any(feature.kind == "logits" for feature in features_read(self.terms)[0])

    @property
    def has_classifier(self) -> bool:
        return any(feature.kind == "label_logits" for feature in features_read(self.terms)[0])


@jax.tree_util.register_dataclass
@dataclass
class StudentState:
    """`trained` holds "params" (the encoder and the heads that a loss reads) and "projections" that no export contains."""

    trained: dict
    optimizer: optax.OptState
    memory: dict  # term -> {"vectors": [K, Dt], "mask": [K]}: the teacher's text vectors of past rows
    failures: Any  # int32: updates in a row that were skipped
    loss_means: Any  # float32 [parts of the loss]: running means, without their weights
    losses_seen: Any  # int32 [parts]: values in those means, at most WARM_UP


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Arrays, or what stands for them (ShapeDtypeStructs, shardings)."""

    step: Any  # int32: updates done, and with it the position in the data
    students: dict[str, StudentState]


@jax.named_scope("update")
def update(
    students: Sequence[Student], state: TrainState, gradients: dict, parts: dict, vectors: dict, *, freeze_after: int, spike_factor: float
) -> tuple[TrainState, dict]:
    """Every student's next state.

    Args:
      parts: student -> part -> (sum, count) over the global batch.
      vectors: (input, feature) -> the teacher's text vectors, for memory banks.

    Returns:
      The state, and student -> {"parts", "gradient_norm", "skipped", "spiked", "failures"}.
    """
    updated, metrics = {}, {}
    for student in students:
        own, old = gradients[student.name], state.students[student.name]
        norm = optax.tree.norm(own)
        spiked, means, seen = _losses(student, old, parts[student.name], state.step, spike_factor)
        good = jnp.isfinite(norm) & ~spiked & (old.failures < freeze_after)

        def step(old: StudentState, own=own, norm=norm, optimizer=student.optimizer) -> tuple[dict, optax.OptState]:
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of int32 counters
                updates, new = optimizer.update(own, old.optimizer, old.trained, gradient_norm=norm)
            return optax.apply_updates(old.trained, updates), new

        # A branch, not a selection between results: what is kept is not copied.
        trained, optimizer = jax.lax.cond(good, step, lambda old: (old.trained, old.optimizer), old)
        failures = jnp.where(good, 0, old.failures + 1)  # goes on counting when frozen: since when can be told
        updated[student.name] = StudentState(trained, optimizer, _remembered(student, old, vectors), failures, means, seen)
        flags = {"skipped": (~good).astype(jnp.int32), "spiked": spiked.astype(jnp.int32)}
        metrics[student.name] = {"parts": parts[student.name], "gradient_norm": norm, "failures": failures} | flags
    return TrainState(state.step + 1, updated), metrics


def _losses(student: Student, old: StudentState, parts: dict, step, spike_factor: float):
    """Whether this step's loss is a spike; the running means and how many values are in each.

    The loss is held against the one that its parts' means would give with the weights of this step, so that a schedule of weights is
    no spike. A part enters the means with at most `spike_factor` times its own, so that a change of scale that stays is taken for
    the new usual after some steps.
    """
    names = [part.name for term in student.terms for part in term.parts]
    sums, counts = ({name: parts[name][i] for name in names} for i in (0, 1))
    values = jnp.stack([sums[name] / jnp.maximum(counts[name], 1.0) for name in names])
    means, seen = old.loss_means, old.losses_seen
    known = (seen >= WARM_UP) & (means > 0)
    spiked = jnp.bool_(False)
    if spike_factor:
        one = dict.fromkeys(names, jnp.float32(1.0))
        now, usual = (loss(student.terms, dict(zip(names, jnp.where(known, x, 0.0), strict=True)), one, step) for x in (values, means))
        spiked = now > spike_factor * jnp.where(usual > 0, usual, jnp.inf)
        values = jnp.where(known, jnp.minimum(values, spike_factor * means), values)
    counted = jnp.stack([counts[name] for name in names]) > 0
    counted &= jnp.isfinite(values)
    means = jnp.where(counted, means + (values - means) / (seen + 1).astype(jnp.float32), means)
    return spiked, means, jnp.where(counted, jnp.minimum(seen + 1, WARM_UP), seen)


def _remembered(student: Student, old: StudentState, vectors: dict) -> dict:
    """The memory banks with this batch's rows in front; the oldest fall out."""
    memory = {}
    for term in student.terms:
        if term.memory_bank:
            feature, size = term.memory_bank
            new, bank = flat(vectors[student.input, feature]), old.memory[term.name]
            joined = {"vectors": jnp.concatenate([new.vectors.astype(jnp.float32), bank["vectors"]]),
                      "mask": jnp.concatenate([new.mask, bank["mask"]])}  # fmt: skip
            memory[term.name] = {name: array[:size] for name, array in joined.items()}
    return memory


def flat(vectors: TextVectors) -> TextVectors:
    """[A, B, ...] as [A * B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), vectors)
