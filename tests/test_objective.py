"""From the terms of a config to features, parts, one loss and named values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import make_segments, make_vectors
from tiny_models import tiny_config

from jaxdistill import losses
from jaxdistill.config import LayerMapConfig, RelationKL
from jaxdistill.errors import InputError
from jaxdistill.features import EncoderOutput, Feature
from jaxdistill.objective import bind_objective, features_read, loss, measure, named_values

TEACHER = tiny_config(num_layers=12, hidden_size=96)
STUDENT = tiny_config(num_layers=6, hidden_size=48)


def bind(*terms: RelationKL, student=STUDENT, teacher=TEACHER):
    return bind_objective(terms, student, teacher, "objective")


def term(layer_map="last_layer", **fields) -> RelationKL:
    return RelationKL(**{"layer_map": LayerMapConfig.model_validate(layer_map), "relation_heads": 12} | fields)


def explicit(*pairs) -> dict:
    return {"strategy": "explicit", "pairs": [list(pair) for pair in pairs]}


def test_one_pair():
    (bound,) = bind(term({"strategy": "teacher_layer", "teacher_layer": 11}))
    assert (bound.name, bound.pairs) == ("relation_kl", ((6, 11),))
    assert [part.name for part in bound.parts] == ["relation_kl/query", "relation_kl/key", "relation_kl/value"]
    assert [part.weight for part in bound.parts] == pytest.approx([1 / 3] * 3)
    assert {part.relation_heads for part in bound.parts} == {12}
    kinds = ("query", "key", "value")
    assert features_read([bound]) == ({Feature(kind, 6) for kind in kinds}, {Feature(kind, 11) for kind in kinds})


def test_several_pairs_are_named():
    (bound,) = bind(term(explicit((3, 6), (6, 12)), weight=2.0, query=0.0, key=0.5, value=0.25))
    assert {part.name: part.weight for part in bound.parts} == {
        "relation_kl/key/3-6": 1.0, "relation_kl/value/3-6": 0.5, "relation_kl/key/6-12": 1.0, "relation_kl/value/6-12": 0.5
    }  # fmt: skip
    student, teacher = features_read([bound])
    assert student == {Feature("key", 3), Feature("value", 3), Feature("key", 6), Feature("value", 6)}
    assert teacher == {Feature("key", 6), Feature("value", 6), Feature("key", 12), Feature("value", 12)}


def test_terms_of_one_kind_get_different_names():
    bound = bind(term(), term(relation_heads=24), term(relation_heads=48))
    assert [b.name for b in bound] == ["relation_kl", "relation_kl_2", "relation_kl_3"]
    assert len({part.name for b in bound for part in b.parts}) == 9


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            [term(relation_heads=64)],
            r"objective\.0\.relation_heads: 64 does not divide both hidden sizes, student 48 and teacher 96; 12, 16, 24, 48 would",
        ),
        ([term(), term(relation_heads=5)], r"objective\.1\.relation_heads: 5 does not divide .*; 2, 3, 4, 6 would"),
        ([term(relation_heads=96)], "96 does not divide both hidden sizes, student 48"),  # the teacher's alone it does
        ([term({"strategy": "teacher_layer", "teacher_layer": 13})], r"objective\.0\.layer_map: .*13 is out of range"),
        ([term(), term(explicit((7, 12)))], r"objective\.1\.layer_map: .*student layer 7 is out of range"),
        ([term(explicit((6, 12), (1, 0)))], r"objective\.0\.layer_map: layer 0 is the embeddings, which have no queries"),
        ([term(explicit((0, 1)))], r"objective\.0\.layer_map: layer 0 is the embeddings"),
    ],
)
def test_refusals(terms, message):
    with pytest.raises(InputError, match=message) as caught:
        bind(*terms)
    assert "\n" not in str(caught.value)


def test_heads_that_the_message_names_work():
    with pytest.raises(InputError) as caught:
        bind(term(relation_heads=7))
    for heads in str(caught.value).split(";")[1].removesuffix(" would").split(","):
        bind(term(relation_heads=int(heads)))


def test_measure_by_hand():
    """Each part compares the vectors that its name says, with the mask and the segments of the batch."""
    (bound,) = bind(term({"strategy": "teacher_layer", "teacher_layer": 11}))
    segments = jnp.asarray(make_segments([[5, 4], [6]], 9))
    mask = jnp.clip(segments, 0, 1)
    pairs = {kind: make_vectors(2, 9, 48, 96, seed=i) for i, kind in enumerate(("query", "key", "value"))}
    student, teacher = (
        EncoderOutput({}, *({layer: jnp.asarray(pairs[kind][side])} for kind in ("query", "key", "value")))
        for side, layer in ((0, 6), (1, 11))
    )
    for own in (segments, None):
        parts = jax.jit(lambda s, t, own=own: measure([bound], s, t, mask, own))(student, teacher)
        assert set(parts) == {"relation_kl/query", "relation_kl/key", "relation_kl/value"}
        for kind, vectors in pairs.items():
            expected = losses.relation_kl(*map(jnp.asarray, vectors), mask, num_relation_heads=12, segment_ids=own)
            np.testing.assert_allclose(parts[f"relation_kl/{kind}"], expected, rtol=1e-5)


def test_loss_and_names_by_hand():
    bound = bind(term(weight=2.0, query=1.0, key=0.5, value=0.0), term(explicit((3, 6), (6, 12)), query=0.0, key=0.0, value=1.0))
    sums = {"relation_kl/query": 6.0, "relation_kl/key": 8.0, "relation_kl_2/value/3-6": 3.0, "relation_kl_2/value/6-12": 5.0}
    counts = {"relation_kl/query": 2.0, "relation_kl/key": 4.0, "relation_kl_2/value/3-6": 1.0, "relation_kl_2/value/6-12": 10.0}
    assert float(loss(bound, *(jax.tree.map(jnp.float32, x) for x in (sums, counts)))) == pytest.approx(2 * 3 + 1 * 2 + 3 + 0.5)
    assert named_values(bound, {name: sums[name] / counts[name] for name in sums}, "small") == pytest.approx(
        {
            "small/loss": 11.5,
            "small/relation_kl": 8.0,  # weighted: the terms add up to the loss
            "small/relation_kl/query": 3.0,  # unweighted: comparable between runs
            "small/relation_kl/key": 2.0,
            "small/relation_kl_2": 3.5,
            "small/relation_kl_2/value/3-6": 3.0,
            "small/relation_kl_2/value/6-12": 0.5,
        }
    )


def test_a_single_part_is_not_named_twice():
    bound = bind(term(query=0.0, key=0.0, value=1.0))
    assert named_values(bound, {"relation_kl/value": 2.0}, "small") == {"small/loss": 2.0, "small/relation_kl": 2.0}


def test_nothing_counted_is_no_division_by_zero():
    bound = bind(term())
    nothing = {part.name: jnp.float32(0) for part in bound[0].parts}
    assert float(loss(bound, nothing, nothing)) == 0.0
