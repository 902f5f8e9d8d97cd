"""The step: one teacher pass, every student's losses and gradients, one update each; pure, jitted by `distill`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.features import EncoderOutput, Feature
from jaxdistill.models import DropoutKeys, EncoderConfig, forward
from jaxdistill.objective import BoundTerm, features_read, loss, measure
from jaxdistill.students import student_key

Batch = dict[str, jax.Array]  # input_ids, segment_ids: [A, B, S]


@dataclass(frozen=True)
class Student:
    """What stays fixed of a student in a run; its arrays are in `StudentState`."""

    name: str
    config: EncoderConfig
    terms: tuple[BoundTerm, ...]
    optimizer: optax.GradientTransformation


@jax.tree_util.register_dataclass
@dataclass
class StudentState:
    """`trained` holds "params" (the encoder) and, for objectives that need them, "projections" that no export contains."""

    trained: dict
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Arrays, or what stands for them (ShapeDtypeStructs, shardings)."""

    step: Any  # int32: updates done, and with it the position in the data
    students: dict[str, StudentState]


def precision(dtype: str):
    """Of the matrix products: float32 means float32 also where an accelerator would use fewer bits for it; a CPU has no other."""
    return jax.default_matmul_precision("highest" if dtype == "float32" and jax.default_backend() != "cpu" else None)


@dataclass(frozen=True)
class StepSettings:
    """What the step's code depends on beside the students. The teacher's parameters are an argument of the step."""

    teacher: EncoderConfig
    dtype: str  # of the matrix products
    seed: int  # of the students' dropout
    packing: bool  # texts packed in a row do not see each other


def _inputs(batch: Batch, packing: bool):
    mask = (batch["segment_ids"] > 0).astype(jnp.int32)
    return batch["input_ids"], mask, (batch["segment_ids"] if packing else None)


def teacher_features(settings: StepSettings, params: dict, batch: Batch, features: frozenset[Feature]) -> EncoderOutput:
    """The teacher as every loss sees it: deterministic, without gradient, only as deep as the deepest feature."""
    ids, mask, segments = _inputs(batch, settings.packing)
    output = forward(settings.teacher, params, ids, mask, segment_ids=segments, features=features, dtype=settings.dtype)
    return jax.lax.stop_gradient(output)


def student_parts(
    settings: StepSettings, student: Student, trained: dict, teacher: EncoderOutput, batch: Batch, dropout: DropoutKeys | None
):
    """(sum, count) of every part of a student's loss over one micro-batch."""
    ids, mask, segments = _inputs(batch, settings.packing)
    wanted, _ = features_read(student.terms)
    output = forward(
        student.config, trained["params"], ids, mask, segment_ids=segments, features=wanted, dropout=dropout, dtype=settings.dtype
    )
    return measure(student.terms, output, teacher, mask, segments)


def _teacher_reads(students: Sequence[Student]) -> frozenset[Feature]:
    return frozenset().union(*(features_read(student.terms)[1] for student in students))


def evaluation_step(settings: StepSettings, students: Sequence[Student], trained: dict, teacher_params: dict, batch: Batch) -> dict:
    """Parts of every student's loss over a batch [A, B, S], without dropout: name of the student -> part -> (sum, count)."""

    def micro(carry, batch):
        teacher = teacher_features(settings, teacher_params, batch, _teacher_reads(students))
        parts = {s.name: student_parts(settings, s, trained[s.name], teacher, batch, None) for s in students}
        return carry, parts

    with precision(settings.dtype):
        _, parts = jax.lax.scan(micro, None, batch)
    return jax.tree.map(jnp.sum, parts)


def train_step(
    settings: StepSettings, students: Sequence[Student], state: TrainState, teacher_params: dict, batch: Batch
) -> tuple[TrainState, dict]:
    """One update of every student from one global batch.

    Args:
      batch: input_ids and segment_ids [A, B, S], A micro-batches of B rows; the result does not depend on A.

    Returns:
      The next state, and {"tokens": real tokens, "students": student -> {"parts": part -> (sum, count), "gradient_norm",
      "skipped"}}; skipped is 1 when the gradient was not finite and the student kept its parameters.
    """
    num_micro, num_rows, _ = batch["input_ids"].shape
    rows = jnp.arange(num_micro * num_rows, dtype=jnp.uint32).reshape(num_micro, num_rows)

    def losses(trained, counts, batch, rows):
        teacher = teacher_features(settings, teacher_params, batch, _teacher_reads(students))
        parts, total = {}, jnp.float32(0.0)
        for student in students:
            key = jax.random.fold_in(student_key(settings.seed, student.name), state.step)
            dropout = DropoutKeys.create(key, rows)
            parts[student.name] = student_parts(settings, student, trained[student.name], teacher, batch, dropout)
            sums = {name: part[0] for name, part in parts[student.name].items()}
            own = {name: part[1] for name, part in parts[student.name].items()}
            total += loss(student.terms, sums, own if counts is None else counts[student.name])
        return total, parts

    trained = {name: student.trained for name, student in state.students.items()}
    gradient = jax.grad(losses, has_aux=True)
    with precision(settings.dtype):
        if num_micro == 1:
            gradients, parts = gradient(trained, None, *jax.tree.map(lambda x: x[0], (batch, rows)))
        else:
            gradients, parts = _accumulate(losses, gradient, trained, batch, rows)
    state, metrics = _update(students, state, gradients, parts)
    return state, {"tokens": jnp.sum(batch["segment_ids"] > 0), "students": metrics}


def _accumulate(losses, gradient, trained, batch: Batch, rows):
    """Sum of the micro-batches' gradients, each part divided by its count over the whole batch: weighted by tokens."""

    def count(carry, micro):
        # Only the counts leave the loop, so XLA drops the encoders that the sums would need.
        _, parts = losses(trained, None, *micro)
        return carry, {name: {part: n for part, (_, n) in own.items()} for name, own in parts.items()}

    counts = jax.tree.map(jnp.sum, jax.lax.scan(count, None, (batch, rows))[1])

    def add(total, micro):
        gradients, parts = gradient(trained, counts, *micro)
        return jax.tree.map(jnp.add, total, gradients), parts

    gradients, parts = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), (batch, rows))
    return gradients, jax.tree.map(jnp.sum, parts)


def _update(students: Sequence[Student], state: TrainState, gradients: dict, parts: dict) -> tuple[TrainState, dict]:
    updated, metrics = {}, {}
    for student in students:
        own = gradients[student.name]
        norm = optax.tree.norm(own)
        finite = jnp.isfinite(norm)

        def step(old: StudentState, own=own, optimizer=student.optimizer) -> StudentState:
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of int32 counters
                updates, new = optimizer.update(own, old.optimizer, old.trained)
            return StudentState(optax.apply_updates(old.trained, updates), new)

        # A branch, not a selection between results: what is kept is not copied.
        updated[student.name] = jax.lax.cond(finite, step, lambda old: old, state.students[student.name])
        metrics[student.name] = {"parts": parts[student.name], "gradient_norm": norm, "skipped": (~finite).astype(jnp.int32)}
    return TrainState(state.step + 1, updated), metrics
