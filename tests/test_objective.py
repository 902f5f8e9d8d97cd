"""From the terms of a config to features, parts, projections, one loss and named values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import make_segments, make_vectors
from tiny_models import tiny_config

from jaxdistill import losses
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
    LayerMapConfig,
    MLMCrossEntropy,
    OutputKL,
    RelationKL,
    RelationMSE,
    Schedule,
)
from jaxdistill.errors import InputError
from jaxdistill.features import EncoderOutput, Feature, VocabularyLogits
from jaxdistill.layer_map import layer_pairs
from jaxdistill.objective import (
    bind_objective,
    features_read,
    initial_projections,
    loss,
    measure,
    named_values,
    needs_labels,
    reads_labels,
    reads_masked,
)
from jaxdistill.parts import Inputs, TextVectors, first_vectors

TEACHER = tiny_config(num_layers=12, hidden_size=96)
STUDENT = tiny_config(num_layers=6, hidden_size=48)
LIKE_TEACHER = tiny_config(num_layers=6, hidden_size=96)
LABELS = ("no", "maybe", "yes")
TUNED = tiny_config(num_layers=12, hidden_size=96, labels=LABELS)
LEARNER = tiny_config(num_layers=6, hidden_size=48, labels=LABELS)
FEWER_HEADS = tiny_config(num_layers=6, hidden_size=48, num_heads=3)


def bind(*terms, student=STUDENT, teacher=TEACHER, steps=10, head=True):
    return bind_objective(terms, student, teacher, "objective", steps=steps, teacher_has_mlm_head=head)


def make(kind, layer_map="last_layer", **fields):
    return kind(**{"layer_map": LayerMapConfig.model_validate(layer_map)} | fields)


def term(layer_map="last_layer", **fields) -> RelationKL:
    return make(RelationKL, layer_map, **{"relation_heads": 12} | fields)


def explicit(*pairs) -> dict:
    return {"strategy": "explicit", "pairs": [list(pair) for pair in pairs]}


def falling(start: float, end: float, steps: int) -> Schedule:
    return Schedule(schedule="linear", values=(start, end), steps=(0, steps))


def features(kinds, *layers: int) -> set[Feature]:
    return {Feature(kind, layer) for kind in (kinds.split() if isinstance(kinds, str) else kinds) for layer in layers}


# What is bound


def test_one_pair():
    (bound,) = bind(term({"strategy": "teacher_layer", "teacher_layer": 11}, weight=2.0))
    assert (bound.name, bound.pairs, bound.weight.at(0)) == ("relation_kl", ((6, 11),), 2.0)
    assert [part.name for part in bound.parts] == ["relation_kl/query", "relation_kl/key", "relation_kl/value"]
    assert [part.weight for part in bound.parts] == pytest.approx([1 / 3] * 3)
    assert bound.description == "2 x relation_kl: layers 6<-11, 12 relation heads"


def test_the_description_tells_terms_apart():
    fields = ({"relation_heads": 12}, {"relation_heads": 24, "query": 0.0, "key": 0.0, "value": 1.0})
    kinds = (RelationKL, RelationMSE, DirectMSE)
    ends = ["12 relation heads", "24 relation heads of 1 x value"]
    for kind in kinds:
        bound = bind(*(make(kind, **each) for each in fields))
        assert [each.description.partition("<-12, ")[2] for each in bound] == ends
    (crossed,) = bind(term(cross={"query-key": 0.5}))
    assert crossed.description.endswith("12 relation heads of 0.3333 x query, 0.3333 x key, 0.3333 x value, 0.5 x query-key")


def test_several_pairs_are_named():
    (bound,) = bind(term(explicit((3, 6), (6, 12)), weight=2.0, query=0.0, key=0.5, value=0.25))
    assert {part.name: part.weight for part in bound.parts} == {
        "relation_kl/key/3-6": 0.5, "relation_kl/value/3-6": 0.25, "relation_kl/key/6-12": 0.5, "relation_kl/value/6-12": 0.25
    }  # fmt: skip
    assert features_read([bound]) == (features("key value", 3, 6), features("key value", 6, 12))


def test_terms_of_one_kind_get_different_names():
    bound = bind(term(), make(HiddenMSE), term(relation_heads=24), make(HiddenMSE))
    assert [b.name for b in bound] == ["relation_kl", "hidden_mse", "relation_kl_3", "hidden_mse_4"]
    assert len({part.name for b in bound for part in b.parts}) == 8


QKV = ("query", "key", "value")
READS = {
    "relation_kl": (term(), STUDENT, features(QKV, 6), features(QKV, 12), {}),
    "value relation": (term(query=0.0, key=0.0, value=1.0), STUDENT, features("value", 6), features("value", 12), {}),
    "cross": (
        term(query=0.0, key=0.0, value=0.0, cross={"query-key": 1.0}), STUDENT, features("query key", 6), features("query key", 12), {},
    ),
    "relation_mse": (make(RelationMSE, explicit((2, 5)), relation_heads=8), STUDENT, features(QKV, 2), features(QKV, 5), {}),
    "direct_mse": (
        make(DirectMSE, value=0.0), STUDENT, features("query key", 6), features("query key", 12),
        {"direct_mse/query": {"student": (4, 12, 24)}, "direct_mse/key": {"student": (4, 12, 24)}},
    ),
    "direct_mse, own heads": (
        make(DirectMSE, query=0.0, key=0.0, relation_heads=2), FEWER_HEADS, features("value", 6), features("value", 12),
        {"direct_mse/value": {"student": (2, 24, 48)}},
    ),
    "attention_kl": (make(AttentionKL), STUDENT, features("query key", 6), features("query key", 12), {}),
    "attention_mse": (make(AttentionMSE, explicit((1, 2))), STUDENT, features("query key", 1), features("query key", 2), {}),
    "hidden_mse": (make(HiddenMSE), STUDENT, features("hidden", 6), features("hidden", 12), {"hidden_mse": {"student": (48, 96)}}),
    "hidden_mse, equal widths": (make(HiddenMSE), LIKE_TEACHER, features("hidden", 6), features("hidden", 12), {}),
    "hidden_cosine, always": (
        make(HiddenCosine, projection="always"), LIKE_TEACHER, features("hidden", 6), features("hidden", 12),
        {"hidden_cosine": {"student": (96, 96)}},
    ),
    "embeddings": (
        make(HiddenMSE, {"strategy": "last_layer", "embeddings": True}), STUDENT, features("hidden", 0, 6), features("hidden", 0, 12),
        {"hidden_mse/0-0": {"student": (48, 96)}, "hidden_mse/6-12": {"student": (48, 96)}},
    ),
    "hidden_contrastive": (
        make(HiddenContrastive, projection_size=16), STUDENT, features("hidden", 6), features("hidden", 12),
        {"hidden_contrastive": {"student": (48, 16), "teacher": (96, 16)}},
    ),
    "output_kl": (OutputKL(), STUDENT, features("logits", 6), features("logits", 12), {}),
    "mlm_cross_entropy": (MLMCrossEntropy(), STUDENT, features("logits", 6), set(), {}),
    "label_kl": (LabelKL(), LEARNER, features("label_logits", 6), features("label_logits", 12), {}),
    "label_mse": (LabelMSE(), LEARNER, features("label_logits", 6), features("label_logits", 12), {}),
    "label_cross_entropy": (LabelCrossEntropy(), LEARNER, features("label_logits", 6), set(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_what_each_kind_reads_and_learns(name):
    term, student, of_student, of_teacher, projections = READS[name]
    (bound,) = bind(term, student=student, teacher=TUNED)
    assert features_read([bound]) == (of_student, of_teacher)
    assert {part.name: dict(part.projections) for part in bound.parts if part.projections} == projections
    assert bound.kind == term.kind


def test_what_needs_a_task():
    assert [reads_labels([t]) for t in (LabelKL(), LabelMSE(), LabelCrossEntropy(), MLMCrossEntropy(), OutputKL())] == [True] * 3 + [
        False
    ] * 2


def labelled(*labels, teacher=False):
    return tiny_config(num_layers=12 if teacher else 6, hidden_size=96 if teacher else 48, labels=labels)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "message"),
    [
        *((kind, STUDENT, TUNED, "reads the labels of a task, and the data is a text; give data.task") for kind in (LabelKL, LabelMSE)),
        (LabelCrossEntropy, STUDENT, TUNED, "label_cross_entropy reads the labels of a task, and the data is a text"),
        (LabelKL, LEARNER, TEACHER, "this teacher has no classification head; take one that is fine-tuned on the task"),
        (LabelMSE, LEARNER, TEACHER, "this teacher has no classification head"),
        (
            LabelKL,
            LEARNER,
            labelled("no", "yes", teacher=True),
            r"compares 3 labels \(no, maybe, yes\), and the teacher has 2 labels \(no, yes\);",
        ),
        (LabelMSE, labelled("score"), TUNED, "compares one value, and the teacher has 3 labels"),
        (LabelMSE, LEARNER, labelled("value", teacher=True), "the teacher has one value; take a teacher that is fine-tuned"),
        (LabelKL, LEARNER, labelled("Yes", "maybe", "No", teacher=True), r"the teacher has 3 labels \(Yes, maybe, No\) in another order;"),
        (
            LabelKL,
            LEARNER,
            labelled("red", "green", "blue", teacher=True),
            r"the teacher has 3 labels \(red, green, blue\); take a teacher",
        ),
        (LabelKL, labelled("score"), labelled("score", teacher=True), "the task of data.task is a regression; take label_mse"),
    ],
)
def test_labels_that_do_not_fit(kind, student, teacher, message):
    with pytest.raises(InputError, match=rf"^objective\.1: .*{message}") as caught:
        bind(MLMCrossEntropy(), kind(), student=student, teacher=teacher)
    assert "\n" not in str(caught.value)


def test_labels_by_other_names_are_taken_by_their_number():
    numbered, renamed = labelled("LABEL_0", "LABEL_1", "LABEL_2", teacher=True), labelled("NO", "MAYBE", "YES", teacher=True)
    for teacher in (numbered, renamed):
        assert [term.kind for term in bind(LabelKL(), LabelMSE(), student=LEARNER, teacher=teacher)] == ["label_kl", "label_mse"]
    (hard,) = bind(LabelCrossEntropy(), student=LEARNER, teacher=TEACHER)
    assert hard.parts[0].teacher == ()  # it reads no teacher
    values = bind(LabelMSE(), LabelCrossEntropy(), student=labelled("score"), teacher=labelled("LABEL_0", teacher=True))
    assert [term.kind for term in values] == ["label_mse", "label_cross_entropy"]


def test_labels_by_hand():
    """Each term reads its own side's logits, and a row without a token is not an example."""
    rng = np.random.default_rng(3)
    mine, theirs = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(2))
    s, t = EncoderOutput({}, {}, {}, {}, label_logits={6: mine}), EncoderOutput({}, {}, {}, {}, label_logits={12: theirs})
    labels = jnp.array([2, 0, 1, 9])
    mask = jnp.ones((4, 5), jnp.int32).at[3].set(0).at[0, 3:].set(0)
    bound = bind(LabelKL(temperature=falling(4.0, 2.0, 10)), LabelCrossEntropy(weight=0.5), LabelMSE(), student=LEARNER, teacher=TUNED)
    assert [b.description for b in bound] == [
        "1 x label_kl: 3 labels (no, maybe, yes) of the teacher, T linear 4 at 0, 2 at 10",
        "0.5 x label_cross_entropy: 3 labels (no, maybe, yes) of the task",
        "1 x label_mse: 3 labels (no, maybe, yes) of the teacher, logits",
    ]
    parts = measure(bound, s, t, {}, Inputs(mask, None, None, 5, {}, labels))
    rows = jnp.array([1, 1, 1, 0])
    expected = {
        "label_kl": losses.label_kl(mine, theirs, rows, temperature=3.0),
        "label_cross_entropy": losses.label_cross_entropy(mine, labels, rows),
        "label_mse": losses.label_mse(mine, theirs, rows),
    }
    assert parts.keys() == expected.keys() and float(parts["label_kl"][1]) == 3.0 and float(parts["label_mse"][1]) == 9.0
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, err_msg=name)


def test_the_labels_of_a_regression():
    bound = bind(LabelCrossEntropy(), student=labelled("score"), teacher=TEACHER)
    assert bound[0].layers == "one value of the task, squared error"
    s = EncoderOutput({}, {}, {}, {}, label_logits={6: jnp.array([[1.0], [4.0]])})
    inputs = Inputs(jnp.ones((2, 3), jnp.int32), None, None, 0, {}, jnp.array([3.0, 4.5]))
    assert [float(x) for x in measure(bound, s, EncoderOutput({}, {}, {}, {}), {}, inputs)["label_cross_entropy"]] == [4.25, 2.0]


def test_learned_reads_every_layer_of_the_teacher():
    (bound,) = bind(make(HiddenMSE, "learned"), student=tiny_config(num_layers=2))
    assert features_read([bound]) == (features("hidden", 1, 2), features("hidden", *range(1, 13)))
    assert [part.name for part in bound.parts] == ["hidden_mse/1", "hidden_mse/2"]
    assert "attention over the teacher's layers" in bound.layers


def test_what_needs_corrupted_text():
    assert [reads_masked([t]) for t in (OutputKL(), MLMCrossEntropy(), RelationKL())] == [True, True, False]
    assert [needs_labels([t]) for t in (OutputKL(), OutputKL(positions="masked"), MLMCrossEntropy(), RelationKL())] == [
        False, True, True, False,
    ]  # fmt: skip


# What is refused

LATE = falling(1.0, 0.5, 11)
REFUSED = [
    (
        [term(relation_heads=64)], STUDENT,
        r"objective\.0\.relation_heads: 64 does not divide both hidden sizes, student 48 and teacher 96; 12, 16, 24, 48 would",
    ),
    ([term(), term(relation_heads=5)], STUDENT, r"objective\.1\.relation_heads: 5 does not divide .*; 2, 3, 4, 6 would"),
    ([term(relation_heads=96)], STUDENT, "96 does not divide both hidden sizes, student 48"),  # the teacher's alone it does
    ([make(RelationMSE, relation_heads=7)], STUDENT, r"objective\.0\.relation_heads: 7 does not divide"),
    ([make(DirectMSE, relation_heads=9)], STUDENT, r"objective\.0\.relation_heads: 9 does not divide"),
    ([term({"strategy": "teacher_layer", "teacher_layer": 13})], STUDENT, r"objective\.0\.layer_map: .*13 is out of range, .*1\.\.12"),
    ([term(), term(explicit((7, 12)))], STUDENT, r"objective\.1\.layer_map: .*student layer 7 is out of range, .*0\.\.6"),
    ([make(HiddenMSE, explicit((1, 13)))], STUDENT, r"objective\.0\.layer_map: .*teacher layer 13 is out of range, .*0\.\.12"),
    ([term(explicit((6, 12), (1, 0)))], STUDENT, r"objective\.0\.layer_map: layer 0 is the embeddings, which have no queries"),
    *(
        ([make(kind, explicit((0, 1)))], STUDENT, r"objective\.0\.layer_map: layer 0 is the embeddings")
        for kind in (RelationKL, RelationMSE, DirectMSE, AttentionKL, AttentionMSE)
    ),
    *(
        ([make(kind)], FEWER_HEADS, rf"objective\.0: {kind.model_fields['kind'].default} need.* 3, the teacher 4; give .* num_heads 4$")
        for kind in (AttentionKL, AttentionMSE)
    ),
    *(
        (
            [make(kind, relation_heads="native")], FEWER_HEADS,
            r"objective\.0\.relation_heads: native heads need as many .* has 3, the teacher 4; .* 4; or relation_heads, a divisor",
        )
        for kind in (RelationKL, RelationMSE, DirectMSE)
    ),
    *(
        (
            [make(kind, projection="never")], STUDENT,
            r"objective\.0\.projection: never needs equal hidden sizes, the student has 48, the teacher 96; .* hidden_size 96$",
        )
        for kind in (HiddenMSE, HiddenCosine)
    ),
    *(
        ([make(kind, "learned")], STUDENT, rf"objective\.0\.layer_map: learned .* not for {kind.model_fields['kind'].default}$")
        for kind in (RelationKL, RelationMSE, DirectMSE, AttentionKL, AttentionMSE, HiddenContrastive)
    ),
    ([make(HiddenContrastive, "uniform")], STUDENT, r"objective\.0\.layer_map: hidden_contrastive compares one fixed pair .* has 6$"),
    ([make(HiddenContrastive, "random")], STUDENT, r"objective\.0\.layer_map: hidden_contrastive compares one fixed pair"),
    ([term(weight=LATE)], STUDENT, r"objective\.0\.weight\.steps: step 11 is out of range, training takes 10 steps there"),
    ([term(), MLMCrossEntropy(weight=LATE)], STUDENT, r"objective\.1\.weight\.steps: step 11 is out of range"),
    ([LabelKL(temperature=LATE)], LEARNER, r"objective\.0\.temperature\.steps: step 11 is out of range"),
    ([OutputKL(temperature=LATE)], STUDENT, r"objective\.0\.temperature\.steps: step 11 is out of range"),
    ([make(HiddenContrastive, temperature=LATE)], STUDENT, r"objective\.0\.temperature\.steps: step 11 is out of range"),
]  # fmt: skip


@pytest.mark.parametrize(("terms", "student", "message"), REFUSED)
def test_refusals(terms, student, message):
    with pytest.raises(InputError, match=message) as caught:
        bind(*terms, student=student, teacher=TUNED)
    assert "\n" not in str(caught.value)


def test_logits_of_a_teacher_without_a_head():
    with pytest.raises(InputError, match=r"objective\.1: output_kl reads the teacher's logits, .* no MLM head; take .*ForMaskedLM"):
        bind(term(), OutputKL(), head=False)
    bind(MLMCrossEntropy(), head=False)  # the student's own head is enough


def test_heads_that_the_message_names_work():
    with pytest.raises(InputError) as caught:
        bind(term(relation_heads=7))
    for heads in str(caught.value).split(";")[1].removesuffix(" would").split(","):
        bind(term(relation_heads=int(heads)))


def test_a_schedule_may_end_with_the_run():
    (bound,) = bind(OutputKL(weight=falling(1.0, 0.0, 10), temperature=falling(4.0, 1.0, 10)))
    assert bound.description == "linear 1 at 0, 0 at 10 x output_kl: logits of all tokens, T linear 4 at 0, 1 at 10"


# What is computed


def arrays(side: int, layers, widths=(48, 96), vocabulary=101) -> EncoderOutput:
    """Features of two rows of nine; every layer and kind its own."""
    drawn = {
        kind: {n: jnp.asarray(make_vectors(2, 9, *widths, seed=10 * i + n)[side]) for n in layers}
        for i, kind in enumerate(("hidden", "query", "key", "value"))
    }
    rng = np.random.default_rng(side)
    shapes = (2, 9, widths[side]), (vocabulary, widths[side]), (vocabulary,)
    logits = {n: VocabularyLogits(*(jnp.asarray(rng.normal(0.0, 0.5, shape), jnp.float32) for shape in shapes)) for n in layers}
    return EncoderOutput(**drawn, logits=logits)


def make_inputs(step=0, segments=True, **negatives) -> Inputs:
    rows = jnp.asarray(make_segments([[5, 4], [6]], 9))
    labels = jnp.full((2, 9), -100).at[0, 2].set(7).at[1, 3].set(9)
    return Inputs(jnp.clip(rows, 0, 1), rows if segments else None, labels, step, **{"negatives": {}} | negatives)


@pytest.mark.parametrize("packed", [True, False])
def test_measure_by_hand(packed):
    """Each part compares the vectors that its name says, with the mask and the segments of the batch."""
    bound = bind(
        make(RelationKL, explicit((6, 11)), relation_heads=12, cross={"key-value": 0.5}),
        make(RelationMSE, explicit((5, 10)), relation_heads=12, query=0.0, key=0.0, cross={"query-key": 1.0}),
        make(AttentionKL), make(AttentionMSE, explicit((4, 12))),
        make(DirectMSE, query=0.0, key=0.0), make(HiddenMSE), make(HiddenCosine, tokens="cls"),
        OutputKL(temperature=2.0), OutputKL(positions="masked"), MLMCrossEntropy(),
    )  # fmt: skip
    inputs = make_inputs(segments=packed)
    mask, segments, labels = inputs.mask, inputs.segment_ids, inputs.labels
    projections = initial_projections(bound, jax.random.key(0))
    kernel = {name: projection["student"]["kernel"] for name, projection in projections.items()}
    relation, heads = {"num_relation_heads": 12, "segment_ids": segments}, {"num_heads": 4, "segment_ids": segments}

    def by_hand(s, t):
        keys = {"student_keys": s.value[6], "teacher_keys": t.value[11]}
        other_keys = {"student_keys": s.key[5], "teacher_keys": t.key[10]}
        first = losses.first_tokens(mask, segments)
        return {f"relation_kl/{kind}": losses.relation_kl(getattr(s, kind)[6], getattr(t, kind)[11], mask, **relation) for kind in QKV} | {
            "relation_kl/key_value": losses.relation_kl(s.key[6], t.key[11], mask, **relation, **keys),
            "relation_mse/value": losses.relation_mse(s.value[5], t.value[10], mask, **relation),
            "relation_mse/query_key": losses.relation_mse(s.query[5], t.query[10], mask, **relation, **other_keys),
            "attention_kl": losses.attention_kl(s.query[6], s.key[6], t.query[12], t.key[12], mask, **heads),
            "attention_mse": losses.attention_mse(s.query[4], s.key[4], t.query[12], t.key[12], mask, **heads),
            "direct_mse/value": losses.direct_mse(s.value[6], t.value[12], kernel["direct_mse.value"], mask),
            "hidden_mse": losses.hidden_mse(s.hidden[6], t.hidden[12], mask, kernel["hidden_mse"]),
            "hidden_cosine": losses.hidden_cosine(s.hidden[6], t.hidden[12], first, kernel["hidden_cosine"]),
            "output_kl": losses.output_kl(s.logits[6].dense(), t.logits[12].dense(), mask, temperature=2.0),
            "output_kl_9": losses.output_kl(s.logits[6].dense(), t.logits[12].dense(), (labels != -100).astype(jnp.int32), temperature=1.0),
            "mlm_cross_entropy": losses.mlm_cross_entropy(s.logits[6].dense(), labels),
        }

    both = jax.jit(lambda s, t: (measure(bound, s, t, projections, inputs), by_hand(s, t)))
    parts, expected = both(arrays(0, (4, 5, 6)), arrays(1, (10, 11, 12)))
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    assert int(parts["hidden_cosine"][1]) == (3 if packed else 2)  # the first tokens of texts
    assert int(parts["output_kl_9"][1]) == 2


def test_contrastive_reads_first_tokens_and_the_negatives_of_its_own_name():
    (bound,) = bind(make(HiddenContrastive, projection_size=8, temperature=0.5, memory_bank=4))
    assert bound.memory_bank == (Feature("hidden", 12), 4)
    s, t = arrays(0, (6,)), arrays(1, (12,))
    bank = TextVectors(jnp.asarray(make_vectors(1, 4, 48, 96, seed=99)[1][0]), jnp.array([1, 1, 0, 1], jnp.int32))
    other = TextVectors(bank.vectors[:2] + 1.0, jnp.array([1, 0], jnp.int32))
    projections = initial_projections([bound], jax.random.key(0))
    own, targets = (projections["hidden_contrastive"][side]["kernel"] for side in ("student", "teacher"))
    mask = make_inputs().mask.at[0, 0].set(0)  # padded on the left: the first real token is at 1
    for negatives in ({}, {"hidden_contrastive": (other, bank), "hidden_contrastive_2": (other,)}):
        found = jax.jit(lambda n: measure([bound], s, t, projections, Inputs(mask, None, None, 0, n)))(negatives)["hidden_contrastive"]
        more = negatives.get("hidden_contrastive", ())
        expected = losses.hidden_contrastive(
            jnp.stack([s.hidden[6][0, 1], s.hidden[6][1, 0]]) @ own,
            jnp.stack([t.hidden[12][0, 1], t.hidden[12][1, 0]]) @ targets,
            temperature=0.5,
            negatives=jnp.concatenate([bank.vectors[:1] + 1.0, bank.vectors[jnp.array([0, 1, 3])]]) @ targets if more else None,
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_first_vectors_of_rows_without_a_token_are_masked():
    hidden = jnp.arange(24.0).reshape(3, 4, 2)
    found = first_vectors(hidden, jnp.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(found.vectors[:2], [[0.0, 1.0], [12.0, 13.0]])
    np.testing.assert_array_equal(found.mask, [1, 1, 0])


def test_temperatures_and_weights_follow_the_step():
    (bound,) = bind(OutputKL(temperature=falling(4.0, 2.0, 8)))
    s, t = arrays(0, (6,)), arrays(1, (12,))
    inputs = make_inputs(step=jnp.int32(4))
    expected = losses.output_kl(s.logits[6].dense(), t.logits[12].dense(), inputs.mask, temperature=3.0)
    np.testing.assert_allclose(measure([bound], s, t, {}, inputs)["output_kl"], expected, rtol=1e-5)


@pytest.mark.parametrize(("steps", "student", "teacher"), [(10, 3, 5), (9, 3, 5), (10, 4, 2)])
def test_a_random_map_compares_the_layers_of_its_draw(steps, student, teacher):
    """Teacher layer n is n everywhere and the student 0: the value is n squared."""
    layer_map = {"strategy": "random", "every": 3, "seed": 5}
    encoders = {"student": tiny_config(num_layers=student), "teacher": tiny_config(num_layers=teacher)}
    (bound,) = bind(make(HiddenMSE, layer_map), **encoders, steps=steps)
    assert bound.pairs == layer_pairs("random", student, teacher, seed=5, draw=0)
    assert "every 3 steps from seed 5" in bound.layers
    s = EncoderOutput({n: jnp.zeros((1, 2, 48)) for n in range(1, student + 1)}, {}, {}, {})
    t = EncoderOutput({n: jnp.full((1, 2, 48), float(n)) for n in range(1, teacher + 1)}, {}, {}, {})

    @jax.jit
    def layers(step):
        parts = measure([bound], s, t, {}, Inputs(jnp.ones((1, 2), jnp.int32), None, None, step, {}))
        return {name: jnp.sqrt(total / count) for name, (total, count) in parts.items()}

    seen = set()
    for step in range(steps + 1):  # the last evaluation is at `steps`
        pairs = layer_pairs("random", student, teacher, seed=5, draw=min(step // 3, (steps - 1) // 3))
        assert jax.device_get(layers(jnp.int32(step))) == {f"hidden_mse/{own}": layer for own, layer in pairs}
        seen.add(pairs)
    assert len(seen) > 1
    assert features_read([bound])[1] == {Feature("hidden", layer) for pairs in seen for _, layer in pairs}


@pytest.mark.parametrize("kind", [RelationKL, AttentionMSE, DirectMSE])
def test_a_random_map_takes_every_kind_of_vectors_from_one_layer(kind):
    fields = {"key": 0.0, "value": 0.0} if kind is DirectMSE else {}
    if kind is RelationKL:
        fields = {"relation_heads": 4, "query": 0.0, "key": 0.0, "value": 0.0, "cross": {"query-key": 1.0}}
    encoders = {"student": tiny_config(num_layers=1), "teacher": tiny_config(num_layers=4)}
    s, t = arrays(0, (1,), (48, 48)), arrays(1, (1, 2, 3, 4), (48, 48))

    maps, layers = [{"strategy": "random", "every": 1}, *(explicit((1, n)) for n in (1, 2, 3, 4))], set()

    def value(step, layer_map):
        (bound,) = bind(make(kind, layer_map, **fields), **encoders)
        (value,) = measure([bound], s, t, initial_projections([bound], jax.random.key(0)), make_inputs(step)).values()
        return value[0]

    values = jax.jit(lambda step: [value(step, layer_map) for layer_map in maps])
    for step in range(6):
        drawn, *fixed = values(jnp.int32(step))
        ((_, layer),) = layer_pairs("random", 1, 4, draw=step)
        np.testing.assert_allclose(drawn, fixed[layer - 1], rtol=1e-6)
        layers.add(layer)
    assert len(layers) > 1 and len(set(map(float, fixed))) == 4


def test_learned_mixes_the_layers_of_the_teacher():
    teacher = tiny_config(num_layers=3, hidden_size=96)
    s, t, inputs = arrays(0, (1,)), arrays(1, (1, 2, 3)), make_inputs()
    for temperature in (None, 1.0):
        layer_map = {"strategy": "learned"} | ({"temperature": temperature} if temperature else {})
        (bound,) = bind(make(HiddenMSE, layer_map), student=tiny_config(num_layers=1), teacher=teacher)
        projections = initial_projections([bound], jax.random.key(0))
        kernel = projections["hidden_mse"]["student"]["kernel"]
        layers = [t.hidden[n] for n in (1, 2, 3)]
        target = losses.attended_layers(s.hidden[1], layers, inputs.mask, kernel, temperature=temperature or 0.1)
        expected = losses.hidden_mse(s.hidden[1], target, inputs.mask, kernel)
        np.testing.assert_allclose(measure([bound], s, t, projections, inputs)["hidden_mse"], expected, rtol=1e-6)


# One number


def test_loss_and_names_by_hand():
    bound = bind(term(weight=2.0, query=1.0, key=0.5, value=0.0), term(explicit((3, 6), (6, 12)), query=0.0, key=0.0, value=1.0))
    sums = {"relation_kl/query": 6.0, "relation_kl/key": 8.0, "relation_kl_2/value/3-6": 3.0, "relation_kl_2/value/6-12": 5.0}
    counts = {"relation_kl/query": 2.0, "relation_kl/key": 4.0, "relation_kl_2/value/3-6": 1.0, "relation_kl_2/value/6-12": 10.0}
    total = loss(bound, *(jax.tree.map(jnp.float32, x) for x in (sums, counts)), 0)
    assert float(total) == pytest.approx(2 * (3 + 1) + 3 + 0.5)
    assert named_values(bound, {name: sums[name] / counts[name] for name in sums}, "small", 0) == pytest.approx(
        {
            "small/loss": 11.5,
            "small/relation_kl": 4.0,  # without the term's weight: comparable between runs, whatever the schedule
            "small/relation_kl/query": 3.0,
            "small/relation_kl/key": 2.0,
            "small/relation_kl_2": 3.5,
            "small/relation_kl_2/value/3-6": 3.0,
            "small/relation_kl_2/value/6-12": 0.5,
        }
    )


def test_scheduled_weights():
    bound = bind(make(HiddenMSE, weight=falling(1.0, 0.0, 8)), MLMCrossEntropy(weight=3.0))
    sums = {"hidden_mse": jnp.float32(10.0), "mlm_cross_entropy": jnp.float32(4.0)}
    counts = {"hidden_mse": jnp.float32(5.0), "mlm_cross_entropy": jnp.float32(2.0)}
    traced = jax.jit(lambda step: loss(bound, sums, counts, step))
    for step, expected in ((0, 2 + 6), (2, 1.5 + 6), (8, 6), (9, 6)):
        assert float(traced(jnp.int32(step))) == pytest.approx(expected)
        values = named_values(bound, {"hidden_mse": 2.0, "mlm_cross_entropy": 2.0}, "small", step)
        assert values == pytest.approx({"small/loss": expected, "small/hidden_mse": 2.0, "small/mlm_cross_entropy": 2.0})
    assert named_values(bound, {"hidden_mse": np.nan, "mlm_cross_entropy": 2.0}, "small", 8)["small/loss"] == 6.0  # it is off


def test_a_single_part_is_not_named_twice():
    bound = bind(term(query=0.0, key=0.0, value=1.0))
    assert named_values(bound, {"relation_kl/value": 2.0}, "small", 0) == {"small/loss": 2.0, "small/relation_kl": 2.0}


def test_nothing_counted_is_no_division_by_zero():
    bound = bind(term())
    nothing = {part.name: jnp.float32(0) for part in bound[0].parts}
    assert float(loss(bound, nothing, nothing, 0)) == 0.0


# Projections and cost


def test_initial_projections():
    """Identity between equal sizes, else one output of unit variance for inputs of unit variance; the same from the same key."""
    terms = make(DirectMSE, relation_heads=2), make(HiddenMSE, "last"), make(HiddenContrastive)
    wide = bind(*terms, teacher=tiny_config(num_layers=6, hidden_size=480))
    first = initial_projections(wide, jax.random.key(3))
    assert first.keys() == {
        "direct_mse.query", "direct_mse.key", "direct_mse.value",
        *(f"hidden_mse.{i}-{j}" for i, j in wide[1].pairs), "hidden_contrastive",
    }  # fmt: skip
    assert first["hidden_contrastive"].keys() == {"student", "teacher"}
    kernels = [projection["kernel"] for part in first.values() for projection in part.values()]
    for kernel in kernels:
        assert kernel.dtype == jnp.float32
        assert float(jnp.std(kernel)) == pytest.approx(kernel.shape[-2] ** -0.5, rel=0.05)
        assert abs(float(jnp.mean(kernel))) < 0.05 * kernel.shape[-2] ** -0.5
    assert len({float(kernel.ravel()[0]) for kernel in kernels}) == len(kernels)
    jax.tree.map(np.testing.assert_array_equal, first, initial_projections(wide, jax.random.key(3)))
    assert not np.array_equal(initial_projections(wide, jax.random.key(4))["direct_mse.key"]["student"]["kernel"], kernels[1])


def test_projections_between_equal_sizes_change_nothing_at_first():
    bound = bind(make(DirectMSE), make(HiddenCosine, projection="always"), student=LIKE_TEACHER)
    found = initial_projections(bound, jax.random.key(0))
    np.testing.assert_array_equal(found["hidden_cosine"]["student"]["kernel"], np.eye(96))
    np.testing.assert_array_equal(found["direct_mse.query"]["student"]["kernel"], np.broadcast_to(np.eye(24), (4, 24, 24)))


def test_no_projections_of_terms_without():
    assert initial_projections(bind(term(), OutputKL(), make(AttentionKL)), jax.random.key(0)) == {}


def test_flops_of_the_parts_by_hand():
    """A product of [n, k] and [k, m] is 2nkm; the student's side counts three times (its gradient), the teacher's once."""
    vocabulary = OutputKL(), OutputKL(positions="masked"), MLMCrossEntropy()
    bound = bind(term(), make(AttentionKL), make(DirectMSE, relation_heads=2), make(HiddenMSE), *vocabulary)
    scores = 2 * 128 * 48 * 3 + 2 * 128 * 96
    expected = [scores] * 3 + [scores] + [3 * 2 * 2 * 24 * 48] * 3 + [3 * 2 * 48 * 96]
    expected += [2 * 101 * (3 * 48 + 96), round(0.15 * 2 * 101 * (3 * 48 + 96)), round(0.15 * 3 * 2 * 101 * 48)]
    assert [part.flops(128) for one in bound for part in one.parts] == expected
    (plain,) = bind(make(HiddenMSE), student=LIKE_TEACHER)
    assert plain.parts[0].flops(128) == 0
