"""Relation and attention KL on a TPU: one Pallas kernel, value and gradient in one pass, no S x S matrix outside of the chip.

One program takes one row of the batch and a block of relation heads whose lanes fill whole registers (16 numbers a head: 8 heads;
12: 32 heads in 384 lanes); the whole sequence lies in VMEM. Heads are never laid out apart: a head is a mask of lanes, since a
product over 128 lanes costs the matrix unit the same as one over 16, and lanes of zero add nothing.

Scores stand as [key, query]: what belongs to a query is then a row, and sums over keys are additions of registers.
With queries and keys alike the scores are symmetric, and the other direction of the softmax needs no transposed matrix,

    P[i, j] = exp(s[i, j] - lse[j]),   P^T[i, j] = exp(s[i, j] - lse[i]);

otherwise, or where the scores of a head do not fit, blocks of queries are taken one after the other.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_LOG2_E = math.log2(math.e)
_HIDDEN = -1e30  # the score of a key that is not seen
_SCORE_ELEMENTS = 2**18  # of one array [keys, queries]; about eight of them are alive, of the 16 MB that every chip's VMEM has
LONGEST = 1024  # blocks of queries are written out in the program: at 2048 a compilation takes minutes
MOST_HEADS = 64  # of one block: each is written out in the program


def heads_per_block(num_heads: int, sizes: tuple[int, ...]) -> int:
    """Heads whose lanes fill whole registers on both sides; all of them where no divisor of `num_heads` does."""
    fitting = [n for n in range(1, num_heads) if num_heads % n == 0 and all(n * size % _LANES == 0 for size in sizes)]
    return min(fitting, default=num_heads)


def fits(length: int, num_heads: int, student_head: int, teacher_head: int) -> bool:
    """Whether the kernel takes these shapes: the sequence in VMEM, a program of bounded length."""
    heads = heads_per_block(num_heads, (student_head, teacher_head))
    widest = max(student_head, teacher_head) * heads
    return length <= LONGEST and heads <= MOST_HEADS and _rounded(length, _LANES) * _rounded(widest, _LANES) <= 2**20


def divergence(student, teacher, segments, num_heads: int, *, with_gradient: bool, interpret: bool):
    """Sum of the KL over real queries and heads, and the gradients of the student's vectors (or none).

    Args:
      student, teacher: (vectors [B, S, D],) or (queries, keys); in one dtype. What stands under the padding is not read.
      segments: [B, S], 0 = padding; a query sees keys of its own number.
    """
    batch, length, width = student[0].shape
    sizes = width // num_heads, teacher[0].shape[-1] // num_heads
    group = heads_per_block(num_heads, sizes)
    num_blocks = num_heads // group
    lanes = [_rounded(size * group, _LANES) for size in sizes]
    padded = _rounded(length, _LANES)
    arrays = [*(_padded(x, padded, lanes[0] * num_blocks) for x in student), *(_padded(x, padded, lanes[1] * num_blocks) for x in teacher)]
    segments = jnp.pad(segments, ((0, 0), (0, padded - length)))
    num_gradients = len(student) if with_gradient else 0
    block = padded
    while block * padded > _SCORE_ELEMENTS and block > _LANES:
        block = block // 2 if block % (2 * _LANES) == 0 else _LANES
    of_row = [
        pl.BlockSpec((1, padded, size), lambda b, h: (b, 0, h)) for size in [lanes[0]] * len(student) + [lanes[1]] * len(teacher)
    ]  # fmt: skip
    of_segments = [pl.BlockSpec((1, 1, padded), lambda b, h: (b, 0, 0)), pl.BlockSpec((1, padded, 1), lambda b, h: (b, 0, 0))]
    symmetric = num_gradients == 1 and block == padded
    held = [(padded, padded)] * 4 + [(8, padded)] + [(padded, _LANES)] * 2
    vectors = jax.ShapeDtypeStruct(arrays[0].shape, student[0].dtype)
    value, *gradients = pl.pallas_call(
        partial(_program, sizes=sizes, cross=len(student) == 2, num_heads=group, block=block, with_gradient=with_gradient),
        grid=(batch, num_blocks),
        in_specs=of_row + of_segments,
        out_specs=[pl.BlockSpec((1, 1, 8, _LANES), lambda b, h: (b, h, 0, 0)), *of_row[:num_gradients]],
        out_shape=[jax.ShapeDtypeStruct((batch, num_blocks, 8, _LANES), jnp.float32), *[vectors] * num_gradients],
        scratch_shapes=[
            *(pltpu.VMEM((padded, size), jnp.float32) for size in [lanes[0]] * len(student) + [lanes[1]] * len(teacher)),
            *[pltpu.VMEM((padded, lanes[0]), jnp.float32)] * num_gradients,
            *([pltpu.VMEM(shape, jnp.float32) for shape in held] if symmetric else ()),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=cost(
            batch, padded, num_heads, lanes, group, arrays, cross=len(student) == 2, with_gradient=with_gradient, symmetric=symmetric
        ),
        interpret=interpret,
        name="relation_kl",
    )(*arrays, segments[:, None, :], segments[:, :, None])
    return jnp.sum(value[:, :, 0, 0]), tuple(gradient[:, :length, :width] for gradient in gradients)


def cost(
    batch: int, length: int, num_heads: int, lanes, group: int, arrays, *, cross: bool, with_gradient: bool, symmetric: bool
) -> pl.CostEstimate:
    """What the kernel does: products over the lanes that a head touches, exponentials of both sides, vectors read and written once."""
    pairs, bytes_of = batch * num_heads * length**2, lambda x: math.prod(x.shape) * x.dtype.itemsize
    wide = [min(_LANES, size) for size in lanes]
    products = wide[0] + wide[1] + with_gradient * (1 if symmetric else 2) * wide[0]
    read = sum(map(bytes_of, arrays)) + with_gradient * sum(map(bytes_of, arrays[: 1 + cross]))
    exponentials = 6 if symmetric else 2
    return pl.CostEstimate(flops=2 * pairs * products, transcendentals=exponentials * pairs, bytes_accessed=read)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _padded(x, length: int, width: int):
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, width - x.shape[2])))


def _program(*refs, sizes, cross: bool, num_heads: int, block: int, with_gradient: bool):
    number = 2 if cross else 1
    inputs, (segment_row, segment_column, value), rest = refs[: 2 * number], refs[2 * number : 2 * number + 3], refs[2 * number + 3 :]
    gradients, rest = (rest[:number], rest[number:]) if with_gradient else ((), rest)
    vectors, (sums, held) = rest[: 2 * number], (rest[2 * number : 2 * number + len(gradients)], rest[2 * number + len(gradients) :])
    length, dtype = inputs[0].shape[1], inputs[0].dtype
    real = segment_column[0] > 0
    for source, own in zip(inputs, vectors, strict=True):
        own[...] = jnp.where(real, source[0].astype(jnp.float32), 0.0)
    for own in sums:
        own[...] = jnp.zeros_like(own)
    total = jnp.zeros((1, block), jnp.float32)
    if held:
        heads = [[_Head(own, head, size, dtype) for own, size in zip(vectors, sizes, strict=True)] for head in range(num_heads)]
        total = _symmetric(heads, sums[0], (held[:2], held[2:4]), held[4], held[5:], segment_row, segment_column)
    for start in () if held else range(0, length, block):
        queries = slice(start, start + block)
        row = segment_row[0, :, queries]
        seen = (segment_column[0] == row) & real
        for head in range(num_heads):
            student = [_Head(own, head, sizes[0], dtype) for own in vectors[:number]]
            teacher = [_Head(own, head, sizes[1], dtype) for own in vectors[number:]]
            ours, theirs = (_Softmax(side, queries, seen, row > 0) for side in (student, teacher))
            # Peaks are taken off within the sum: large scores cancel there, and would leave their rounding behind outside it.
            difference = (theirs.scores - ours.scores) - (theirs.peak - ours.peak)
            divergence = jnp.sum(theirs.weights * difference, axis=0, keepdims=True) - theirs.total + ours.total
            total = total + jnp.where(row > 0, divergence, 0.0)
            if with_gradient:
                delta = ours.weights - theirs.weights
                to_keys = _product(delta.astype(dtype), student[0].alone(queries), dtype)
                to_queries = _product(delta.T.astype(dtype), student[-1].alone(slice(None)), dtype)
                student[-1].add(sums[-1], slice(None), to_keys)
                student[0].add(sums[0], queries, to_queries)
    value[...] = jnp.broadcast_to(jnp.sum(total), value.shape)
    for gradient, own in zip(gradients, sums, strict=True):
        gradient[0] = (own[...] * jnp.float32(sizes[0] ** -0.5)).astype(gradient.dtype)


def _symmetric(heads, gradient, scores, rows, columns, segment_row, segment_column):
    """All heads of a block, each with its queries as its keys: the KL by query [1, S]; the gradient is added.

    Three walks over the scores of a head, a strip at a time: the products and their peaks; the log-sum-exp; weights, divergence and
    gradient. The first wants the matrix unit and the last the exponentials, so the first of a head goes with the last of the one
    before it, into the other of two buffers.

    Args:
      heads: (student, teacher) of each head.
      scores: [S, S] for each side, of two heads; rows: [8, S], the peaks and then the log-sum-exp, of two heads; columns: [S, 128] for each
        side, the log-sum-exp of each row in all lanes.
    """
    length, dtype = segment_row.shape[-1], heads[0][0].dtype
    size = 2 * _LANES if length % (2 * _LANES) == 0 else _LANES
    walk = partial(_walk, length, size)

    def multiply(head: int, lanes):
        seen = (segment_column[0] == segment_row[0, :, lanes]) & (segment_column[0] > 0)
        for number, side in enumerate(heads[head]):
            own = _product(side.whole(slice(None)), side.alone(lanes), dtype, contract=1) * jnp.float32(side.size**-0.5 * _LOG2_E)
            own = jnp.where(seen, own, _HIDDEN)
            scores[head % 2][number][:, lanes] = own
            place = 2 * (head % 2) + number
            rows[place : place + 1, lanes] = jnp.max(own, axis=0, keepdims=True)

    def sum_up(head: int, lanes):
        for number in range(2):
            place = 2 * (head % 2) + number
            peak = rows[place : place + 1, lanes]
            total = jnp.sum(jnp.exp2(scores[head % 2][number][:, lanes] - peak), axis=0, keepdims=True)
            above = jnp.where(segment_row[0, :, lanes] > 0, peak + jnp.log2(total), -_HIDDEN)
            rows[place : place + 1, lanes] = above
            columns[number][lanes, :] = jnp.broadcast_to(above, (_LANES, size)).T

    def compare(head: int, lanes, divergence):
        place = 2 * (head % 2)
        ours, theirs = (own[lanes, :] for own in scores[head % 2])
        ours_below, theirs_below = ours - rows[place : place + 1, :], theirs - rows[place + 1 : place + 2, :]
        weights = jnp.exp2(theirs_below)
        divergence = divergence + jnp.sum(weights * (theirs_below - ours_below), axis=0, keepdims=True)
        delta = jnp.exp2(ours_below) - weights
        across = [jnp.concatenate([column[lanes, :]] * (length // _LANES), axis=1) for column in columns]
        delta = delta + (jnp.exp2(ours - across[0]) - jnp.exp2(theirs - across[1]))
        student = heads[head][0]
        student.add(gradient, lanes, _product(delta.astype(dtype), student.alone(slice(None)), dtype))
        return divergence

    divergence = jnp.zeros((1, length), jnp.float32)
    walk(lambda lanes, carry: multiply(0, lanes) or carry, 0)
    for head in range(len(heads)):
        walk(lambda lanes, carry, head=head: sum_up(head, lanes) or carry, 0)

        def last_and_first(lanes, divergence, head=head):
            if head + 1 < len(heads):
                multiply(head + 1, lanes)
            return compare(head, lanes, divergence)

        divergence = walk(last_and_first, divergence)
    return divergence * jnp.float32(1 / _LOG2_E)


def _walk(length: int, size: int, body, carry):
    """`body(strip, carry)` over strips of this size, in a loop of its own unless there is one."""

    def step(number, carry):
        return body(pl.ds(pl.multiple_of(number * size, size), size), carry)

    return step(0, carry) if length == size else jax.lax.fori_loop(0, length // size, step, carry)


class _Head:
    """One head's lanes of a block of vectors, within the registers that they touch."""

    def __init__(self, vectors, head: int, size: int, dtype):
        first, end = head * size, (head + 1) * size
        self.vectors, self.size, self.dtype = vectors, size, dtype
        self.lanes = slice(first // _LANES * _LANES, _rounded(end, _LANES))
        self.first = first - self.lanes.start

    def whole(self, rows):
        return self.vectors[rows, self.lanes].astype(self.dtype)

    def alone(self, rows):
        """Zeros in the lanes of other heads."""
        window = self.vectors[rows, self.lanes]
        lane = jax.lax.broadcasted_iota(jnp.int32, window.shape, 1)
        return jnp.where((lane >= self.first) & (lane < self.first + self.size), window, 0.0).astype(self.dtype)

    def add(self, sums, rows, update):
        sums[rows, self.lanes] += update


def _product(a, b, dtype, contract: int = 0):
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


class _Softmax:
    """Over keys, for the queries of a block: scores and weights [keys, queries]; peak and log-sum-exp above it [1, queries]."""

    def __init__(self, side, queries, seen, real):
        scores = _product(side[-1].whole(slice(None)), side[0].alone(queries), side[0].dtype, contract=1)
        self.scores = jnp.where(seen, scores * jnp.float32(side[0].size ** -0.5), _HIDDEN)
        self.peak = jnp.max(self.scores, axis=0, keepdims=True)
        weights = jnp.exp(self.scores - self.peak)
        total = jnp.sum(weights, axis=0, keepdims=True)
        self.weights, self.total, self.real = weights * jnp.where(real, 1.0 / total, 0.0), jnp.log(total), real
