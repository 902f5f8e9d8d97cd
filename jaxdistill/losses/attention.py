"""Attention transfer: the scores of the native heads, after the softmax (MiniLM) or before it (TinyBERT)."""

from __future__ import annotations

from jaxdistill.losses.relations import paired, relation_kl, relation_scores, squared_difference
from jaxdistill.shapes import Array, Float, Int, Num


def attention_kl(
    student_query: Float[Array, "B S Ds"],
    student_key: Float[Array, "B S Ds"],
    teacher_query: Float[Array, "B S Dt"],
    teacher_key: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """KL(teacher attention || student attention), head by head: softmax(Q K^T / sqrt(H)), each side with its own head size H.

    MiniLM (Wang et al. 2020) section 3.1; wang2023 Att-KL. It is the query-key relation with as many relation heads as there are
    attention heads.

    Args:
      student_query, student_key, teacher_query, teacher_key: of one layer, native heads side by side; any float dtype.
      mask: 1 = real token.
      num_heads: N, the attention heads of both sides.
      segment_ids: numbers of the texts packed in a row, 0 = padding; None: a row is one text.

    Returns:
      (sum, count): nats summed over the real queries and heads, and their number.

    Raises:
      ValueError: N does not divide one of the widths.
    """
    keys = {"student_keys": student_key, "teacher_keys": teacher_key}
    return relation_kl(student_query, teacher_query, mask, num_relation_heads=num_heads, segment_ids=segment_ids, **keys)


def attention_mse(
    student_query: Float[Array, "B S Ds"],
    student_key: Float[Array, "B S Ds"],
    teacher_query: Float[Array, "B S Dt"],
    teacher_key: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference of the scores before softmax, Q K^T / sqrt(H), each side with its own head size H.

    TinyBERT (Jiao et al. 2020) eq. 7; wang2023 Att-MSE. Arguments as in `attention_kl`.

    Returns:
      (sum, count): squares summed over pairs of real tokens of one text and heads, and their number.

    Raises:
      ValueError: N does not divide one of the widths.
    """
    student, teacher = paired((student_query, teacher_query), (student_key, teacher_key), mask)
    student_scores, teacher_scores = (relation_scores(*side, num_heads) for side in (student, teacher))
    return squared_difference(student_scores, teacher_scores, mask, segment_ids)
