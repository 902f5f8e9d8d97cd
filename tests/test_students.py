"""The published shapes and their sizes, what a student starts from, and every refusal."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from tiny_models import random_params, tiny_config

from jaxdistill.config import StudentConfig
from jaxdistill.errors import InputError
from jaxdistill.models import EncoderConfig, init_params, num_parameters
from jaxdistill.students import SHAPES, copied_layers, export_pooler, initial_params, student_config, student_key

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
        ({"shape": "enormous"}, r"unknown shape 'enormous'; known: 3L, 4L, 6L, 6L-DistilBERT; or give num_layers"),
        ({"hidden_size": 384}, r"students\.small: how deep\? give shape \(6L-DistilBERT, 6L, 4L, 3L\) or num_layers"),
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


def copied(initialise, teacher=TEACHER, **fields):
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
        ([1, 3, 5, 8, 10, 12], 6, (1, 3, 5, 8, 10, 12)),  # DistilBERT's
        ([12, 12], 2, (12, 12)),
    ],
)
def test_layers_to_copy(initialise, num_layers, expected):
    assert copied(initialise, num_layers=num_layers) == expected


@pytest.mark.parametrize(
    ("initialise", "fields", "message"),
    [
        ("first_k", {"num_layers": 13}, r"students\.small\.initialise: first_k needs a student no deeper than the teacher's 12 layers"),
        ("every_k", {"num_layers": 13}, "every_k needs a student no deeper"),
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


def test_copied_parameters_are_the_teachers():
    teacher_config = tiny_config(num_layers=4)
    teacher = random_params(teacher_config, pooler=True)
    config = dataclasses.replace(teacher_config, num_layers=2)
    params = jax.jit(lambda key, teacher: initial_params(config, key, teacher, (2, 4)))(jax.random.key(0), teacher)
    expected = {"embeddings": teacher["embeddings"], "layers": {"01": teacher["layers"]["02"], "02": teacher["layers"]["04"]}}
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(ours, theirs)


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
