"""Self-attention relations (MiniLMv2): how the tokens of a text relate, under queries, keys or values, or across two of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdistill.shapes import Array, Bool, Float, Int, Num


def split_relation_heads(vectors: Float[Array, "B S D"], num_relation_heads: int) -> Float[Array, "B R S H"]:
    """[B, S, D] -> R heads of D/R numbers each, whatever the native heads are; float32.

    Raises:
      ValueError: R does not divide D.
    """
    batch, length, width = vectors.shape
    if width % num_relation_heads:
        raise ValueError(f"{num_relation_heads} relation heads do not divide the hidden size {width}")
    heads = vectors.astype(jnp.float32).reshape(batch, length, num_relation_heads, width // num_relation_heads)
    return heads.transpose(0, 2, 1, 3)


def visible_pairs(mask: Num[Array, "B S"], segment_ids: Int[Array, "B S"] | None) -> Bool[Array, "B 1 Q S"]:
    """Which keys a query sees: real tokens, with packed rows those of its own segment (Q is S then, else 1)."""
    visible = (mask > 0)[:, None, None, :]
    if segment_ids is None:
        return visible
    return visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


def zero_padding(vectors: Float[Array, "B S D"], mask: Num[Array, "B S"]) -> Float[Array, "B S D"]:
    """Zeros under the padding: times a probability of 0, what stands there could still be NaN."""
    return jnp.where((mask > 0)[..., None], vectors, 0)


def relation_scores(
    queries: Float[Array, "B S D"], keys: Float[Array, "B S D"], num_relation_heads: int, *, scaled: bool = True
) -> Float[Array, "B R S S"]:
    """A_Q A_K^T of each relation head; scaled: divided by sqrt(D/R)."""
    queries, keys = (split_relation_heads(vectors, num_relation_heads) for vectors in (queries, keys))
    scores = jnp.einsum("brqh,brkh->brqk", queries, keys)
    return scores * jnp.float32(queries.shape[-1] ** -0.5) if scaled else scores


def log_relations(
    queries: Float[Array, "B S D"], keys: Float[Array, "B S D"], visible: Bool[Array, "B 1 Q S"], num_relation_heads: int
) -> Float[Array, "B R S S"]:
    """log softmax(A_Q A_K^T / sqrt(D/R)) over the visible keys (udagawa2023 eq. 7); finite where a query sees nothing."""
    scores = relation_scores(queries, keys, num_relation_heads)
    return jax.nn.log_softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)


def paired(
    vectors: tuple[Float[Array, "B S Ds"], Float[Array, "B S Dt"]],
    keys: tuple[Float[Array, "B S Ds"] | None, Float[Array, "B S Dt"] | None],
    mask: Num[Array, "B S"],
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(queries, keys) of the student and of the teacher, without what stands under the padding; the teacher is a constant.

    Raises:
      ValueError: keys of one side only.
    """
    check_keys(*keys)
    student, teacher = (
        tuple(zero_padding(x, mask) for x in (own, own if own_keys is None else own_keys))
        for own, own_keys in zip(vectors, keys, strict=True)
    )
    return student, jax.lax.stop_gradient(teacher)


def check_keys(student_keys: Array | None, teacher_keys: Array | None) -> None:
    if (student_keys is None) != (teacher_keys is None):
        raise ValueError("a cross relation needs student_keys and teacher_keys, a self relation neither: one of them is missing")


def relation_kl(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_relation_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    student_keys: Float[Array, "B S Ds"] | None = None,
    teacher_keys: Float[Array, "B S Dt"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """KL(teacher relations || student relations) of one kind of vectors: query, key or value; with keys, across two kinds.

    udagawa2023 eq. 7-9; MiniLMv2 (Wang et al. 2021) section 3.1. Each side is re-split into R relation heads of its own
    size D/R and scaled by that size. This is the plain form, [B, R, S, S] in memory, and the oracle of faster ones.

    Args:
      student, teacher: vectors of one kind from one layer, native heads side by side; any float dtype.
      mask: 1 = real token.
      num_relation_heads: R, a divisor of Ds and Dt, free of the native head counts.
      segment_ids: numbers of the texts packed in a row, 0 = padding; None: a row is one text.
      student_keys, teacher_keys: vectors of another kind that student and teacher are set against; None: against themselves.

    Returns:
      (sum, count): nats summed over the counted queries and relation heads, and their number (real tokens x R).

    Raises:
      ValueError: R does not divide one of the widths, or keys of one side only.
    """
    student, teacher = paired((student, teacher), (student_keys, teacher_keys), mask)
    visible = visible_pairs(mask, segment_ids)
    student_log = log_relations(*student, visible, num_relation_heads)
    teacher_log = log_relations(*teacher, visible, num_relation_heads)
    difference = jnp.where(visible, teacher_log - student_log, 0.0)
    divergence = jnp.sum(jnp.exp(teacher_log) * difference, axis=-1)
    real = (mask > 0).astype(jnp.float32)
    return jnp.sum(divergence * real[:, None, :]), jnp.sum(real) * num_relation_heads


def relation_mse(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_relation_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    student_keys: Float[Array, "B S Ds"] | None = None,
    teacher_keys: Float[Array, "B S Dt"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference of the relations before scaling and softmax: A_S A_S^T against A_T A_T^T in each relation head.

    udagawa2023 eq. 11, where it links Direct transfer to MiniLMv2. The products are neither scaled nor normalised, so a
    wider head counts for more. Arguments as in `relation_kl`.

    Returns:
      (sum, count): squares summed over pairs of real tokens of one text and relation heads, and their number.

    Raises:
      ValueError: R does not divide one of the widths, or keys of one side only.
    """
    student, teacher = paired((student, teacher), (student_keys, teacher_keys), mask)
    student_scores, teacher_scores = (relation_scores(*side, num_relation_heads, scaled=False) for side in (student, teacher))
    return squared_difference(student_scores, teacher_scores, mask, segment_ids)


def squared_difference(
    student_scores: Float[Array, "B R S S"],
    teacher_scores: Float[Array, "B R S S"],
    mask: Num[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, count) over the pairs of a real query and a key that it sees, in every head."""
    pairs = visible_pairs(mask, segment_ids) & (mask > 0)[:, None, :, None]
    difference = jnp.where(pairs, student_scores - teacher_scores, 0.0)
    return jnp.sum(jnp.square(difference)), jnp.sum(pairs.astype(jnp.float32)) * student_scores.shape[1]
