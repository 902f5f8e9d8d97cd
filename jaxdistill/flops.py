"""Floating-point operations by formula: XLA's own count leaves out loops and custom calls.

A multiply-add is 2 operations; norms, activations and softmax are left out (about 3 % at these widths).
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxdistill.features import Feature, deepest_layer
from jaxdistill.models import EncoderConfig
from jaxdistill.objective import features_read
from jaxdistill.update import Student


def forward_flops_per_token(config: EncoderConfig, sequence_length: int, features: Iterable[Feature]) -> int:
    """One encoder up to the deepest of these features; the last block only as far as it is needed."""
    features = frozenset(features)
    width, inner, deepest = config.hidden_size, config.intermediate_size, deepest_layer(features)
    projection, attention = 2 * width * width, 4 * sequence_length * width
    block = 4 * projection + attention + 2 * 2 * width * inner
    if deepest == 0:
        return 0
    if Feature("logits", deepest) in features:
        return deepest * block + projection  # the head's transform; the vocabulary belongs to the losses, which choose the tokens
    if {Feature("hidden", deepest), Feature("label_logits", deepest)} & features:  # a classification head reads one token of a row
        return deepest * block
    return (deepest - 1) * block + projection * sum(feature.layer == deepest for feature in features)


def step_flops_per_token(student: Student, sequence_length: int) -> int:
    """Training one student on one token, without the teacher's share: forward, and twice that for the gradients; its losses."""
    features, _ = features_read(student.terms)
    losses = sum(part.flops(sequence_length) for term in student.terms for part in term.parts)
    return 3 * forward_flops_per_token(student.config, sequence_length, features) + losses
