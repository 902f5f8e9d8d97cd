"""What a bound term is made of: its parts, the layers that they compare, and what they may read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import losses
from jaxdistill.config import LayerMapConfig, Schedule
from jaxdistill.errors import InputError
from jaxdistill.features import Feature
from jaxdistill.kernels import ON_CPU, Kernels
from jaxdistill.layer_map import Pairs
from jaxdistill.models import EncoderConfig

MOST_DRAWS = 1_000_000  # of a random layer map; they are all drawn beforehand
SumAndCount = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextVectors:
    """The teacher's first vector of many rows: negatives of a contrastive term. `mask` says which places hold one."""

    vectors: jax.Array  # [K, Dt]
    mask: jax.Array  # [K]


def first_vectors(hidden: jax.Array, mask: jax.Array) -> TextVectors:
    """The vector of each row's first real token, [B, D]; rows without a token are masked."""
    place = jnp.argmax(mask > 0, axis=1)
    vectors = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return TextVectors(vectors, jnp.any(mask > 0, axis=1).astype(jnp.int32))


@dataclass(frozen=True)
class Inputs:
    """What a part may read beside its features. Negatives go by the name of their term."""

    mask: jax.Array  # [B, S], 1 = real token
    segment_ids: jax.Array | None  # [B, S] with packed rows
    labels: jax.Array | None  # [B, S] of masked input, -100 = not predicted
    step: Any  # int32
    negatives: dict[str, tuple[TextVectors, ...]]  # rows of the other micro-batches, and of a memory bank
    row_labels: jax.Array | None = None  # [B] of a task's examples; int32, float32 of a regression
    kernels: Kernels = ON_CPU

    @property
    def rows(self) -> jax.Array:
        """[B], 1 where a row holds an example; the last batch of an evaluation is filled up with rows that do not."""
        return jnp.any(self.mask > 0, axis=1).astype(jnp.int32)

    @property
    def first_tokens(self) -> jax.Array:
        return losses.first_tokens(self.mask, self.segment_ids)


@dataclass(frozen=True)
class Part:
    """One (sum, count) of a term. `compute` gets the arrays of `student` and `teacher` in their order, and its projections."""

    name: str
    weight: float
    student: tuple[Feature, ...]
    teacher: tuple[Feature, ...]
    compute: Callable[[list, list, dict, Inputs], SumAndCount]
    flops: Callable[[int], int]  # sequence length -> operations per token, gradient included
    projections: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name -> shape of a kernel

    @property
    def key(self) -> str:
        """Under which its projections lie in the train state; a path may not hold a slash."""
        return self.name.replace("/", ".")


@dataclass(frozen=True)
class BoundTerm:
    """A term with its layers resolved. `note` says how `pairs` are to be read where they are not the whole truth."""

    name: str
    kind: str
    weight: Schedule
    pairs: Pairs
    parts: tuple[Part, ...]
    note: str = ""
    memory_bank: tuple[Feature, int] | None = None
    relation_heads: int = 0  # of a relation or attention KL, whose implementation depends on them
    detail: str = ""  # what the layers do not say, for a person

    @property
    def layers(self) -> str:
        """The effective layer map for a person, student<-teacher."""
        pairs = " ".join(f"{student}<-{teacher}" for student, teacher in self.pairs)
        return f"{pairs} ({self.note})" if pairs and self.note else pairs or self.note

    @property
    def description(self) -> str:
        """Weight, name, layers and what else a person needs to do it again."""
        return f"{self.weight} x {self.name}: {'layers ' if self.pairs else ''}{self.layers}" + (f", {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Sides:
    """The two encoders, where the term stands in the config, and how long the run is."""

    student: EncoderConfig
    teacher: EncoderConfig
    teacher_has_mlm_head: bool
    steps: int
    place: str
    masked_share: float = 0.15  # of the tokens of masked text: those to be predicted

    @property
    def widths(self) -> tuple[int, int]:
        return self.student.hidden_size, self.teacher.hidden_size


@dataclass(frozen=True)
class Link:
    """A student layer and the teacher layers that it may learn from; `draws` says which of them, `every` so many steps."""

    student: int
    teacher: tuple[int, ...]
    suffix: str
    draws: np.ndarray | None = None
    every: int = 1

    def features(self, kind: str) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
        return (Feature(kind, self.student),), tuple(Feature(kind, layer) for layer in self.teacher)

    def chosen(self, arrays: Sequence[jax.Array], step) -> jax.Array:
        """Of the teacher's arrays, one for each candidate, the one of this step."""
        if self.draws is None:
            return arrays[0]
        draw = jnp.minimum(step // self.every, len(self.draws) - 1)
        number = jnp.asarray(self.draws, jnp.int32)[draw]
        return jax.lax.switch(number, [lambda array=array: array for array in arrays])


def relations_detail(vectors: Mapping[str, float], heads: int) -> str:
    """The relation heads, and which relations with which weight unless these are MiniLMv2's."""
    usual = vectors.keys() == {"query", "key", "value"} and len(set(vectors.values())) == 1 and math.isclose(sum(vectors.values()), 1)
    weights = "" if usual else " of " + ", ".join(f"{weight:.4g} x {name}" for name, weight in vectors.items())
    return f"{heads} relation heads{weights}"


def links_of(layer_map: LayerMapConfig, sides: Sides, lowest: int) -> tuple[Pairs, list[Link], str]:
    """The pairs (of a random map the first draw), what to compare, and a note for a person.

    Raises:
      InputError: from the layer map; layer 0 where the term reads what embeddings do not have.
    """
    depths = sides.student.num_layers, sides.teacher.num_layers
    try:
        pairs = layer_map.resolve(*depths)
    except InputError as error:
        raise InputError(f"{sides.place}.layer_map: {error}") from None
    if any(layer < lowest for pair in pairs for layer in pair):
        raise InputError(f"{sides.place}.layer_map: layer 0 is the embeddings, which have no queries, keys and values")
    if layer_map.strategy == "random":
        every = layer_map.every or 100
        if sides.steps > every * MOST_DRAWS:
            raise InputError(f"{sides.place}.layer_map.every: {sides.steps:,} steps are over {MOST_DRAWS:,} draws; draw less often")
        draws = [dict(layer_map.resolve(*depths, draw=draw)) for draw in range(max(-(-sides.steps // every), 1))]
        links = []
        for student in dict(pairs):
            drawn = [draw[student] for draw in draws]
            candidates = tuple(sorted(set(drawn)))
            numbers = np.array([candidates.index(layer) for layer in drawn], np.int32)
            links.append(Link(student, candidates, f"/{student}" if len(dict(pairs)) > 1 else "", numbers, every))
        return pairs, links, f"drawn afresh every {every} steps from seed {layer_map.seed or 0}; these are the first"
    if layer_map.strategy == "learned":
        layers = {student: tuple(t for s, t in pairs if s == student) for student, _ in pairs}
        note = "attention over the teacher's layers, token by token"
        return pairs, [Link(s, ts, f"/{s}" if len(layers) > 1 else "") for s, ts in layers.items()], note
    suffixes = ["" if len(pairs) == 1 else f"/{student}-{teacher}" for student, teacher in pairs]
    return pairs, [Link(student, (teacher,), suffix) for (student, teacher), suffix in zip(pairs, suffixes, strict=True)], ""
