"""What was measured as numbers, tables and heat maps, and in a few plain sentences.

Overlap is 1 - total variation, the share of probability that two distributions over the same keys have in common, meant over
queries: 0 nothing, 1 equal. Two flat distributions overlap too, so a teacher's head has a counterpart only where the student's is
nearer to it than even attention is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxdistill.agreement import similarity_agreement
from jaxdistill.lost.comparison import MLM_COUNTS, RELATIONS, Measured
from jaxdistill.lost.text import ALL, FEWEST_ROWS

COUNTERPART = 0.5  # overlap from which on two heads count as doing the same
ABOVE_EVEN = 0.05  # and from which on above the overlap of even attention, which any flat head has
NOTICEABLE = 0.02  # a smaller difference of a breakdown is called none
BREAKDOWN = ("rows", "tokens", "CKA, last layer", "relations", "CLS similarity", "mean similarity", "MLM top-1", "MLM top-5")
HEAD_COLUMNS = ["teacher layer", "with a counterpart", "heads", "best overlap", "overlap of even attention"]
MEASURES = {"CKA, last layer": "CKA of the last layer", "relations": "relation overlap", "MLM top-1": "MLM top-1 agreement"}


def length_buckets(lengths: Sequence[int]) -> list[str]:
    """The bucket of each row: up to 16 real tokens, up to 32, 64, ..."""
    found = []
    for length in lengths:
        high = 16
        while high < length:
            high *= 2
        found.append(f"{1 if high == 16 else high // 2 + 1}-{high} tokens")
    return found


@dataclass
class Summary:
    """Everything that is told of one student; `lengths`, `buckets` and `languages` are of the rows that `measured` holds."""

    measured: Measured
    lengths: np.ndarray
    buckets: list[str]
    languages: Sequence[str]

    @property
    def num_layers(self) -> tuple[int, int]:
        """Of student and teacher."""
        return self.measured.overlap.shape[1], self.measured.overlap.shape[3]

    @cached_property
    def attention(self) -> np.ndarray:
        """[Ls, Ns, Lt, Nt], mean overlap of the attention of two heads."""
        return self.measured.overlap.sum(axis=0, dtype=np.float64) / self.lengths.sum()

    @cached_property
    def relations(self) -> np.ndarray:
        """[3, R, Ls, Lt], mean overlap."""
        return self.measured.relation_overlap.sum(axis=0, dtype=np.float64) / self.lengths.sum()

    @cached_property
    def divergence(self) -> np.ndarray:
        """[3, R, Ls, Lt], mean KL in nats."""
        return self.measured.relation_kl.sum(axis=0, dtype=np.float64) / self.lengths.sum()

    @cached_property
    def counterparts(self) -> tuple[np.ndarray, np.ndarray]:
        """[Lt, Nt]: overlap of the student's head that is most like each of the teacher's, and whether it is a counterpart."""
        best = self.attention.max(axis=(0, 1))
        return best, (best > COUNTERPART) & (best > self.even + ABOVE_EVEN)

    @cached_property
    def even(self) -> np.ndarray:
        """[Lt, Nt], mean overlap of the teacher's heads with attention that is equal on all keys."""
        return self.measured.uniform.sum(axis=0, dtype=np.float64) / self.lengths.sum()

    @cached_property
    def relation_layer(self) -> int:
        """The teacher's block whose relations the student's last block overlaps most, 1..Lt."""
        return int(self.relations[:, :, -1].mean(axis=(0, 1)).argmax()) + 1

    @cached_property
    def nearest(self) -> list[int]:
        """The teacher's layer of the highest CKA for each layer 0..Ls of the student."""
        return self.measured.cka.argmax(axis=1).tolist()

    def breakdown(self, group: str, member: np.ndarray) -> dict[str, float | None]:
        """The columns of BREAKDOWN for the rows of `member` [N]."""
        tokens = int(self.lengths[member].sum())
        best = self.measured.relation_overlap[member][:, :, :, -1, self.relation_layer - 1]
        values: dict[str, float | None] = {
            "rows": int(member.sum()),
            "tokens": tokens,
            "CKA, last layer": self.measured.group_cka.get(group),
            "relations": float(best.sum(axis=0, dtype=np.float64).mean() / tokens),
        }
        for kind, title in (("cls", "CLS similarity"), ("mean", "mean similarity")):
            student, teacher = (vectors[member] for vectors in self.measured.sentences[kind])
            values[title] = similarity_agreement(teacher, student) if member.sum() >= FEWEST_ROWS else None
        if self.measured.mlm is not None:
            counts = dict(zip(MLM_COUNTS, self.measured.mlm[member].sum(axis=0).tolist(), strict=True))
            values |= {f"MLM top-{k}": counts[f"top{k}"] / counts["places"] if counts["places"] else None for k in (1, 5)}
        return {title: values.get(title) for title in BREAKDOWN}

    @cached_property
    def everything(self) -> dict[str, float | None]:
        return self.breakdown(ALL, np.ones(len(self.lengths), bool))

    @cached_property
    def by_length(self) -> dict[str, dict[str, float | None]]:
        names = sorted(set(self.buckets), key=lambda name: int(name.split("-")[0]))
        return {name: self.breakdown(name, np.array([own == name for own in self.buckets])) for name in names}

    @cached_property
    def by_language(self) -> dict[str, dict[str, float | None]]:
        names = [name for name in dict.fromkeys(self.languages) if name != ALL]
        return {name: self.breakdown(name, np.array([own == name for own in self.languages])) for name in names}

    def numbers(self) -> dict[str, float | int | None]:
        cka, last = self.measured.cka, self.relation_layer - 1
        best, matched = self.counterparts
        found = {
            "cka_embeddings": cka[0, 0],
            "cka_last": cka[-1, -1],
            "cka_last_debiased": self.everything["CKA, last layer"],
            "cka_blocks_best_mean": cka[1:].max(axis=1).mean(),
            "relation_teacher_layer": self.relation_layer,
            "relation_overlap": self.everything["relations"],
            "relation_kl": self.divergence[:, :, -1, last].mean(),
            "attention_heads": matched.size,
            "attention_heads_with_counterpart": int(matched.sum()),
            "attention_best_overlap": best.mean(),
            "attention_even_overlap": self.even.mean(),
            "similarity_cls": self.everything["CLS similarity"],
            "similarity_mean": self.everything["mean similarity"],
        }
        if self.measured.mlm is not None:
            counts = dict(zip(MLM_COUNTS, self.measured.mlm.sum(axis=0).tolist(), strict=True))
            places = counts.pop("places")
            found |= {"mlm_places": places} | {f"mlm_{name}": count / places if places else None for name, count in counts.items()}
        return {name: _rounded(value) for name, value in found.items()}

    def tables(self) -> list[dict[str, Any]]:
        layers = []
        for layer in range(1, self.num_layers[0] + 1):
            nearest = self.nearest[layer]
            row: list[Any] = [layer, nearest, _rounded(self.measured.cka[layer, nearest])]
            for kind in range(len(RELATIONS)):
                of_teacher = self.relations[kind, :, layer - 1].mean(axis=0)
                best = int(of_teacher.argmax())
                row += [best + 1, _rounded(of_teacher[best]), _rounded(self.divergence[kind, :, layer - 1, best].mean())]
            layers.append(row)
        columns = ["student layer", "nearest by CKA", "CKA"]
        columns += [f"{kind}: {what}" for kind in RELATIONS for what in ("nearest", "overlap", "KL")]
        best, matched = self.counterparts
        heads = [
            [layer + 1, int(matched[layer].sum()), matched.shape[1], _rounded(best[layer].mean()), _rounded(self.even[layer].mean())]
            for layer in range(len(matched))
        ]
        found = [
            {"title": "Layers", "columns": columns, "rows": layers},
            {
                "title": "Attention heads of the teacher",
                "columns": HEAD_COLUMNS,
                "rows": heads,
            },
        ]
        for title, groups in (("By length", self.by_length), ("By language", self.by_language)):
            if groups:
                everything = {"all rows": self.everything} if title == "By length" else {}
                rows = [[name, *map(_rounded, values.values())] for name, values in (groups | everything).items()]
                found.append({"title": title, "columns": ["rows of", *BREAKDOWN], "rows": rows})
        return found

    def heatmaps(self) -> list[dict[str, Any]]:
        """In the form of the section "lost"; rows are the student's, columns the teacher's."""
        student, teacher = (list(map(str, range(1, count + 1))) for count in self.num_layers)
        names = {"rows_title": "student layer", "columns_title": "teacher layer"}
        found = [
            _heatmap("CKA of hidden states", self.measured.cka, ["0", *student], ["0", *teacher], **names)
            | {"note": "Linear CKA over the real tokens; 1 equal up to rotation and scale. Layer 0 is the embeddings."}
        ]
        for kind, values in zip(RELATIONS, self.relations.mean(axis=1), strict=True):
            note = f"How alike the tokens relate under their {kind} vectors, mean of the relation heads: overlap, 1 equal."
            found.append(_heatmap(f"Relations of {kind} vectors", values, student, teacher, **names) | {"note": note})
        num_layers, num_heads = self.attention.shape[0], self.attention.shape[1]
        heads = [f"{layer}.{head + 1}" for layer in student for head in range(num_heads)]
        teacher_heads = [f"{layer}.{head + 1}" for layer in teacher for head in range(self.attention.shape[3])]
        matches = self.attention.max(axis=1).mean(axis=-1)
        note = "Mean over the teacher's heads of the overlap with the most similar student head of the layer; 1: every head is there."
        found.append(_heatmap("Attention heads, best match", matches, student, teacher, **names) | {"note": note})
        every = self.attention.reshape(num_layers * num_heads, -1)
        head_names = {"rows_title": "student layer.head", "columns_title": "teacher layer.head"}
        note = "Overlap of the attention of two heads, mean over queries; 1 equal. A column without a dark cell is a head that is lost."
        found.append(_heatmap("Attention, head by head", every, heads, teacher_heads, **head_names) | {"note": note})
        divergence = self.divergence.mean(axis=0).transpose(1, 0, 2).reshape(-1, self.num_layers[1])
        relation_heads = [f"{layer}.{head + 1}" for layer in student for head in range(self.divergence.shape[1])]
        note = "KL(teacher || student) in nats, mean of queries, keys and values; pale is alike, 0 equal."
        high = float(np.ceil(10 * divergence.max()) / 10) or 0.1
        names = {"rows_title": "student layer.relation head", "columns_title": "teacher layer", "high": high}
        found.append(_heatmap("Relation KL of each relation head", divergence, relation_heads, teacher, **names) | {"note": note})
        return found


def _heatmap(title: str, values: np.ndarray, rows: list[str], columns: list[str], *, high: float = 1, **names: str) -> dict[str, Any]:
    cells = [[_rounded(value) for value in row] for row in values]
    return {"title": title, **names, "rows": rows, "columns": columns, "values": cells, "low": 0, "high": high}


def _rounded(value: Any) -> Any:
    """As JSON has it: 4 digits, and null for what is no number."""
    if value is None or isinstance(value, (str, int)):
        return value
    return round(float(value), 4) if np.isfinite(value) else None
