"""From the config's terms to numbers: which features each side must produce, then sums and counts, then one loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdistill import kernels
from jaxdistill.config import RelationKL, Term
from jaxdistill.errors import InputError
from jaxdistill.features import EncoderOutput, Feature
from jaxdistill.layer_map import Pairs
from jaxdistill.models import EncoderConfig

Parts = dict[str, tuple[jax.Array, jax.Array]]  # name of a part of the loss -> (sum, count)


@dataclass(frozen=True)
class Part:
    """One (sum, count) of a term: a kind of feature, and the pair of layers that it compares."""

    name: str
    weight: float
    student: Feature
    teacher: Feature
    relation_heads: int


@dataclass(frozen=True)
class BoundTerm:
    """A term of the config with its layers resolved against one student and the teacher."""

    name: str
    pairs: Pairs
    parts: tuple[Part, ...]


def bind_objective(terms: Sequence[Term], student: EncoderConfig, teacher: EncoderConfig, where: str) -> tuple[BoundTerm, ...]:
    """Resolve layer maps and check that every term can be computed.

    Raises:
      InputError: a layer out of range, or relation heads that do not divide both widths; names the place in the config.
    """
    bound: list[BoundTerm] = []
    for i, term in enumerate(terms):
        place = f"{where}.{i}"
        name = term.kind if all(other.kind != term.kind for other in terms[:i]) else f"{term.kind}_{i + 1}"
        try:
            pairs = term.layer_map.resolve(student.num_layers, teacher.num_layers)
        except InputError as error:
            raise InputError(f"{place}.layer_map: {error}") from None
        bound.append(_bind_relation_kl(name, term, pairs, student, teacher, place))
    return tuple(bound)


def _bind_relation_kl(
    name: str, term: RelationKL, pairs: Pairs, student: EncoderConfig, teacher: EncoderConfig, place: str
) -> BoundTerm:
    heads, widths = term.relation_heads, (student.hidden_size, teacher.hidden_size)
    if any(width % heads for width in widths):
        fitting = [n for n in range(1, min(widths) + 1) if all(width % n == 0 for width in widths)]
        closest = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:4])
        raise InputError(
            f"{place}.relation_heads: {heads} does not divide both hidden sizes, student {widths[0]} and teacher {widths[1]}; "
            f"{', '.join(map(str, closest))} would"
        )
    if any(0 in pair for pair in pairs):
        raise InputError(f"{place}.layer_map: layer 0 is the embeddings, which have no queries, keys and values")
    parts = []
    for student_layer, teacher_layer in pairs:
        for kind in ("query", "key", "value"):
            if weight := getattr(term, kind):
                part = f"{name}/{kind}" if len(pairs) == 1 else f"{name}/{kind}/{student_layer}-{teacher_layer}"
                features = Feature(kind, student_layer), Feature(kind, teacher_layer)
                parts.append(Part(part, term.weight * weight, *features, heads))
    return BoundTerm(name, pairs, tuple(parts))


def features_read(terms: Sequence[BoundTerm]) -> tuple[frozenset[Feature], frozenset[Feature]]:
    """Features that the terms read of the student and of the teacher."""
    parts = [part for term in terms for part in term.parts]
    return frozenset(part.student for part in parts), frozenset(part.teacher for part in parts)


def measure(terms: Sequence[BoundTerm], student: EncoderOutput, teacher: EncoderOutput, mask, segment_ids) -> Parts:
    """(sum, count) of every part, unweighted."""
    return {
        part.name: kernels.relation_kl(
            student[part.student],
            teacher[part.teacher],
            mask,
            num_relation_heads=part.relation_heads,
            segment_ids=segment_ids,
        )
        for term in terms
        for part in term.parts
    }


def loss(terms: Sequence[BoundTerm], sums: dict, counts: dict):
    """The weighted sum of the parts' values: each sum over its count, once."""
    return sum(part.weight * (sums[part.name] / jnp.maximum(counts[part.name], 1.0)) for term in terms for part in term.parts)


def named_values(terms: Sequence[BoundTerm], values: dict[str, float], student: str) -> dict[str, float]:
    """Metrics of one student: <student>/loss, <student>/<term>, and <student>/<part> where a term has several."""
    metrics = {}
    for term in terms:
        metrics[f"{student}/{term.name}"] = sum(part.weight * values[part.name] for part in term.parts)
        if len(term.parts) > 1:
            metrics |= {f"{student}/{part.name}": values[part.name] for part in term.parts}
    return {f"{student}/loss": sum(metrics[f"{student}/{term.name}"] for term in terms)} | metrics
