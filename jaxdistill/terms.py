"""Terms of the config bound to one student and the teacher: what each reads, what it learns beside, what it computes and costs.

One function per kind. Everything that can be wrong with a term is said here, before any array exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxdistill import kernels, losses
from jaxdistill.config import (
    AttentionKL,
    AttentionMSE,
    DirectMSE,
    HiddenContrastive,
    HiddenCosine,
    HiddenMSE,
    LabelCrossEntropy,
    LabelKL,
    LabelMSE,
    MLMCrossEntropy,
    OutputKL,
    RelationKL,
    RelationMSE,
    Schedule,
)
from jaxdistill.errors import InputError
from jaxdistill.features import Feature
from jaxdistill.models import label_order
from jaxdistill.parts import BoundTerm, Inputs, Link, Part, Sides, SumAndCount, first_vectors, links_of, relations_detail


def _not_learned(term, sides: Sides) -> None:
    if term.layer_map.strategy == "learned":
        raise InputError(
            f"{sides.place}.layer_map: learned mixes hidden states of the teacher's layers: it is for hidden_mse and hidden_cosine, "
            f"not for {term.kind}"
        )


# Relations, Direct and attention: queries, keys and values


def _heads(term, sides: Sides, field: str = "relation_heads") -> int:
    """Relation heads that fit both sides.

    Raises:
      InputError: they do not divide both widths (with those that would), or "native" where the two sides differ.
    """
    heads = getattr(term, field, "native")
    native = sides.student.num_heads, sides.teacher.num_heads
    if heads == "native":
        if native[0] != native[1]:
            relation = isinstance(term, (RelationKL, RelationMSE, DirectMSE))
            other = f"{sides.place}.relation_heads: native heads" if relation else f"{sides.place}: {term.kind}"
            way = f"; or relation_heads, a divisor of {sides.widths[0]} and {sides.widths[1]}" if relation else ""
            raise InputError(
                f"{other} need as many attention heads on both sides, the student has {native[0]}, the teacher {native[1]}; "
                f"give the student num_heads {native[1]}{way}"
            )
        return native[0]
    widths = sides.widths
    if any(width % heads for width in widths):
        fitting = [n for n in range(1, min(widths) + 1) if all(width % n == 0 for width in widths)]
        closest = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:4])
        raise InputError(
            f"{sides.place}.relation_heads: {heads} does not divide both hidden sizes, student {widths[0]} and teacher {widths[1]}; "
            f"{', '.join(map(str, closest))} would"
        )
    return heads


def _product_flops(sides: Sides) -> Callable[[int], int]:
    """Scores of both sides, and for the student's gradient two products of the same size."""
    return lambda length: 2 * length * (3 * sides.widths[0] + sides.widths[1])


def _split(arrays: list, parts: int) -> list[list]:
    """The candidates of each kind of vectors, one kind after the other."""
    size = len(arrays) // parts
    return [arrays[i * size : (i + 1) * size] for i in range(parts)]


def _bind_relations(name: str, term: RelationKL | RelationMSE, sides: Sides) -> BoundTerm:
    _not_learned(term, sides)
    heads = _heads(term, sides)
    pairs, links, note = links_of(term.layer_map, sides, 1)
    function = kernels.relation_kl if isinstance(term, RelationKL) else kernels.relation_mse

    def compute(link: Link, student, teacher, projections, inputs: Inputs) -> SumAndCount:
        vectors = [link.chosen(candidates, inputs.step) for candidates in _split(teacher, len(student))]
        keys = {"student_keys": student[1], "teacher_keys": vectors[1]} if len(student) == 2 else {}
        own = {"num_relation_heads": heads, "segment_ids": inputs.segment_ids, "kernels": inputs.kernels}
        return function(student[0], vectors[0], inputs.mask, **own, **keys)

    parts = []
    for link in links:
        for vectors, weight in term.vectors().items():
            student, teacher = (sum(sides_of, ()) for sides_of in zip(*map(link.features, vectors.split("-")), strict=True))
            title = f"{name}/{vectors.replace('-', '_')}{link.suffix}"
            parts.append(Part(title, weight, student, teacher, partial(compute, link), _product_flops(sides)))
    said = {"relation_heads": heads if isinstance(term, RelationKL) else 0, "detail": relations_detail(term.vectors(), heads)}
    return BoundTerm(name, term.kind, term.weight, pairs, tuple(parts), note, **said)


def _bind_direct(name: str, term: DirectMSE, sides: Sides) -> BoundTerm:
    _not_learned(term, sides)
    heads = _heads(term, sides)
    pairs, links, note = links_of(term.layer_map, sides, 1)
    shape = (heads, sides.widths[0] // heads, sides.widths[1] // heads)

    def compute(link: Link, student, teacher, projections, inputs: Inputs) -> SumAndCount:
        return losses.direct_mse(student[0], link.chosen(teacher, inputs.step), projections["student"], inputs.mask)

    parts = []
    for link in links:
        for vectors, weight in term.vectors().items():
            cost = lambda length: 6 * shape[0] * shape[1] * shape[2]  # noqa: E731
            title = f"{name}/{vectors}{link.suffix}"
            parts.append(Part(title, weight, *link.features(vectors), partial(compute, link), cost, (("student", shape),)))
    return BoundTerm(name, term.kind, term.weight, pairs, tuple(parts), note, detail=relations_detail(term.vectors(), heads))


def _bind_attention(name: str, term: AttentionKL | AttentionMSE, sides: Sides) -> BoundTerm:
    _not_learned(term, sides)
    heads = _heads(term, sides)
    pairs, links, note = links_of(term.layer_map, sides, 1)
    function = kernels.attention_kl if isinstance(term, AttentionKL) else kernels.attention_mse

    def compute(link: Link, student, teacher, projections, inputs: Inputs) -> SumAndCount:
        vectors = [link.chosen(candidates, inputs.step) for candidates in _split(teacher, 2)]
        own = {"num_heads": heads, "segment_ids": inputs.segment_ids, "kernels": inputs.kernels}
        return function(*student, *vectors, inputs.mask, **own)

    parts = []
    for link in links:
        (query, queries), (key, keys) = link.features("query"), link.features("key")
        parts.append(Part(f"{name}{link.suffix}", 1.0, query + key, queries + keys, partial(compute, link), _product_flops(sides)))
    softmax = heads if isinstance(term, AttentionKL) else 0
    return BoundTerm(name, term.kind, term.weight, pairs, tuple(parts), note, relation_heads=softmax)


# Hidden states


def _needs_projection(term: HiddenMSE | HiddenCosine, sides: Sides) -> bool:
    if term.projection == "never" and sides.widths[0] != sides.widths[1]:
        raise InputError(
            f"{sides.place}.projection: never needs equal hidden sizes, the student has {sides.widths[0]}, the teacher {sides.widths[1]}; "
            f"take auto, or give the student hidden_size {sides.widths[1]}"
        )
    return term.projection == "always" or sides.widths[0] != sides.widths[1]


def _bind_hidden(name: str, term: HiddenMSE | HiddenCosine, sides: Sides) -> BoundTerm:
    projected = _needs_projection(term, sides)
    pairs, links, note = links_of(term.layer_map, sides, 0)
    learned, temperature = term.layer_map.strategy == "learned", term.layer_map.temperature or 0.1
    function = losses.hidden_mse if isinstance(term, HiddenMSE) else losses.hidden_cosine

    def compute(link: Link, student, teacher, projections, inputs: Inputs) -> SumAndCount:
        kernel = projections["student"] if projected else None
        mask = inputs.first_tokens if term.tokens == "cls" else inputs.mask
        if learned:
            target = losses.attended_layers(student[0], teacher, mask, kernel, temperature=temperature)
        else:
            target = link.chosen(teacher, inputs.step)
        return function(student[0], target, mask, kernel)

    shape = (("student", sides.widths),) if projected else ()
    cost = lambda length: 6 * sides.widths[0] * sides.widths[1] if projected else 0  # noqa: E731
    parts = [Part(f"{name}{link.suffix}", 1.0, *link.features("hidden"), partial(compute, link), cost, shape) for link in links]
    return BoundTerm(name, term.kind, term.weight, pairs, tuple(parts), note)


def _bind_contrastive(name: str, term: HiddenContrastive, sides: Sides) -> BoundTerm:
    _not_learned(term, sides)
    pairs, links, note = links_of(term.layer_map, sides, 0)
    _check_schedule(term.temperature, sides, "temperature")
    if len(links) != 1 or links[0].draws is not None:
        kind = "changes" if len(links) == 1 else f"has {len(links)}"
        raise InputError(f"{sides.place}.layer_map: hidden_contrastive compares one fixed pair of layers; this map {kind}")
    student_feature, teacher_feature = links[0].features("hidden")

    def compute(student, teacher, projections, inputs: Inputs) -> SumAndCount:
        own, targets = (first_vectors(vectors, inputs.mask) for vectors in (student[0], teacher[0]))
        others = inputs.negatives.get(name, ())
        vectors = [jnp.matmul(_float32(other.vectors), projections["teacher"]) for other in others]
        return losses.hidden_contrastive(
            jnp.matmul(_float32(own.vectors), projections["student"]),
            jnp.matmul(_float32(targets.vectors), projections["teacher"]),
            temperature=term.temperature.at(inputs.step),
            mask=own.mask,
            negatives=jnp.concatenate(vectors) if others else None,
            negatives_mask=jnp.concatenate([other.mask for other in others]) if others else None,
        )

    shapes = tuple((side, (width, term.projection_size)) for side, width in zip(("student", "teacher"), sides.widths, strict=True))
    part = Part(name, 1.0, student_feature, teacher_feature, compute, lambda length: 0, shapes)
    bank = (teacher_feature[0], term.memory_bank) if term.memory_bank else None
    return BoundTerm(name, term.kind, term.weight, pairs, (part,), note, bank)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


# The vocabulary


def _bind_output(name: str, term: OutputKL, sides: Sides) -> BoundTerm:
    if not sides.teacher_has_mlm_head:
        raise InputError(
            f"{sides.place}: output_kl reads the teacher's logits, and this teacher has no MLM head; take a masked language model "
            f"(BertForMaskedLM, RobertaForMaskedLM) as teacher, or another term"
        )
    _check_schedule(term.temperature, sides, "temperature")

    def compute(student, teacher, projections, inputs: Inputs) -> SumAndCount:
        mask = inputs.mask if term.positions == "all" else (inputs.labels != -100).astype(jnp.int32)
        return kernels.output_kl(student[0], teacher[0], mask, temperature=term.temperature.at(inputs.step), kernels=inputs.kernels)

    depths = sides.student.num_layers, sides.teacher.num_layers
    share = 1.0 if term.positions == "all" else sides.masked_share
    cost = lambda length: round(share * 2 * sides.student.vocab_size * (3 * sides.widths[0] + sides.widths[1]))  # noqa: E731
    part = Part(name, 1.0, (Feature("logits", depths[0]),), (Feature("logits", depths[1]),), compute, cost)
    return BoundTerm(name, term.kind, term.weight, (), (part,), f"logits of {term.positions} tokens, T {term.temperature}")


def _bind_mlm(name: str, term: MLMCrossEntropy, sides: Sides) -> BoundTerm:
    def compute(student, teacher, projections, inputs: Inputs) -> SumAndCount:
        return kernels.mlm_cross_entropy(student[0], inputs.labels, kernels=inputs.kernels)

    cost = lambda length: round(sides.masked_share * 6 * sides.student.vocab_size * sides.widths[0])  # noqa: E731
    part = Part(name, 1.0, (Feature("logits", sides.student.num_layers),), (), compute, cost)
    return BoundTerm(name, term.kind, term.weight, (), (part,), "labels of masked tokens")


# The labels of a task


def _label_sides(term, sides: Sides, *, reads_teacher: bool = True) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    """What both sides must produce.

    Raises:
      InputError: a text instead of a task, a teacher without a classification head, or with one for other labels.
    """
    labels, theirs = sides.student.labels, sides.teacher.labels
    if not labels:
        raise InputError(f"{sides.place}: {term.kind} reads the labels of a task, and the data is a text; give data.task")
    student, teacher = (Feature("label_logits", side.num_layers) for side in (sides.student, sides.teacher))
    if not reads_teacher:
        return (student,), ()
    if not theirs:
        raise InputError(
            f"{sides.place}: {term.kind} reads the teacher's logits of the labels, and this teacher has no classification head; take one "
            f"that is fine-tuned on the task (a ...ForSequenceClassification), or label_cross_entropy, which reads no teacher"
        )
    order = label_order(labels, theirs)
    if order != list(range(len(labels))):
        order = " in another order" if order else ""
        raise InputError(
            f"{sides.place}: {term.kind} compares {_named(labels)}, and the teacher has {_named(theirs)}{order}; take a teacher that is "
            f"fine-tuned on the task of data.task"
        )
    return (student,), (teacher,)


def _named(labels: tuple[str, ...]) -> str:
    return f"{len(labels)} labels ({', '.join(labels[:4])}{', ...' if len(labels) > 4 else ''})" if len(labels) > 1 else "one value"


def _bind_label_kl(name: str, term: LabelKL, sides: Sides) -> BoundTerm:
    if len(sides.student.labels) == 1:
        raise InputError(f"{sides.place}: label_kl compares probabilities, and the task of data.task is a regression; take label_mse")
    features = _label_sides(term, sides)
    _check_schedule(term.temperature, sides, "temperature")

    def compute(student, teacher, projections, inputs: Inputs) -> SumAndCount:
        return losses.label_kl(student[0], teacher[0], inputs.rows, temperature=term.temperature.at(inputs.step))

    part = Part(name, 1.0, *features, compute, lambda length: 0)
    return BoundTerm(name, term.kind, term.weight, (), (part,), f"{_named(sides.student.labels)} of the teacher, T {term.temperature}")


def _bind_label_mse(name: str, term: LabelMSE, sides: Sides) -> BoundTerm:
    def compute(student, teacher, projections, inputs: Inputs) -> SumAndCount:
        return losses.label_mse(student[0], teacher[0], inputs.rows)

    part = Part(name, 1.0, *_label_sides(term, sides), compute, lambda length: 0)
    return BoundTerm(name, term.kind, term.weight, (), (part,), f"{_named(sides.student.labels)} of the teacher, logits")


def _bind_label_cross_entropy(name: str, term: LabelCrossEntropy, sides: Sides) -> BoundTerm:
    regression = len(sides.student.labels) == 1

    def compute(student, teacher, projections, inputs: Inputs) -> SumAndCount:
        if regression:
            return losses.label_mse(student[0], inputs.row_labels[:, None], inputs.rows)
        return losses.label_cross_entropy(student[0], inputs.row_labels, inputs.rows)

    part = Part(name, 1.0, *_label_sides(term, sides, reads_teacher=False), compute, lambda length: 0)
    note = f"{_named(sides.student.labels)} of the task" + (", squared error" if regression else "")
    return BoundTerm(name, term.kind, term.weight, (), (part,), note)


_BIND: dict[type, Callable[..., BoundTerm]] = {
    RelationKL: _bind_relations,
    RelationMSE: _bind_relations,
    DirectMSE: _bind_direct,
    AttentionKL: _bind_attention,
    AttentionMSE: _bind_attention,
    HiddenMSE: _bind_hidden,
    HiddenCosine: _bind_hidden,
    HiddenContrastive: _bind_contrastive,
    OutputKL: _bind_output,
    MLMCrossEntropy: _bind_mlm,
    LabelKL: _bind_label_kl,
    LabelCrossEntropy: _bind_label_cross_entropy,
    LabelMSE: _bind_label_mse,
}


def _check_schedule(schedule: Schedule, sides: Sides, field: str) -> None:
    if schedule.steps[-1] > sides.steps:
        raise InputError(
            f"{sides.place}.{field}.steps: step {schedule.steps[-1]} is out of range, training takes {sides.steps} steps there"
        )


def bind_term(name: str, term, sides: Sides) -> BoundTerm:
    """The term against these two encoders.

    Raises:
      InputError: it cannot be computed; names the place in the config and what would be right.
    """
    _check_schedule(term.weight, sides, "weight")
    return _BIND[type(term)](name, term, sides)
