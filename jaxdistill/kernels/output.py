"""Output distribution and masked language modelling without the [B, S, V] logits: value and gradient a block at a time.

Only counted tokens are computed. They are sorted to the front, and loops run over blocks of tokens (a dynamic number: with
15 % of the tokens masked, 15 % of the work) and of the vocabulary. The cotangent of the sum is one scalar, so that the gradient
can be written down in the forward pass, per token

    d (T^2 KL) / d z_S = T (softmax(z_S / T) - softmax(z_T / T)),

and goes at once into the gradients of the student's vectors, table and bias (the table's summed in float32); no logits are kept.

Where one block holds the whole vocabulary, one pass does it: 4 products of tokens x V x D (both logits, two gradients). Where the
vocabulary is cut too, a first pass finds both log-sum-exps (running maxima) and the value, a second computes the logits again:
6 products, but a tile of logits stays on the chip, and the table's gradient is written once instead of once for each block of tokens.

The cross entropy of labels is the same KL, to a teacher that is sure: logit 0 for the label, none elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdistill import losses
from jaxdistill.features import VocabularyLogits
from jaxdistill.kernels.choice import ON_CPU, Kernels, Platform
from jaxdistill.shapes import Array, Float, Int, Num
from jaxdistill.sharding import LOGICAL_TO_MESH

_NOWHERE = -1e15  # as a logit: no probability; finite, so that its differences and products with 0 are


def output_kl(
    student: VocabularyLogits,
    teacher: VocabularyLogits,
    mask: Num[Array, "B S"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    kernels: Kernels = ON_CPU,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.output_kl`; no gradient reaches the teacher or the temperature.

    Under a mesh each device does its own rows, and its part of the vocabulary where the table is split (else of the sequence).

    Raises:
      ValueError: two vocabularies.
    """
    if student.bias.shape != teacher.bias.shape:
        raise ValueError(f"two vocabularies: the student has {student.bias.shape[0]} entries, the teacher {teacher.bias.shape[0]}")
    if kernels.logits == "plain":
        return losses.output_kl(student.dense(), teacher.dense(), mask, temperature=temperature)
    counted = mask != 0
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    divergence = _divergence(student, jax.lax.stop_gradient(teacher), counted, temperature, kernels.platform)
    return divergence * temperature * temperature, jnp.sum(counted.astype(jnp.float32))


def mlm_cross_entropy(
    student: VocabularyLogits, labels: Int[Array, "B S"], *, kernels: Kernels = ON_CPU
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.mlm_cross_entropy`."""
    if kernels.logits == "plain":
        return losses.mlm_cross_entropy(student.dense(), labels)
    predicted = labels != -100
    inside = (labels >= 0) & (labels < student.bias.shape[0])
    total = _divergence(student, labels, predicted & inside, jnp.float32(1.0), kernels.platform)
    # A factor, not a selection: the gradient is NaN as well, and the update is skipped.
    return total * jnp.where(jnp.all(inside | ~predicted), 1.0, jnp.nan), jnp.sum(predicted.astype(jnp.float32))


class Blocks(NamedTuple):
    """Cut of a device's counted tokens and of its part of the vocabulary."""

    tokens: int
    columns: int


def blocks(platform: Platform, num_tokens: int, vocab_size: int, *, split: bool) -> Blocks:
    """The cut for so many tokens and vocabulary entries on a device; `split`: the vocabulary is over several devices."""
    if platform == "cpu" and not split:
        # Logits of a side that stay near the core; more tokens where the table's gradient would be walked too often.
        return Blocks(min(num_tokens, max(_CPU_BLOCK_ELEMENTS // vocab_size, 32)), vocab_size)
    return Blocks(min(num_tokens, _TILE[0]), min(vocab_size, _TILE[1]))


_CPU_BLOCK_ELEMENTS = 2**22
_TILE = (512, 4096)  # of float32 logits: 8 MB of each side


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _divergence(student, teacher, counted, temperature, platform: Platform):
    """Sum over counted tokens of KL(teacher || student) in nats; `teacher` may be labels [B, S]."""
    return _everywhere(student, teacher, counted, temperature, platform, gradient=False)


def _forward(student, teacher, counted, temperature, platform: Platform):
    value, gradient = _everywhere(student, teacher, counted, temperature, platform, gradient=True)
    own = jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, student)
    return value, (own, temperature)


def _backward(platform: Platform, residual, cotangent):
    gradient, temperature = residual
    scale = cotangent / temperature  # of the logits / T
    return jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), gradient), None, None, None


_divergence.defvjp(_forward, _backward)


def _everywhere(student: VocabularyLogits, teacher, counted, temperature, platform: Platform, *, gradient: bool):
    """The sum over all devices of a mesh; with its gradient [B, S, D], [V, D], [V] where asked for, of float32."""
    # In the dtype of the products before a table that lies in parts is gathered.
    student = replace(student, table=student.table.astype(student.vectors.dtype))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _on_one_device(student, teacher, counted, temperature, platform=platform, gradient=gradient)
    batch, vocab = LOGICAL_TO_MESH["batch"], LOGICAL_TO_MESH["vocab"]
    if counted.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        batch = ()
    places = None
    if student.table.shape[0] % mesh.shape[vocab]:
        vocab, places = None, vocab if counted.shape[1] % mesh.shape[vocab] == 0 else None
    rows, columns = PartitionSpec(batch or None, places), PartitionSpec(vocab)
    side = VocabularyLogits(rows, columns, columns)
    scaled = replace(side, scale=columns)
    theirs = rows if not isinstance(teacher, VocabularyLogits) else side if teacher.scale is None else scaled
    tokens = tuple(batch) + ((places,) if places else ())
    local = partial(_on_one_device, platform=platform, gradient=gradient, tokens_axes=tokens, vocab_axis=vocab)
    return jax.shard_map(
        local,
        in_specs=(side, theirs, rows, PartitionSpec()),
        out_specs=(PartitionSpec(), side) if gradient else PartitionSpec(),
        check_vma=False,
    )(student, teacher, counted, temperature)


def _on_one_device(student, teacher, counted, temperature, *, platform, gradient, tokens_axes=(), vocab_axis=None):
    shape = student.vectors.shape
    cut = blocks(platform, counted.size, student.bias.shape[0], split=vocab_axis is not None)
    num_rows = -(-counted.size // cut.tokens) * cut.tokens
    order = jnp.argsort(~counted.ravel(), stable=True)
    is_counted = jnp.arange(num_rows) < jnp.sum(counted)

    def sorted_rows(x):
        found = jnp.take(x.reshape(counted.size, *x.shape[2:]), jnp.pad(order, (0, num_rows - counted.size)), axis=0, mode="clip")
        # What is not counted may be anything, NaN too.
        return jnp.where(is_counted.reshape(-1, *(1,) * (found.ndim - 1)), found, jnp.zeros((), x.dtype))

    first_column = jax.lax.axis_index(vocab_axis) * student.bias.shape[0] if vocab_axis else 0
    sides = _Sides(_with_vectors(student, sorted_rows), _with_vectors(teacher, sorted_rows), is_counted, temperature, first_column, cut)
    seen = None
    if not gradient or cut.columns < student.bias.shape[0] or vocab_axis:
        seen = _see_all(sides)
        if vocab_axis:
            seen = _merge(seen, vocab_axis)
    value, found = _gradients(sides, seen) if gradient else (None, None)
    if seen is not None:
        value = jnp.sum(jnp.where(is_counted, _kl(seen), 0.0))
    value = jax.lax.psum(value, tokens_axes) if tokens_axes else value
    if not gradient:
        return value
    vectors = jnp.take(found.vectors[: counted.size], jnp.argsort(order), axis=0, mode="clip").reshape(shape)
    vectors = jax.lax.psum(vectors, vocab_axis) if vocab_axis else vectors
    table, bias = jax.lax.psum((found.table, found.bias), tokens_axes) if tokens_axes else (found.table, found.bias)
    return value, VocabularyLogits(vectors, table, bias)


class _Sides(NamedTuple):
    """What a device compares: its counted tokens in front, padded to whole blocks. `teacher`: with [N, D] vectors, or labels [N]."""

    student: VocabularyLogits
    teacher: VocabularyLogits | jax.Array
    counted: jax.Array
    temperature: jax.Array
    first_column: jax.Array | int  # of its part of the vocabulary
    cut: Blocks

    @property
    def num_token_blocks(self) -> jax.Array:
        return -(-jnp.sum(self.counted) // self.cut.tokens)

    @property
    def num_column_blocks(self) -> int:
        return -(-self.student.bias.shape[0] // self.cut.columns)


class _Seen(NamedTuple):
    """Of each token, after the vocabulary seen so far: the highest logit of a side, the sum of exp(logit - highest), and

    difference = sum of exp(u - highest u) ((u - highest u) - (s - highest s)), u of the teacher and s of the student. Without the
    highest, which cancel there, large logits would leave their rounding behind.
    """

    student_peak: jax.Array
    student_total: jax.Array
    teacher_peak: jax.Array
    teacher_total: jax.Array
    difference: jax.Array


def _with_vectors(side, rows):
    return replace(side, vectors=rows(side.vectors)) if isinstance(side, VocabularyLogits) else rows(side)


def _nothing_seen(num_tokens: int) -> _Seen:
    zeros, lowest = jnp.zeros((num_tokens,), jnp.float32), jnp.full((num_tokens,), _NOWHERE, jnp.float32)
    return _Seen(lowest, zeros, lowest, zeros, zeros)


def _raised(seen: _Seen, student_peak, teacher_peak) -> _Seen:
    """The same sums, taken from higher peaks."""
    student, teacher = jnp.exp(seen.student_peak - student_peak), jnp.exp(seen.teacher_peak - teacher_peak)
    shift = (seen.teacher_peak - teacher_peak) - (seen.student_peak - student_peak)
    difference = teacher * (seen.difference + seen.teacher_total * shift)
    return _Seen(student_peak, student * seen.student_total, teacher_peak, teacher * seen.teacher_total, difference)


def _see(seen: _Seen, student: Float[Array, "N C"], teacher: Float[Array, "N C"]) -> _Seen:
    """With the logits of one more block of the vocabulary."""
    peaks = jnp.maximum(seen.student_peak, jnp.max(student, axis=-1)), jnp.maximum(seen.teacher_peak, jnp.max(teacher, axis=-1))
    old = _raised(seen, *peaks)
    student, teacher = student - peaks[0][:, None], teacher - peaks[1][:, None]
    weights = jnp.exp(teacher)
    return old._replace(
        student_total=old.student_total + jnp.sum(jnp.exp(student), axis=-1),
        teacher_total=old.teacher_total + jnp.sum(weights, axis=-1),
        difference=old.difference + jnp.sum(weights * (teacher - student), axis=-1),
    )


def _merge(seen: _Seen, axis: str) -> _Seen:
    """Of the whole vocabulary, from its parts on the devices of a mesh axis."""
    peaks = jax.lax.pmax((seen.student_peak, seen.teacher_peak), axis)
    own = _raised(seen, *peaks)
    totals = jax.lax.psum((own.student_total, own.teacher_total, own.difference), axis)
    return _Seen(peaks[0], totals[0], peaks[1], totals[1], totals[2])


def _kl(seen: _Seen) -> Float[Array, " N"]:
    return seen.difference / seen.teacher_total - jnp.log(seen.teacher_total) + jnp.log(seen.student_total)


def _columns(sides: _Sides, block):
    """Where a block of the vocabulary begins, and what its logits need of both sides."""
    vocab_size, size = sides.student.bias.shape[0], sides.cut.columns
    # The last block begins early enough to be whole; what it repeats is nowhere.
    start = jnp.minimum(block * size, vocab_size - size)
    numbers = start + jnp.arange(size)
    fresh = numbers >= block * size

    def of(side):
        if not isinstance(side, VocabularyLogits):
            return jnp.where(fresh, sides.first_column + numbers, -1)
        table, bias, scale = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), (side.table, side.bias.astype(jnp.float32), side.scale)
        )
        return table, jnp.where(fresh, bias, _NOWHERE), scale

    return start, of(sides.student), of(sides.teacher)


def _rows(x, block, size: int):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, block * size, size), x)


def _put(x, new, start):
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), x, new)


def _logits(side, columns, sides: _Sides, block) -> Float[Array, "N C"]:
    if not isinstance(side, VocabularyLogits):
        return jnp.where(_rows(side, block, sides.cut.tokens)[:, None] == columns[None], 0.0, _NOWHERE)
    table, bias, scale = columns
    rows = _rows(side.vectors, block, sides.cut.tokens)
    logits = jnp.einsum("td,vd->tv", rows, table.astype(rows.dtype), preferred_element_type=jnp.float32)
    if scale is not None:
        logits = logits * scale[None]
    return (logits + bias[None]) / sides.temperature


def _repeat(times, body, start):
    return body(0, start) if isinstance(times, int) and times == 1 else jax.lax.fori_loop(0, times, body, start)


def _see_all(sides: _Sides) -> _Seen:
    """The first pass: of every token over the vocabulary here."""

    def over_columns(i, seen):
        _, student, teacher = _columns(sides, i)

        def over_tokens(j, seen):
            own = _rows(seen, j, sides.cut.tokens)
            new = _see(own, _logits(sides.student, student, sides, j), _logits(sides.teacher, teacher, sides, j))
            return _put(seen, new, j * sides.cut.tokens)

        return jax.lax.fori_loop(0, sides.num_token_blocks, over_tokens, seen)

    return _repeat(sides.num_column_blocks, over_columns, _nothing_seen(sides.counted.shape[0]))


def _gradients(sides: _Sides, seen: _Seen | None):
    """(value, gradients with respect to the logits' factors). Without `seen`, and then in one pass, the whole vocabulary is here."""
    size, student = sides.cut.tokens, sides.student

    def over_columns(i, carry):
        value, vectors, tables, biases = carry
        start, own, theirs = _columns(sides, i)

        def over_tokens(j, carry):
            value, vectors, table, bias = carry
            logits, targets = _logits(student, own, sides, j), _logits(sides.teacher, theirs, sides, j)
            counted, rows = _rows((sides.counted, student.vectors), j, size)
            done = _see(_nothing_seen(size), logits, targets) if seen is None else _rows(seen, j, size)
            probabilities = (
                jnp.exp(x - peak[:, None] - jnp.log(total)[:, None])
                for x, peak, total in ((logits, done.student_peak, done.student_total), (targets, done.teacher_peak, done.teacher_total))
            )
            delta = jnp.where(counted[:, None], next(probabilities) - next(probabilities), 0.0)
            value = value + jnp.sum(jnp.where(counted, _kl(done), 0.0)) if seen is None else value
            bias = bias + jnp.sum(delta, axis=0)
            delta = delta.astype(rows.dtype)
            table = table + jnp.einsum("tv,td->vd", delta, rows, preferred_element_type=jnp.float32)
            to_rows = jnp.einsum("tv,vd->td", delta, own[0], preferred_element_type=jnp.float32)
            return value, _put(vectors, _rows(vectors, j, size) + to_rows, j * size), table, bias

        cut = jnp.zeros((sides.cut.columns, student.table.shape[1]), jnp.float32), jnp.zeros((sides.cut.columns,), jnp.float32)
        value, vectors, *new = jax.lax.fori_loop(0, sides.num_token_blocks, over_tokens, (value, vectors, *cut))
        if sides.num_column_blocks == 1:
            return value, vectors, *new
        old = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, sides.cut.columns), [tables, biases])
        return value, vectors, *_put([tables, biases], jax.tree.map(jnp.add, old, new), start)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (student.vectors, student.table, student.bias))
    value, *found = _repeat(sides.num_column_blocks, over_columns, (jnp.float32(0.0), *zeros))
    return value, VocabularyLogits(*found)
