"""From the config's terms to numbers: which features each side must produce, then sums and counts, then one loss."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdistill.config import Term
from jaxdistill.features import EncoderOutput, Feature
from jaxdistill.models import EncoderConfig
from jaxdistill.parts import BoundTerm, Inputs, Sides, SumAndCount
from jaxdistill.terms import bind_term

Parts = dict[str, SumAndCount]  # name of a part of the loss -> (sum, count)


def bind_objective(
    terms: Sequence[Term],
    student: EncoderConfig,
    teacher: EncoderConfig,
    where: str,
    *,
    steps: int = 1,
    teacher_has_mlm_head: bool = False,
    masked_share: float = 0.15,
) -> tuple[BoundTerm, ...]:
    """Resolve layer maps and check that every term can be computed.

    Args:
      masked_share: of the tokens of masked text, those to be predicted; for the cost alone.

    Raises:
      InputError: a term that these two encoders cannot serve; names the place in the config and what would be right.
    """
    bound: list[BoundTerm] = []
    for i, term in enumerate(terms):
        name = term.kind if all(other.kind != term.kind for other in terms[:i]) else f"{term.kind}_{i + 1}"
        bound.append(bind_term(name, term, Sides(student, teacher, teacher_has_mlm_head, steps, f"{where}.{i}", masked_share)))
    return tuple(bound)


def reads_masked(terms: Sequence[Term]) -> bool:
    """Whether an objective is one for corrupted text: output distribution and masked language modelling."""
    return any(term.kind in ("output_kl", "mlm_cross_entropy") for term in terms)


def needs_labels(terms: Sequence[Term]) -> bool:
    """Whether a term counts the masked places: without corrupted text it would have nothing to count."""
    return any(term.kind == "mlm_cross_entropy" or getattr(term, "positions", "all") == "masked" for term in terms)


def reads_labels(terms: Sequence[Term]) -> bool:
    """Whether a term reads the labels of a task: the student then has a classification head."""
    return any(term.kind.startswith("label_") for term in terms)


def features_read(terms: Sequence[BoundTerm]) -> tuple[frozenset[Feature], frozenset[Feature]]:
    """Features that the terms read of the student and of the teacher."""
    parts = [part for term in terms for part in term.parts]
    return frozenset(f for part in parts for f in part.student), frozenset(f for part in parts for f in part.teacher)


def initial_projections(terms: Sequence[BoundTerm], key: jax.Array) -> dict:
    """Part -> {name: {"kernel": array}}: identity between equal sizes, else normal with variance 1 / (size of the input)."""

    def kernel(shape: tuple[int, ...], key) -> jax.Array:
        if shape[-1] == shape[-2]:
            return jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape) + jnp.float32(0.0)
        return jax.random.normal(key, shape, jnp.float32) * jnp.float32(shape[-2] ** -0.5)

    projections, number = {}, 0
    for part in (part for term in terms for part in term.parts if part.projections):
        projections[part.key] = {}
        for name, shape in part.projections:
            projections[part.key][name] = {"kernel": kernel(shape, jax.random.fold_in(key, number))}
            number += 1
    return projections


def measure(terms: Sequence[BoundTerm], student: EncoderOutput, teacher: EncoderOutput, projections: dict, inputs: Inputs) -> Parts:
    """(sum, count) of every part, unweighted."""
    return {
        part.name: part.compute(
            [student[feature] for feature in part.student],
            [teacher[feature] for feature in part.teacher],
            {name: projection["kernel"] for name, projection in projections.get(part.key, {}).items()},
            inputs,
        )
        for term in terms
        for part in term.parts
    }


def loss(terms: Sequence[BoundTerm], sums: dict, counts: dict, step):
    """The weighted sum of the parts' values: each sum over its count, once; weights as they are at this step."""
    return sum(
        term.weight.at(step) * part.weight * (sums[part.name] / jnp.maximum(counts[part.name], 1.0))
        for term in terms
        for part in term.parts
    )


def named_values(terms: Sequence[BoundTerm], values: dict[str, float], student: str, step: int) -> dict[str, float]:
    """Metrics of one student: <student>/loss (weighted as at this step), <student>/<term>, and its parts where it has several.

    A term's value is without its weight, so that a curve does not follow a schedule.
    """
    metrics, total = {}, 0.0
    for term in terms:
        value = sum(part.weight * values[part.name] for part in term.parts)
        metrics[f"{student}/{term.name}"] = value
        total += term.weight.at(step) * value if term.weight.at(step) else 0.0  # nothing of a term that is off, be it nan
        if len(term.parts) > 1:
            metrics |= {f"{student}/{part.name}": values[part.name] for part in term.parts}
    return {f"{student}/loss": total} | metrics
