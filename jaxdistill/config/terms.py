"""The terms of an objective, the layer maps between the two sides, and numbers that change over the steps."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_serializer
from pydantic import model_validator as validator

from jaxdistill.errors import nearest
from jaxdistill.layer_map import STRATEGIES, Pairs, layer_pairs
from jaxdistill.urls import written_folder

# YAML has lists, frozen models want tuples; strict mode would refuse the one for the other.
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Positive = Annotated[int, Field(ge=1, lt=2**31)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Folder = Annotated[str, AfterValidator(written_folder)]


class Schedule(Section):
    """A number, or {schedule: linear | cosine | step, values: [1, 0], steps: [0, 5000]}: values at those steps.

    Between two steps `linear` and `cosine` interpolate, `step` keeps the earlier value; before the first and after the
    last step the value is constant.
    """

    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    values: Annotated[tuple[float, ...], AsTuple, Field(min_length=1)]
    steps: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsTuple] = (0,)

    @validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"values": (value,)}
        if not isinstance(value, (dict, Schedule)):
            raise ValueError(f"a number, or {{schedule: linear, values: [1, 0], steps: [0, 5000]}}, got {value!r}")
        return value

    @validator(mode="after")
    def _fits(self) -> Schedule:
        if self.schedule == "constant" and len(self.values) > 1:
            raise ValueError("several values need schedule: linear, cosine or step")
        if len(self.values) != len(self.steps):
            raise ValueError(f"values {list(self.values)} and steps {list(self.steps)} are not equally many")
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps {list(self.steps)} do not increase")
        return self

    @model_serializer(mode="wrap")
    def _to_number(self, dump) -> Any:
        return self.values[0] if self.schedule == "constant" else dump(self)

    def at(self, step):
        """The value at a step (0, 1, ...): an int, or a traced int32, for which it is a float32."""
        if self.schedule == "constant":
            return self.values[0]
        if isinstance(step, int):
            return _interpolated(step, self.steps, self.values, self.schedule)
        import jax.numpy as jnp

        done = jnp.asarray(step, jnp.float32)
        value = jnp.float32(self.values[0])
        for i in range(1, len(self.values)):
            share = jnp.clip((done - self.steps[i - 1]) / (self.steps[i] - self.steps[i - 1]), 0.0, 1.0)
            share = {"linear": share, "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * share), "step": jnp.floor(share)}[self.schedule]
            value = value + share * (self.values[i] - self.values[i - 1])
        return value

    def __str__(self) -> str:
        if self.schedule == "constant":
            return f"{self.values[0]:.3g}"
        return f"{self.schedule} {', '.join(f'{v:.3g} at {s}' for v, s in zip(self.values, self.steps, strict=True))}"


def _interpolated(step: int, steps: tuple[int, ...], values: tuple[float, ...], how: str) -> float:
    value = values[0]
    for i in range(1, len(values)):
        share = min(max((step - steps[i - 1]) / (steps[i] - steps[i - 1]), 0.0), 1.0)
        share = {"linear": share, "cosine": 0.5 - 0.5 * math.cos(math.pi * share), "step": math.floor(share)}[how]
        value += share * (values[i] - values[i - 1])
    return value


def _is_weight(value: Schedule) -> Schedule:
    if min(value.values) < 0 or max(value.values) == 0:
        raise ValueError(f"a weight is not negative and not always 0, got {value}")
    return value


def _is_temperature(value: Schedule) -> Schedule:
    if min(value.values) <= 0:
        raise ValueError(f"a temperature is above 0, got {value}")
    return value


Weight = Annotated[Schedule, AfterValidator(_is_weight)]
Temperature = Annotated[Schedule, AfterValidator(_is_temperature)]
ONE = Schedule(values=(1.0,))


class LayerMapConfig(Section):
    """`last_layer`, or {strategy: teacher_layer, teacher_layer: 11}, or {strategy: explicit, pairs: [[3, 11]]}."""

    strategy: str = "last_layer"
    teacher_layer: int | None = None
    inclusive: bool | None = None
    pairs: Annotated[tuple[Annotated[tuple[int, int], AsTuple], ...], AsTuple] | None = None
    embeddings: bool | None = None  # the embeddings (layer 0) learn from the embeddings as well
    every: Positive | None = None  # random: steps between two draws (default 100)
    seed: Annotated[int, Field(ge=0)] | None = None  # random: of the draws (default 0)
    temperature: Annotated[float, Field(gt=0)] | None = None  # learned: of the softmax over teacher layers (default 0.1)

    @validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, (str, dict, LayerMapConfig)):
            raise ValueError(f"a name, or a mapping as {{strategy: explicit, pairs: [[3, 11]]}}, got {value!r}")
        return {"strategy": value} if isinstance(value, str) else value

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"unknown layer map {value!r}{nearest(value, STRATEGIES)}")
        return value

    @validator(mode="after")
    def _own_options(self) -> LayerMapConfig:
        for name, strategy in (("every", "random"), ("seed", "random"), ("temperature", "learned")):
            if getattr(self, name) is not None and self.strategy != strategy:
                raise ValueError(f"layer map {self.strategy!r} has no option {name!r}; it belongs to {strategy!r}")
        return self

    def resolve(self, num_student_layers: int, num_teacher_layers: int, *, draw: int = 0) -> Pairs:
        """The pairs; of `random` those of draw number `draw`.

        Raises:
          InputError: from `layer_pairs`.
        """
        options = self.model_dump(exclude={"strategy", "every", "temperature"}, exclude_none=True)
        if self.strategy == "random":
            options["draw"] = draw
        return layer_pairs(self.strategy, num_student_layers, num_teacher_layers, **options)


class OutputKL(Section):
    """Output distribution (`losses.output_kl`): both sides need an MLM head. `positions`: all real tokens, or the masked ones."""

    kind: Literal["output_kl"] = "output_kl"
    weight: Weight = ONE
    temperature: Temperature = ONE
    positions: Literal["all", "masked"] = "all"


class MLMCrossEntropy(Section):
    """Masked language modelling on the text itself (`losses.mlm_cross_entropy`): the student needs an MLM head, the teacher none."""

    kind: Literal["mlm_cross_entropy"] = "mlm_cross_entropy"
    weight: Weight = ONE


class HiddenMSE(Section):
    """Hidden states (`losses.hidden_mse`); `tokens: cls` compares the first token of a text alone.

    A projection is learnt for each pair of layers where the widths differ, or always with `projection: always`.
    """

    kind: Literal["hidden_mse"] = "hidden_mse"
    weight: Weight = ONE
    layer_map: LayerMapConfig = LayerMapConfig()
    tokens: Literal["all", "cls"] = "all"
    projection: Literal["auto", "always", "never"] = "auto"


class HiddenCosine(Section):
    """Direction of the hidden states (`losses.hidden_cosine`), as in DistilBERT."""

    kind: Literal["hidden_cosine"] = "hidden_cosine"
    weight: Weight = ONE
    layer_map: LayerMapConfig = LayerMapConfig()
    tokens: Literal["all", "cls"] = "all"
    projection: Literal["auto", "always", "never"] = "auto"


class HiddenContrastive(Section):
    """InfoNCE of the rows' first tokens (`losses.hidden_contrastive`), through learnt projections of both sides.

    Negatives are the other rows of the global batch and the last `memory_bank` rows before it.
    """

    kind: Literal["hidden_contrastive"] = "hidden_contrastive"
    weight: Weight = ONE
    layer_map: LayerMapConfig = LayerMapConfig()
    temperature: Temperature = Schedule(values=(0.07,))
    projection_size: Positive = 128
    memory_bank: Annotated[int, Field(ge=0)] = 0


CrossRelation = Literal["query-key", "key-query", "query-value", "value-query", "key-value", "value-key"]


class _Relations(Section):
    """Which relations, by their weight: `query`, `key` and `value` with themselves, `cross` with each other."""

    layer_map: LayerMapConfig = LayerMapConfig()
    query: NotNegative = 1 / 3
    key: NotNegative = 1 / 3
    value: NotNegative = 1 / 3

    def vectors(self) -> dict[str, float]:
        """Kind of vectors (or two kinds, "query-key") -> weight, without those of weight 0."""
        own = {name: getattr(self, name) for name in ("query", "key", "value")} | dict(getattr(self, "cross", {}))
        return {name: weight for name, weight in own.items() if weight}

    @validator(mode="after")
    def _reads_something(self):
        if not self.vectors():
            raise ValueError("query, key and value all have weight 0: the term would read nothing")
        return self


Heads = Positive | Literal["native"]


class RelationKL(_Relations):
    """MiniLMv2: KL of the self-relations of queries, keys and values (`losses.relation_kl`); `relation_heads: native`: the
    attention heads, which must be as many on both sides (with `value: 1` alone, MiniLM's value relation)."""

    kind: Literal["relation_kl"] = "relation_kl"
    weight: Weight = ONE
    relation_heads: Heads = 48
    cross: dict[CrossRelation, NotNegative] = {}


class RelationMSE(_Relations):
    """Mean squared error of the products before scaling and softmax (`losses.relation_mse`)."""

    kind: Literal["relation_mse"] = "relation_mse"
    weight: Weight = ONE
    relation_heads: Heads = 48
    cross: dict[CrossRelation, NotNegative] = {}


class DirectMSE(_Relations):
    """DirectMiniLM: queries, keys and values through a learnt projection per head (`losses.direct_mse`)."""

    kind: Literal["direct_mse"] = "direct_mse"
    weight: Weight = ONE
    relation_heads: Heads = "native"


class AttentionKL(Section):
    """KL of the attention maps (`losses.attention_kl`): as many heads on both sides."""

    kind: Literal["attention_kl"] = "attention_kl"
    weight: Weight = ONE
    layer_map: LayerMapConfig = LayerMapConfig()


class AttentionMSE(Section):
    """Mean squared error of the attention scores before softmax (`losses.attention_mse`): as many heads on both sides."""

    kind: Literal["attention_mse"] = "attention_mse"
    weight: Weight = ONE
    layer_map: LayerMapConfig = LayerMapConfig()


class LabelKL(Section):
    """The teacher's distribution over a task's labels (`losses.label_kl`): prediction layer transfer."""

    kind: Literal["label_kl"] = "label_kl"
    weight: Weight = ONE
    temperature: Temperature = ONE


class LabelCrossEntropy(Section):
    """A task's own labels (`losses.label_cross_entropy`); of a regression the squared error (`losses.label_mse`)."""

    kind: Literal["label_cross_entropy"] = "label_cross_entropy"
    weight: Weight = ONE


class LabelMSE(Section):
    """The teacher's logits over a task's labels (`losses.label_mse`), or its values of a regression."""

    kind: Literal["label_mse"] = "label_mse"
    weight: Weight = ONE


_CLASSES = (
    RelationKL, RelationMSE, DirectMSE, HiddenMSE, HiddenCosine, HiddenContrastive, AttentionKL, AttentionMSE, OutputKL, MLMCrossEntropy,
    LabelKL, LabelCrossEntropy, LabelMSE,
)  # fmt: skip
KINDS: dict[str, type[Section]] = {kind.model_fields["kind"].default: kind for kind in _CLASSES}


def _from_shorthand(value: Any) -> Any:
    """A kind alone stands for the term with its defaults; without a kind it is MiniLMv2's."""
    if isinstance(value, Section):
        return value
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"a term is a kind, or a mapping with one, got {value!r}")
    return {"kind": "relation_kl"} | value


Term = Annotated[Union[_CLASSES], Field(discriminator="kind"), BeforeValidator(_from_shorthand)]  # noqa: UP007


def _as_terms(value: Any) -> Any:
    """One term alone is an objective as well."""
    return (value,) if isinstance(value, (str, dict)) else value


Objective = Annotated[tuple[Term, ...], AsTuple, Field(min_length=1), BeforeValidator(_as_terms)]
