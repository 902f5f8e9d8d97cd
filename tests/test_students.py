"""The published shapes and their sizes, what a student starts from, and every refusal."""

import dataclasses
from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from tiny_models import random_params, tiny_config

from jaxdistill.config import CheckpointConfig, PreviousStudent, StudentConfig
from jaxdistill.errors import InputError
from jaxdistill.models import EncoderConfig, init_params, num_parameters
from jaxdistill.students import (
    SHAPES,
    check_checkpoint,
    copied_layers,
    describe_initialisation,
    export_pooler,
    initial_params,
    own_head,
    projected_embeddings,
    student_config,
    student_key,
)

BERT_BASE = EncoderConfig("bert", vocab_size=30522, num_layers=12, num_heads=12, hidden_size=768, intermediate_size=3072)
XLM_R_BASE = dataclasses.replace(
    BERT_BASE, family="xlm-roberta", vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
)
TEACHER = tiny_config(num_layers=12, num_heads=12)
PLACE = "students.small"


def build(teacher=TEACHER, dropout=None, **fields) -> tuple[EncoderConfig, list[str]]:
    return student_config(StudentConfig(**fields), teacher, dropout=dropout, where=PLACE)


def count(config: EncoderConfig, **heads) -> int:
    """Without allocating anything."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(partial(init_params, config, **heads), jax.random.key(0))))


@pytest.mark.parametrize(
    ("shape", "monolingual", "multilingual"), [("6L-DistilBERT", 66, 234), ("6L", 23, 106), ("4L", 27, 153), ("3L", 16, 100)]
)
def test_published_parameter_counts(shape, monolingual, multilingual):
    """udagawa2023, table 1, in millions: the paper rounds the first column (22.6 is 23) and cuts the second (234.9 is 234)."""
    for teacher, published, whole in ((BERT_BASE, monolingual, round), (XLM_R_BASE, multilingual, int)):
        config, warned = build(teacher, shape=shape)
        assert whole(num_parameters(config) / 1e6) == published
        assert not warned


def test_parameter_count_by_hand():
    """6L: (30522 + 512 + 2) x 384 and a norm, 6 blocks of 4 projections, 2 norms and the feed-forward."""
    block = 4 * (384 * 384 + 384) + 2 * 2 * 384 + (384 * 1536 + 1536) + (1536 * 384 + 384)
    config, _ = build(BERT_BASE, shape="6L")
    assert count(config) == num_parameters(config) == (30522 + 512 + 2) * 384 + 2 * 384 + 6 * block == 22_565_376
    assert count(config, pooler=True) - count(config) == 384 * 384 + 384


@pytest.mark.parametrize("shape", SHAPES)
def test_named_shapes(shape):
    config, _ = build(XLM_R_BASE, shape=shape)
    assert (config.num_layers, config.num_heads, config.hidden_size, config.intermediate_size) == SHAPES[shape]
    for field in ("family", "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id", "layer_norm_eps", "activation"):
        assert getattr(config, field) == getattr(XLM_R_BASE, field)


# RoBERTa-base without pooler and head, and what a block of 768 is: 4 (768² + 768) + 2 x 768 x 3072 + 3072 + 768 + 4 x 768.
ROBERTA_BASE = EncoderConfig("roberta", 50265, 12, 12, 768, 3072, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
EMBEDDINGS, BLOCK = (50265 + 514 + 1 + 2) * 768, 7_087_872
NARROW = (50265 + 514 + 1 + 2) * 384, 4 * (384**2 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
PARAMETERS = {
    "wang2023/3L": EMBEDDINGS + 3 * BLOCK,
    "whatslost2023/3L": EMBEDDINGS + 3 * BLOCK,
    "whatslost2023/6L": EMBEDDINGS + 6 * BLOCK,
    "whatslost2023/9L": EMBEDDINGS + 9 * BLOCK,
    "whatslost2023/4AH": EMBEDDINGS + 12 * BLOCK,  # heads share the width: fewer make nothing smaller
    "whatslost2023/8AH": EMBEDDINGS + 12 * BLOCK,
    "whatslost2023/384D": NARROW[0] + 12 * NARROW[1],
    "whatslost2023/516D": (50265 + 514 + 1 + 2) * 516 + 12 * (4 * (516**2 + 516) + 2 * 516 * 2064 + 2064 + 516 + 4 * 516),
    "whatslost2023/6L_384D": NARROW[0] + 6 * NARROW[1],
}


@pytest.mark.parametrize("shape", PARAMETERS)
def test_parameters_of_the_task_specific_shapes(shape):
    config, warned = build(ROBERTA_BASE, shape=shape)
    assert num_parameters(config) == PARAMETERS[shape] and not warned
    changed = {"L": "num_layers", "AH": "num_heads", "D": "hidden_size"}
    for said in shape.split("/")[1].split("_"):
        number, field = int(said.rstrip("LAHD")), changed[said.lstrip("0123456789")]
        assert getattr(config, field) == number != getattr(ROBERTA_BASE, field)


def test_numbers_override_the_name():
    config, _ = build(BERT_BASE, shape="6L", num_layers=3, intermediate_size=1024)
    assert (config.num_layers, config.num_heads, config.hidden_size, config.intermediate_size) == SHAPES["3L"]


def test_unsaid_numbers():
    config, warned = build(BERT_BASE, num_layers=3)
    assert (config.num_heads, config.hidden_size, config.intermediate_size) == (12, 768, 3072) and not warned
    assert build(BERT_BASE, num_layers=3, hidden_size=384)[0].intermediate_size == 4 * 384


def test_dropout_is_the_teachers_unless_said():
    teacher = dataclasses.replace(TEACHER, hidden_dropout=0.3, attention_dropout=0.2)
    for dropout, expected in ((None, (0.3, 0.2)), (0.0, (0.0, 0.0)), (0.1, (0.1, 0.1))):
        config, _ = build(teacher, dropout, num_layers=2)
        assert (config.hidden_dropout, config.attention_dropout) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": "6L-Distilbert"}, r"students\.small\.shape: unknown shape '6L-Distilbert'; did you mean '6L-DistilBERT'"),
        ({"shape": "enormous"}, r"unknown shape 'enormous'; known: 3L, 4L, 6L, 6L-DistilBERT, .*; or give num_layers"),
        ({"hidden_size": 384}, r"students\.small: how deep\? give shape \(6L-DistilBERT, 6L, 4L, 3L, .*\) or num_layers"),
        ({"num_layers": 2, "num_heads": 5}, r"students\.small: 5 heads do not divide the hidden size 48; num_heads 2, 3, 4, 6 would"),
        ({"shape": "6L", "hidden_size": 516, "num_heads": 8}, "8 heads do not divide the hidden size 516; num_heads 3, 4, 6, 12 would"),
    ],
)
def test_shapes_that_cannot_be_built(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        build(**fields)
    assert "\n" not in str(caught.value)


def test_warnings():
    _, (first,) = build(BERT_BASE, num_layers=6, hidden_size=384, intermediate_size=3072)
    assert first == f"{PLACE}.intermediate_size: 3072 is the teacher's although the student is narrower; 1536 is usual"
    _, (second,) = build(TEACHER, num_layers=13)
    assert second == f"{PLACE}.num_layers: 13 is deeper than the teacher's 12"
    assert not build(BERT_BASE, num_layers=6, intermediate_size=3072)[1]


def copied(initialise, *, teacher=TEACHER, **fields):
    student = StudentConfig(initialise=initialise, **{"num_layers": 6, "intermediate_size": 80} | fields)
    return copied_layers(student, student_config(student, teacher, dropout=None, where=PLACE)[0], teacher, PLACE)


@pytest.mark.parametrize(
    ("initialise", "num_layers", "expected"),
    [
        ("random", 6, None),
        ("first_k", 6, (1, 2, 3, 4, 5, 6)),
        ("first_k", 12, tuple(range(1, 13))),
        ("every_k", 6, (2, 4, 6, 8, 10, 12)),
        ("every_k", 5, (2, 4, 7, 9, 12)),
        ("every_k", 1, (12,)),
        ("distilbert", 6, (1, 3, 5, 8, 10, 12)),
        ([1, 3, 5, 8, 10, 12], 6, (1, 3, 5, 8, 10, 12)),
        ([12, 12], 2, (12, 12)),
        (CheckpointConfig(checkpoint="runs/first"), 6, None),
        (PreviousStudent(student="small"), 6, None),
    ],
)
def test_layers_to_copy(initialise, num_layers, expected):
    assert copied(initialise, num_layers=num_layers) == expected


@pytest.mark.parametrize(
    ("initialise", "fields", "message"),
    [
        ("first_k", {"num_layers": 13}, r"students\.small\.initialise: first_k needs a student no deeper than the teacher's 12 layers"),
        ("every_k", {"num_layers": 13}, "every_k needs a student no deeper"),
        (
            "distilbert",
            {"num_layers": 4},
            "distilbert is teacher layers 1, 3, 5, 8, 10, 12 for 6 layers of 12, not for 4",
        ),
        ("distilbert", {"teacher": tiny_config(num_layers=24)}, "for 6 layers of 12, not for 6 of 24; use every_k"),
        ("distilbert", {"hidden_size": 24}, "copying teacher layers needs equal shapes: hidden_size is 24"),
        ([1, 2], {}, "names 2 teacher layers for a student of 6 blocks; name one for each"),
        ([0, 2, 4, 7, 9, 11], {}, r"teacher layer 0 is out of range, the teacher has layers 1\.\.12"),
        ([2, 4, 6, 8, 10, 13], {}, "teacher layer 13 is out of range"),
        ("first_k", {"hidden_size": 24}, "copying teacher layers needs equal shapes: hidden_size is 24, the teacher's 48; use random"),
        ("first_k", {"intermediate_size": 192}, "intermediate_size is 192, the teacher's 80"),
        ("every_k", {"num_heads": 6}, "num_heads is 6, the teacher's 12"),
    ],
)
def test_layers_that_cannot_be_copied(initialise, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        copied(initialise, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"students\.small\.embeddings: pca is for a student narrower than the teacher's 48, got 48; initialise: first_k or every_k"),
        ({"hidden_size": 96}, "narrower than the teacher's 48, got 96; random is what a wider one has"),
        ({"hidden_size": 24, "initialise": "first_k"}, "pca is for a student that starts at random, initialise already says where"),
        ({"hidden_size": 24, "initialise": CheckpointConfig(checkpoint="runs/first")}, "leave one of the two out"),
        ({"hidden_size": 24, "initialise": [1] * 6}, "leave one of the two out"),
    ],
)
def test_embeddings_that_cannot_be_projected(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        copied(**{"initialise": "random", "embeddings": "pca"} | fields)
    assert "\n" not in str(caught.value)
    assert copied("random", embeddings="svd", hidden_size=24) is None


def test_checkpoints_of_another_shape():
    config = tiny_config(num_layers=2)
    check_checkpoint(config, dataclasses.replace(config, hidden_dropout=0.3, initializer_range=0.1), PLACE)
    for field, other in (
        ("num_layers", 3), ("num_heads", 6), ("hidden_size", 24), ("intermediate_size", 40), ("vocab_size", 99), ("family", "roberta"),
        ("max_position_embeddings", 42), ("type_vocab_size", 1), ("activation", "relu"),
    ):  # fmt: skip
        ours = getattr(config, field)
        with pytest.raises(InputError) as caught:
            check_checkpoint(config, dataclasses.replace(config, **{field: other}), PLACE)
        assert str(caught.value) == f"{PLACE}.initialise: the checkpoint has another shape: {field} is {other}, the student's {ours}"
    with pytest.raises(InputError, match=r"num_layers is 4, the student's 2; hidden_size is 12, the student's 48$"):
        check_checkpoint(config, tiny_config(num_layers=4, hidden_size=12), PLACE)


@pytest.mark.parametrize(
    ("fields", "layers", "kept", "phrase"),
    [
        ({}, None, None, "random"),
        ({"initialise": "every_k"}, (2, 4, 6), None, "teacher layers 2, 4, 6"),
        ({"initialise": [12]}, (12,), None, "teacher layer 12"),
        ({"embeddings": "svd"}, None, 0.934, "svd of the teacher's embeddings (93 % kept), blocks random"),
        ({"embeddings": "pca"}, None, None, "pca of the teacher's embeddings, blocks random"),
        ({"initialise": {"checkpoint": "runs/first"}}, None, None, "checkpoint runs/first"),
        ({"initialise": {"checkpoint": "runs/first", "student": "6L"}}, None, None, "checkpoint runs/first, student 6L"),
        ({"initialise": {"student": "6L"}}, None, None, "student 6L of the stage before"),
    ],
)
def test_phrases(fields, layers, kept, phrase):
    assert describe_initialisation(StudentConfig(**fields), layers, kept=kept) == phrase


def start(config, teacher, layers=None, *, checkpoint=None, **options) -> dict:
    """Under jit, as a run has it."""

    def first(key, teacher, checkpoint):
        return initial_params(config, key, teacher, layers, checkpoint=checkpoint, **options)

    return jax.jit(first)(jax.random.key(0), teacher, checkpoint)


@lru_cache
def random_start(config: EncoderConfig) -> dict:
    return jax.jit(partial(init_params, config, mlm=True))(jax.random.key(0))


def assert_equal(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == np.float32 and np.array_equal(ours, theirs)


DEEP = tiny_config(num_layers=4)
SHALLOW = dataclasses.replace(DEEP, num_layers=2)


def test_copied_parameters_are_the_teachers():
    teacher = random_params(DEEP, pooler=True)
    expected = {"embeddings": teacher["embeddings"], "layers": {"01": teacher["layers"]["02"], "02": teacher["layers"]["04"]}}
    assert_equal(start(SHALLOW, teacher, (2, 4)), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_comes_with_the_layers(tied):
    """And never with a decoder of its own; a teacher without a head leaves the random one."""
    teacher = random_params(DEEP, mlm=True, tied=tied)
    head = {name: leaf for name, leaf in teacher["mlm"].items() if name != "decoder"}
    assert set(head) == {"dense", "norm", "bias"} and ("decoder" in teacher["mlm"]) != tied
    assert_equal(start(SHALLOW, teacher, (2, 4), mlm=True)["mlm"], head)
    assert "mlm" not in start(SHALLOW, teacher, (2, 4))
    del teacher["mlm"]
    assert_equal(start(SHALLOW, teacher, (2, 4), mlm=True)["mlm"], random_start(SHALLOW)["mlm"])


def test_a_checkpoint_is_taken_as_it_is():
    checkpoint = random_params(SHALLOW, seed=1, mlm=True, pooler=True, tied=False)
    encoder = {name: checkpoint[name] for name in ("embeddings", "layers")}
    head = {name: leaf for name, leaf in checkpoint["mlm"].items() if name != "decoder"}
    teacher = random_params(DEEP, mlm=True)
    assert_equal(start(SHALLOW, teacher, checkpoint=checkpoint), encoder)
    assert_equal(start(SHALLOW, teacher, checkpoint=checkpoint, mlm=True), encoder | {"mlm": head})
    assert_equal(start(SHALLOW, teacher, checkpoint=encoder, mlm=True), encoder | {"mlm": random_start(SHALLOW)["mlm"]})
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), encoder)
    assert_equal(start(SHALLOW, teacher, checkpoint=half), jax.tree.map(lambda leaf: leaf.astype(np.float32), half))


WIDTH, NARROW = 48, 20
TABLES = ("word", "position", "token_type")


@pytest.fixture(scope="module")
def tables() -> dict:
    """Embeddings with a spectrum, so that directions are well apart, and with a mean that is far from 0."""
    rng = np.random.default_rng(0)
    embeddings = random_params(TEACHER)["embeddings"]
    mixing = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] * 0.95 ** np.arange(WIDTH)[:, None]
    mean = rng.normal(0.0, 0.2, WIDTH)
    for name in TABLES:
        table = embeddings[name]["embedding"] @ mixing
        embeddings[name] = {"embedding": (table + (mean if name == "word" else 0)).astype(np.float32)}
    return embeddings


def expected_projection(embeddings: dict, how: str) -> tuple[dict, np.ndarray, float]:
    """By the singular value decomposition of the table itself, in double precision: (tables, basis, share)."""
    arrays = {name: embeddings[name]["embedding"].astype(np.float64) for name in TABLES}
    if how == "pca":
        arrays["word"] = arrays["word"] - arrays["word"].mean(axis=0)
    _, values, rows = np.linalg.svd(arrays["word"], full_matrices=False)
    basis = rows[:NARROW].T
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(NARROW)])
    return {name: array @ basis for name, array in arrays.items()}, basis, (values[:NARROW] ** 2).sum() / (values**2).sum()


@pytest.mark.parametrize("how", ["pca", "svd"])
def test_projected_embeddings_are_numpys(tables, how):
    ours, kept = jax.jit(partial(projected_embeddings, hidden_size=NARROW, how=how))(tables)
    theirs, basis, share = expected_projection(tables, how)
    assert set(ours) == set(TABLES) and 0.5 < share < 0.99
    np.testing.assert_allclose(kept, share, rtol=1e-5)
    for name in TABLES:
        np.testing.assert_allclose(ours[name]["embedding"], theirs[name], atol=2e-5 * np.abs(theirs["word"]).max())
    np.testing.assert_allclose(basis.T @ basis, np.eye(NARROW), atol=1e-12)


def test_each_projection_loses_the_least_of_its_own(tables):
    """pca of the variance, svd of the norm: the share is 1 - what is lost; with this mean the two are far apart."""
    words = tables["word"]["embedding"].astype(np.float64)
    centred = words - words.mean(axis=0)
    lost = {}
    for how in ("pca", "svd"):
        ours = np.asarray(projected_embeddings(tables, NARROW, how)[0]["word"]["embedding"], np.float64)
        for name, table in (("centred", centred), ("uncentred", words)):
            # The best reconstruction that a linear map makes of these columns.
            best = ours @ np.linalg.lstsq(ours, table, rcond=None)[0]
            lost[how, name] = ((table - best) ** 2).sum() / (table**2).sum()
    assert lost["pca", "centred"] < 0.98 * lost["svd", "centred"]
    assert lost["svd", "uncentred"] < 0.98 * lost["pca", "uncentred"]
    for how, name in (("pca", "centred"), ("svd", "uncentred")):
        np.testing.assert_allclose(1 - projected_embeddings(tables, NARROW, how)[1], lost[how, name], rtol=1e-4)


def test_the_mean_leaves_the_words_alone(tables):
    ours, _ = projected_embeddings(tables, NARROW, "pca")
    assert np.abs(np.asarray(ours["word"]["embedding"]).mean(axis=0)).max() < 1e-5
    shifted = tables | {"word": {"embedding": tables["word"]["embedding"] + np.float32(0.5)}}
    for name in TABLES:
        np.testing.assert_allclose(projected_embeddings(shifted, NARROW, "pca")[0][name]["embedding"], ours[name]["embedding"], atol=1e-3)


def test_a_full_width_projection_keeps_every_product(tables):
    """A rotation: nothing is lost, and the three tables turn alike."""
    ours, kept = projected_embeddings(tables, WIDTH, "svd")
    np.testing.assert_allclose(kept, 1.0, rtol=1e-6)
    before, after = (np.concatenate([np.asarray(which[name]["embedding"]) for name in TABLES]) for which in (tables, ours))
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-4 * (before @ before.T).max())


@pytest.mark.parametrize("how", ["pca", "svd"])
def test_a_student_of_projected_embeddings(tables, how):
    """The tables are the projection; norm, blocks and head are those of the random student of the same key."""
    config = dataclasses.replace(SHALLOW, num_layers=1, hidden_size=NARROW)
    teacher, random = {"embeddings": tables, "mlm": random_params(DEEP, mlm=True)["mlm"]}, random_start(config)
    params = start(config, teacher, embeddings=how, mlm=True)
    projected = jax.jit(partial(projected_embeddings, hidden_size=NARROW, how=how))(tables)[0]
    for name in TABLES:
        np.testing.assert_allclose(params["embeddings"][name]["embedding"], projected[name]["embedding"], atol=1e-5)
    assert_equal(params | {"embeddings": random["embeddings"]}, random)
    assert_equal(params["embeddings"]["norm"], random["embeddings"]["norm"])


@pytest.mark.parametrize("shape", SHAPES)
def test_an_mlm_head_adds_what_its_parts_have(shape):
    config, _ = build(BERT_BASE, shape=shape)
    width = config.hidden_size
    assert count(config, mlm=True) - count(config) == width * width + width + 2 * width + 30522


def test_random_parameters_come_from_the_key_and_the_name():
    config = tiny_config(num_layers=1)
    start = jax.jit(lambda key: initial_params(config, key, {}, None)["layers"]["01"]["query"]["kernel"])
    first, same, renamed, reseeded = (start(student_key(*which)) for which in ((0, "a"), (0, "a"), (0, "b"), (1, "a")))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, renamed) and not np.array_equal(first, reseeded)


def test_pooler_of_an_export():
    """The teacher's where it fits; else random, and the same at every export."""
    config = tiny_config(num_layers=2)
    narrow = dataclasses.replace(config, hidden_size=24)
    teacher = random_params(TEACHER, pooler=True)
    assert export_pooler(config, jax.random.key(0), TEACHER, teacher) is teacher["pooler"]
    first, again = (export_pooler(narrow, jax.random.key(0), TEACHER, teacher)["dense"] for _ in range(2))
    assert {name: x.shape for name, x in first.items()} == {"kernel": (24, 24), "bias": (24,)}
    assert np.array_equal(first["kernel"], again["kernel"]) and first["kernel"].std() > 0.01
    del teacher["pooler"]
    assert export_pooler(config, jax.random.key(0), TEACHER, teacher)["dense"]["kernel"].shape == (48, 48)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_where_a_classification_head_starts(family):
    """At random beside layers of the teacher, whatever head that has; with the checkpoint's where there is one."""
    labels = ("no", "yes")
    teacher = tiny_config(family, num_layers=3, labels=labels)
    student = dataclasses.replace(teacher, num_layers=2)
    teacher_params, key = random_params(teacher), student_key(0, "small")
    heads = {"classifier"} | ({"pooler"} if family == "bert" else set())
    own = init_params(student, key, classifier=True)
    copied = initial_params(student, key, teacher_params, (1, 3), classifier=True)
    assert copied.keys() == {"embeddings", "layers", *heads}
    for head in heads:
        jax.tree.map(np.testing.assert_array_equal, copied[head], own[head])
    checkpoint = random_params(student, seed=5)
    found = initial_params(student, key, teacher_params, None, classifier=True, checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, found, checkpoint)
    base = {name: checkpoint[name] for name in ("embeddings", "layers")}
    untrained = base | ({"pooler": teacher_params["pooler"]} if family == "bert" else {})
    found = initial_params(student, key, teacher_params, None, classifier=True, checkpoint=untrained)
    jax.tree.map(np.testing.assert_array_equal, found, base | {head: own[head] for head in heads})
    assert initial_params(student, key, teacher_params, None, checkpoint=checkpoint).keys() == {"embeddings", "layers"}


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (("no", "yes"), True),
        (("No", "YES"), True),
        (("LABEL_0", "LABEL_1"), True),
        (("yes", "no"), False),
        (("entailment", "not_entailment"), False),
        (("no", "maybe", "yes"), False),
        (("score",), False),
        ((), False),
    ],
)
def test_heads_that_a_checkpoint_keeps(labels, kept):
    config = tiny_config(labels=("no", "yes"))
    params = {"embeddings": 0, "layers": 1, "pooler": 2, "classifier": 3}
    found = own_head(config, dataclasses.replace(config, labels=labels), params)
    assert found.keys() == params.keys() - (set() if kept else {"classifier"})


def test_the_head_of_a_regression_has_one_value_whatever_it_is_called():
    value, params = tiny_config(labels=("score",)), {"classifier": 3}
    assert (
        own_head(value, tiny_config(labels=("LABEL_0",)), params) == own_head(value, tiny_config(labels=("similarity",)), params) == params
    )
    assert own_head(value, tiny_config(labels=("no", "yes")), params) == {}
