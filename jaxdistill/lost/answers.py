"""The questions of "What is lost in knowledge distillation?" (Mohanty et al. 2023), answered for one student from its numbers."""

from __future__ import annotations

import numpy as np

from jaxdistill.lost.summary import ABOVE_EVEN, COUNTERPART, MEASURES, NOTICEABLE, Summary

KEPT = 0.01  # a CKA this far below the best one still counts as the same


def answers(summary: Summary) -> list[str]:
    """Plain sentences: layers, first and last, their spread, relations, attention heads, sentences, words, length, language."""
    found = [*_layers(summary), _relations(summary), *_heads(summary), _sentences(summary)]
    if summary.measured.mlm is not None:
        found.append(_words(summary))
    return [*found, *_length(summary), *_language(summary)]


def _layers(summary: Summary) -> list[str]:
    cka, nearest = summary.measured.cka, summary.nearest
    student, teacher = summary.num_layers
    pairs = [f"{layer} like {_layer(nearest[layer])} (CKA {cka[layer].max():.2f})" for layer in range(1, student + 1)]
    found = [f"Each student layer and the teacher layer it resembles most: {', '.join(pairs)}."]
    first = f"the embeddings have CKA {cka[0, 0]:.2f} with the teacher's, the first layer {cka[1, 1]:.2f} with its first"
    is_kept = cka[-1, -1] >= cka[-1].max() - KEPT
    last = f"the last layer has CKA {cka[-1, -1]:.2f} with the teacher's last"
    last += ", and resembles no other one more" if is_kept else f", but {cka[-1].max():.2f} with {_layer(nearest[-1])}"
    found.append(f"First and last: {first}; {last}.")
    even = np.arange(1, student + 1) * teacher / student
    distance = np.abs(nearest[1:] - even).max()
    is_ordered = bool(np.all(np.diff(nearest[1:]) > 0))
    spread = ", ".join(f"{place:g}" for place in np.round(even, 1))
    if distance <= max(teacher / student / 2, 0.5) and is_ordered:
        found.append(f"The student's layers lie evenly over the teacher's: all within half a step of {spread}.")
    else:
        order = "in the teacher's order" if is_ordered else "not all in the teacher's order"
        found.append(f"The student's layers do not lie evenly over the teacher's ({spread} would): up to {distance:.1f} off, {order}.")
    least = int(cka.max(axis=0)[1:].argmin()) + 1
    found.append(f"The teacher's layer that no student layer resembles much is {least} (best CKA {cka[:, least].max():.2f}).")
    return found


def _layer(number: int) -> str:
    return f"teacher layer {number}" if number else "the teacher's embeddings"


def _relations(summary: Summary) -> str:
    layer = summary.relation_layer
    overlap, divergence = (values[:, :, -1, layer - 1].mean(axis=1) for values in (summary.relations, summary.divergence))
    parts = [f"{kind} {one:.2f} (KL {two:.3f})" for kind, one, two in zip(("queries", "keys", "values"), overlap, divergence, strict=True)]
    return f"The relations of the student's last block overlap most with those of the teacher's block {layer}: {', '.join(parts)}."


def _heads(summary: Summary) -> list[str]:
    best, matched = summary.counterparts
    count = int(matched.sum())
    _, num_student_heads, *_ = summary.attention.shape
    total = summary.num_layers[0] * num_student_heads
    by_head = summary.attention.reshape(total, *matched.shape).argmax(axis=0)
    used = len(set(by_head[matched].tolist()))
    those = f": {used} of the student's {total} heads" if used else f", among its {total} heads"
    found = [
        f"Of the teacher's {matched.size} attention heads {count or 'none'} {'has' if count == 1 else 'have'} a counterpart in the student "
        f"(overlap above {COUNTERPART:g}, and {ABOVE_EVEN:g} above that of even attention){those}; the best matches overlap "
        f"{best.mean():.2f} on average."
    ]
    missing = (~matched).sum(axis=1)
    if missing.any() and matched.any():
        order = [i for i in np.argsort(-missing, kind="stable")[:3] if missing[i]]
        worst = ", ".join(f"layer {i + 1} ({missing[i]} of {matched.shape[1]})" for i in order)
        found.append(f"Most heads without a counterpart are in the teacher's {worst}.")
    return found


def _sentences(summary: Summary) -> str:
    mean, cls = (summary.everything[f"{kind} similarity"] for kind in ("mean", "CLS"))
    return (
        f"The ranking of which texts are alike is kept to {mean:.2f} by the mean vector and to {cls:.2f} by [CLS] (Spearman, 1: the same)."
    )


def _words(summary: Summary) -> str:
    numbers = summary.numbers()
    if not numbers["mlm_places"]:
        return "No place was masked: the text is too short to compare the guesses of the MLM heads."
    return (
        f"Of {numbers['mlm_places']} masked places the student's first guess is the teacher's at {numbers['mlm_top1']:.0%}, and the "
        f"teacher's is among its first five at {numbers['mlm_top5']:.0%}; the word itself is the first guess of the teacher at "
        f"{numbers['mlm_teacher_right']:.0%} and of the student at {numbers['mlm_student_right']:.0%}."
    )


def _length(summary: Summary) -> list[str]:
    groups = summary.by_length
    if len(groups) < 2:
        return [f"All rows have {next(iter(groups))}: of the length nothing can be said."]
    found = []
    for column, title in MEASURES.items():
        known = [(name, values[column]) for name, values in groups.items() if values[column] is not None]
        if len(known) > 1:
            (short, first), (long, last) = known[0], known[-1]
            change = "is much the same" if abs(last - first) < NOTICEABLE else ("falls" if last < first else "rises")
            found.append(f"{title} {change} ({first:.2f} at {short}, {last:.2f} at {long})")
    return [f"With the length of a text: {'; '.join(found)}."] if found else []


def _language(summary: Summary) -> list[str]:
    found = []
    for column, title in MEASURES.items() if len(summary.by_language) > 1 else []:
        known = sorted((values[column], name) for name, values in summary.by_language.items() if values[column] is not None)
        if len(known) < 2:
            continue
        ends = [", ".join(f"{name} ({value:.2f})" for value, name in part) for part in (known[::-1][:3], known[:3])]
        if len(known) <= 3:
            ends = [f"{name} ({value:.2f})" for value, name in (known[-1], known[0])]
        found.append(f"By language the {title} is highest for {ends[0]} and lowest for {ends[1]}.")
    return found
