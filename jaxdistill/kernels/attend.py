"""Relation and attention KL as attention: the softmax of scores times vectors, its log-sum-exp, and nothing else.

With student queries a and keys b (the same vectors for a self relation), the teacher's t and v, heads of size d_s and d_t, and
Attn(q, k, x) = softmax(q k^T / sqrt(d)) x = P x:

    KL_i = t_i . Attn(t, v, v)_i / sqrt(d_t) - lse(t_i v^T) - a_i . Attn(t, v, b)_i / sqrt(d_s) + lse(a_i b^T)
    d KL / d a_i = (Attn(a, b, b)_i - Attn(t, v, b)_i) / sqrt(d_s),   d KL / d b = (P_S^T a - P_T^T a) / sqrt(d_s),

with the a of real queries in the last two: the gradient of attention with respect to its values, for the cotangent a. So whatever
computes attention with memory linear in S computes relations with it.

Value and gradient are differences of attention outputs. cuDNN returns these in half precision, so both carry the rounding of what is
taken off: an error of about 2^-9 of the vectors themselves, however close the relations are. Of the largest gradient that was 0.6 %
at a KL of 1.8 nats a query, 4 % at 0.01 and 26 % at 0.0004 (plain attention in bfloat16 in cuDNN's place).
Attention in blocks of queries is computed in float32 for this.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxdistill.losses.relations import visible_pairs

_BLOCK_ELEMENTS = 2**24  # scores of one block of queries, of the whole batch


def divergence(attention, student, teacher, segments, num_heads: int, *, with_gradient: bool):
    """Sum of the KL over real queries and heads, and the gradients of the student's vectors (or none).

    Args:
      attention: (queries, keys, values, cotangent, scale) -> (P values, log-sum-exp [B, S, R], P^T cotangent), all [B, S, R, H];
        without a cotangent the last is None.
      student, teacher: (vectors [B, S, D],) or (queries, keys), zero under the padding; the padding's queries may get any finite
        output.
    """
    shape = (*segments.shape, num_heads, -1)
    ours, theirs = ([x.reshape(shape) for x in side] for side in (student, teacher))
    scales = ours[0].shape[-1] ** -0.5, theirs[0].shape[-1] ** -0.5
    cotangent = ours[0] if with_gradient else None
    seen, student_sum, to_student = attention(ours[0], ours[-1], ours[-1], cotangent, scales[0])
    values = ours[-1].astype(theirs[-1].dtype)
    of_student, teacher_sum, to_teacher = attention(theirs[0], theirs[-1], values, cotangent, scales[1])
    of_teacher = attention(theirs[0], theirs[-1], theirs[-1], None, scales[1])[0]
    real = (segments > 0)[:, :, None]
    value = _inner(theirs[0], of_teacher) * scales[1] - teacher_sum - _inner(ours[0], of_student) * scales[0] + student_sum
    total = jnp.sum(jnp.where(real, value, 0.0))
    if not with_gradient:
        return total, ()
    to_queries = jnp.where(real[..., None], _float32(seen) - _float32(of_student), 0.0)
    to_keys = _float32(to_student) - _float32(to_teacher)
    gradients = (to_queries + to_keys,) if len(student) == 1 else (to_queries, to_keys)
    return total, tuple((x * scales[0]).reshape(own.shape).astype(own.dtype) for x, own in zip(gradients, student, strict=True))


def _float32(x):
    return x.astype(jnp.float32)


def _inner(a, b):
    return jnp.sum(_float32(a) * _float32(b), axis=-1)


def in_query_blocks(query, key, value, cotangent, scale: float, *, segments):
    """On any device: all keys for one block of queries after the other; its scores are what is held."""
    batch, length, heads, _ = query.shape
    fitting = max(_BLOCK_ELEMENTS // (batch * heads * length), 1)
    blocks = -(-length // fitting)
    size = -(-length // blocks)
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    value = _float32(value)

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, blocks * size - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, blocks, size, *x.shape[2:]), 1, 0)

    def body(total, block):
        own, rows, given = block
        scores = jnp.einsum("bqrh,bkrh->brqk", own, key, preferred_element_type=jnp.float32) * jnp.float32(scale)
        seen = visible_pairs(segments, None) & (rows[:, None, :, None] == segments[:, None, None, :])
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        norm = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / norm
        output = exact("brqk,bkrv->bqrv", weights, value)
        if given is not None:
            total = total + exact("brqk,bqrv->bkrv", weights, _float32(given))
        return total, (output, jnp.swapaxes((peak + jnp.log(norm))[..., 0], 1, 2))

    start = None if cotangent is None else jnp.zeros(cotangent.shape, jnp.float32)
    given = None if cotangent is None else cut(cotangent)
    transposed, (output, log_sum) = jax.lax.scan(body, start, (cut(query), cut(segments), given))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, blocks * size, *x.shape[3:])[:, :length]  # noqa: E731
    return join(output), join(log_sum), transposed


def cudnn_head_size(*sizes: int) -> int:
    """Of queries, keys and values alike: the largest, in multiples of 8."""
    return -(-max(sizes) // 8) * 8


def by_cudnn(query, key, value, cotangent, scale: float, *, segments):
    """cuDNN's fused attention, half precision, on NVIDIA GPUs."""
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    return with_masks(dot_product_attention, query, key, value, cotangent, scale, segments=segments)


def with_masks(attention, query, key, value, cotangent, scale: float, *, segments):
    """What cuDNN asks for: sizes in multiples of 8, a mask [B, 1, S, S], and with it an even length.

    Padding sees padding, so that no query is without a key. `jax.nn.dot_product_attention` would round the log-sum-exp to half
    precision, which is more than a KL of close relations; the function below it does not.

    Args:
      attention: that function, or one with its signature.
    """
    length, size = query.shape[1], cudnn_head_size(query.shape[-1], value.shape[-1])
    odd = length % 2

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, size - x.shape[-1])))

    segments = jnp.pad(segments, ((0, 0), (0, odd)))
    mask = segments[:, None, :, None] == segments[:, None, None, :]

    def of_values(values):
        output, log_sum = attention(padded(query), padded(key), values, mask=mask, scale=scale, return_residual=True)
        return output, log_sum

    values = padded(value.astype(query.dtype))
    if cotangent is None:
        output, log_sum = of_values(values)
        transposed = None
    else:
        output, pull, log_sum = jax.vjp(of_values, values, has_aux=True)
        transposed = pull(padded(cotangent.astype(query.dtype)))[0][:, :length, :, : cotangent.shape[-1]]
    return output[:, :length, :, : value.shape[-1]], jnp.swapaxes(log_sum, 1, 2)[:, :length].astype(jnp.float32), transposed
