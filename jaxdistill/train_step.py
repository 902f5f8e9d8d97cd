"""The step: one teacher pass, every student's losses and gradients, one update each; pure, jitted by `distill`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdistill.data import Masking, language_tokens, mask_tokens
from jaxdistill.features import EncoderOutput, Feature
from jaxdistill.kernels import ON_CPU, Kernels, Platform
from jaxdistill.models import EncoderConfig, forward
from jaxdistill.objective import features_read, loss, measure
from jaxdistill.parts import Inputs, TextVectors, first_vectors
from jaxdistill.row_keys import RowKeys
from jaxdistill.students import student_key
from jaxdistill.update import Input, Student, TrainState, flat, update

# input_ids, segment_ids [A, B, S]; of a task token_type_ids [A, B, S], labels [A, B]; languages [A, B]; or a micro-batch, without A
Batch = dict[str, jax.Array]


def precision(dtype: str, platform: Platform):
    """Of the matrix products: float32 means float32 also where an accelerator would use fewer bits for it; a CPU has no other."""
    return jax.default_matmul_precision("highest" if dtype == "float32" and platform != "cpu" else None)


@dataclass(frozen=True)
class StepSettings:
    """What the step's code depends on beside the students. The teacher's parameters are an argument of the step."""

    teacher: EncoderConfig
    dtype: str  # of the matrix products
    seed: int  # of the students' dropout and of the masked places
    packing: bool  # texts packed in a row do not see each other
    masking: Masking | None = None  # of masked input; None: no student reads it
    freeze_after: int = 20  # updates in a row that are skipped
    kernels: Kernels = ON_CPU
    rematerialise: str = "none"  # what the students' gradients compute again instead of keeping it
    spike_factor: float = 0.0  # a loss over this many times its running mean is skipped; 0: none is
    languages: int = 0  # whose tokens are counted; 0: none


@dataclass(frozen=True)
class View:
    """One micro-batch as the encoders read it. `labels`: of masked input, -100 = not predicted; the last two: of a task."""

    input_ids: jax.Array
    mask: jax.Array
    segment_ids: jax.Array | None
    labels: jax.Array | None
    token_type_ids: jax.Array | None
    row_labels: jax.Array | None


def view(settings: StepSettings, name: Input, batch: Batch, key: jax.Array, rows: jax.Array) -> View:
    """`key`: of the step; `rows`: [B], number of each row in the global batch. The masked places depend on nothing else."""
    ids, labels = batch["input_ids"], None
    if name == "masked":
        ids, labels = mask_tokens(RowKeys.create(key, rows), ids, batch["segment_ids"], settings.masking)
    mask = (batch["segment_ids"] > 0).astype(jnp.int32)
    segments = batch["segment_ids"] if settings.packing else None
    return View(ids, mask, segments, labels, batch.get("token_type_ids"), batch.get("labels"))


def _masking_key(seed: int, use: str, number) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(use.encode())), number)


def teacher_reads(students: Sequence[Student]) -> dict[Input, frozenset[Feature]]:
    """What the students on each input together read of the teacher."""
    reads: dict[Input, frozenset[Feature]] = {}
    for student in students:
        reads[student.input] = reads.get(student.input, frozenset()) | features_read(student.terms)[1]
    return reads


@jax.named_scope("teacher")
def teacher_features(settings: StepSettings, params: dict, seen: View, features: frozenset[Feature]) -> EncoderOutput:
    """The teacher as every loss sees it: deterministic, without gradient, only as deep as the deepest feature."""
    if not features:
        return EncoderOutput({}, {}, {}, {})
    output = forward(
        settings.teacher, params, seen.input_ids, seen.mask, seen.token_type_ids, seen.segment_ids,
        features=features, dtype=settings.dtype, kernels=settings.kernels,
    )  # fmt: skip
    return jax.lax.stop_gradient(output)


def student_parts(
    settings: StepSettings,
    student: Student,
    trained: dict,
    teacher: EncoderOutput,
    seen: View,
    dropout: RowKeys | None,
    step=0,
    negatives: dict[str, tuple[TextVectors, ...]] | None = None,
):
    """(sum, count) of every part of a student's loss over one micro-batch."""
    output = forward(
        student.config, trained["params"], seen.input_ids, seen.mask, seen.token_type_ids, seen.segment_ids,
        features=features_read(student.terms)[0], dropout=dropout, dtype=settings.dtype,
        kernels=settings.kernels, rematerialise=settings.rematerialise,
    )  # fmt: skip
    inputs = Inputs(seen.mask, seen.segment_ids, seen.labels, step, negatives or {}, seen.row_labels, settings.kernels)
    with jax.named_scope("losses"):
        return measure(student.terms, output, teacher, trained["projections"], inputs)


@dataclass(frozen=True)
class _Micro:
    """One micro-batch as the teacher and the students see it."""

    views: dict[Input, View]
    teacher: dict[Input, EncoderOutput]


def _micro_batch(settings: StepSettings, students: Sequence[Student], teacher_params: dict, batch: Batch, key, rows) -> _Micro:
    views = {name: view(settings, name, batch, key, rows) for name in teacher_reads(students)}
    reads = teacher_reads(students)
    return _Micro(views, {name: teacher_features(settings, teacher_params, views[name], reads[name]) for name in views})


def _over_micro_batches(function: Callable, batch: Batch, rows: jax.Array):
    """What `function` returns for each micro-batch, stacked; a single one is not put into a loop."""
    if rows.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], (batch, rows))))
    return jax.lax.scan(lambda carry, micro: (carry, function(*micro)), None, (batch, rows))[1]


def _numbered_rows(batch: Batch) -> jax.Array:
    num_micro, num_rows, _ = batch["input_ids"].shape
    return jnp.arange(num_micro * num_rows, dtype=jnp.uint32).reshape(num_micro, num_rows)


def evaluation_step(
    settings: StepSettings, students: Sequence[Student], trained: dict, teacher_params: dict, batch: Batch, number, step
) -> dict:
    """Parts of every student's loss over a batch [A, B, S], without dropout: name of the student -> part -> (sum, count).

    Args:
      number: int32, of this batch among the held-out ones, so that masked places are the same every time.
      step: int32, for what is scheduled.
    """
    key = _masking_key(settings.seed, "held-out masking", number)

    def parts(batch, rows):
        micro = _micro_batch(settings, students, teacher_params, batch, key, rows)
        return {
            s.name: student_parts(
                settings, s, trained[s.name], micro.teacher[s.input], micro.views[s.input], None, step, _negatives(s, {}, vectors, rows)
            )
            for s in students
        }

    with precision(settings.dtype, settings.kernels.platform):
        vectors = _text_vectors(settings, students, teacher_params, batch, key)
        return jax.tree.map(jnp.sum, _over_micro_batches(parts, batch, _numbered_rows(batch)))


def _text_vectors(settings: StepSettings, students: Sequence[Student], teacher_params: dict, batch: Batch, key) -> dict:
    """(input, feature) -> the teacher's text vectors [A, B, D] of the global batch, for the contrastive terms."""
    wanted = {
        (s.input, part.teacher[0]) for s in students for t in s.terms if t.kind == "hidden_contrastive" for part in t.parts
    }  # fmt: skip
    if not wanted:
        return {}

    def vectors(batch, rows):
        found = {}
        for name in {name for name, _ in wanted}:
            seen = view(settings, name, batch, key, rows)
            features = frozenset(feature for other, feature in wanted if other == name)
            teacher = teacher_features(settings, teacher_params, seen, features)
            found |= {(name, feature): first_vectors(teacher[feature], seen.mask) for feature in features}
        return [found[place] for place in sorted(wanted)]

    return dict(zip(sorted(wanted), _over_micro_batches(vectors, batch, _numbered_rows(batch)), strict=True))


def _negatives(student: Student, memory: dict, vectors: dict, rows: jax.Array) -> dict[str, tuple[TextVectors, ...]]:
    """Contrastive term -> text vectors outside of this micro-batch: the others of the global batch, and its memory bank."""
    found: dict[str, tuple[TextVectors, ...]] = {}
    for term in student.terms:
        if term.kind != "hidden_contrastive":
            continue
        batch = vectors[student.input, term.parts[0].teacher[0]]
        own: tuple[TextVectors, ...] = ()
        if batch.mask.shape[0] > 1:
            every, size = flat(batch), jnp.uint32(rows.shape[0])
            others = jnp.arange(every.mask.shape[0], dtype=jnp.uint32) // size != rows[0] // size
            own = (TextVectors(every.vectors, every.mask * others.astype(jnp.int32)),)
        if bank := memory.get(term.name):
            own += (TextVectors(bank["vectors"], bank["mask"]),)
        found[term.name] = own
    return found


def train_step(
    settings: StepSettings, students: Sequence[Student], state: TrainState, teacher_params: dict, batch: Batch
) -> tuple[TrainState, dict]:
    """One update of every student from one global batch.

    Args:
      batch: of A micro-batches of B rows; the result does not depend on A.

    Returns:
      The next state, and {"tokens": real tokens, ("languages": of each,) "students": student -> {"parts": part -> (sum, count),
      "gradient_norm", "skipped", "spiked", "failures"}, "diverged": no student is left}; skipped is 1 when the student kept its
      parameters: its gradient was not finite, its loss a spike, or it is frozen after `freeze_after` of these in a row.
    """
    rows, key = _numbered_rows(batch), _masking_key(settings.seed, "masking", state.step)
    trained = {name: student.trained for name, student in state.students.items()}

    def parts_of(student: Student, own: dict, micro: _Micro, rows, vectors) -> dict:
        dropout = RowKeys.create(jax.random.fold_in(student_key(settings.seed, student.name), state.step), rows)
        negatives = _negatives(student, state.students[student.name].memory, vectors, rows)
        seen = micro.views[student.input]
        return student_parts(settings, student, own, micro.teacher[student.input], seen, dropout, state.step, negatives)

    def gradients(counts, vectors, batch, rows) -> tuple[dict, dict]:
        micro = _micro_batch(settings, students, teacher_params, batch, key, rows)
        found, parts = {}, {}
        for student in students:

            def value(own, student=student):
                parts = parts_of(student, own, micro, rows, vectors)
                sums = {name: part[0] for name, part in parts.items()}
                own_counts = {name: part[1] for name, part in parts.items()}
                return loss(student.terms, sums, own_counts if counts is None else counts[student.name], state.step), parts

            def nothing(own, student=student):
                zero = jnp.float32(0.0), jnp.float32(0.0)
                return jax.tree.map(jnp.zeros_like, own), {part.name: zero for term in student.terms for part in term.parts}

            # A branch, so that a frozen student costs nothing, and that one student's activations are freed before the next's.
            frozen = state.students[student.name].failures >= settings.freeze_after
            compute = jax.grad(value, has_aux=True)
            found[student.name], parts[student.name] = jax.lax.cond(frozen, nothing, compute, trained[student.name])
        return found, parts

    def count(vectors, batch, rows) -> dict:
        # Only the counts leave the loop, so XLA drops the encoders that the sums would need.
        micro = _micro_batch(settings, students, teacher_params, batch, key, rows)
        return {s.name: {n: c for n, (_, c) in parts_of(s, trained[s.name], micro, rows, vectors).items()} for s in students}

    with precision(settings.dtype, settings.kernels.platform):
        vectors = _text_vectors(settings, students, teacher_params, batch, key)
        if rows.shape[0] == 1:
            found, parts = gradients(None, vectors, *jax.tree.map(lambda x: x[0], (batch, rows)))
        else:
            counts = jax.tree.map(jnp.sum, _over_micro_batches(lambda *micro: count(vectors, *micro), batch, rows))
            found, parts = _accumulate(lambda *micro: gradients(counts, vectors, *micro), trained, batch, rows)
    limits = {"freeze_after": settings.freeze_after, "spike_factor": settings.spike_factor}
    state, metrics = update(students, state, found, parts, vectors, **limits)
    diverged = jnp.all(jnp.stack([student.failures for student in state.students.values()]) >= settings.freeze_after)
    tokens = {"tokens": jnp.sum(batch["segment_ids"] > 0)} | language_tokens(settings.languages, batch)
    return state, {**tokens, "students": metrics, "diverged": diverged}


def _accumulate(gradients: Callable, trained: dict, batch: Batch, rows: jax.Array) -> tuple[dict, dict]:
    """Sum of the micro-batches' gradients, each part divided by its count over the whole batch: weighted by tokens."""

    def add(total, micro):
        found, parts = gradients(*micro)
        return jax.tree.map(jnp.add, total, found), parts

    total, parts = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), (batch, rows))
    return total, jax.tree.map(jnp.sum, parts)
