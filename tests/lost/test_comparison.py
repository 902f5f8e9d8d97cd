"""What is measured of two models: small numbers by hand, NumPy, the losses, and pairs whose answer is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params, tiny_config, tiny_rows

from jaxdistill.agreement import linear_cka
from jaxdistill.data import Masking
from jaxdistill.losses import relation_kl
from jaxdistill.lost import comparison
from jaxdistill.lost.comparison import Model, masked_rows, measure, measure_mlm, overlap, relation_heads
from jaxdistill.models import encode, mlm_logits

LAYOUT = ((0, 12), (0, 7), (0, 3), (0, 12), (0, 9))
TEACHER = tiny_config(num_layers=3)
STUDENT = tiny_config(num_layers=2, num_heads=3, hidden_size=36, intermediate_size=40)

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def rows():
    return tiny_rows(TEACHER, LAYOUT, 12, seed=1)


@pytest.fixture(scope="module")
def models():
    return [Model(config, random_params(config, seed, mlm=True)) for seed, config in enumerate((STUDENT, TEACHER))]


@pytest.fixture(scope="module")
def found(models, rows):
    groups = [["", "long" if length > 8 else "short"] for _, length in LAYOUT]
    return measure(*models, *rows, groups)


@pytest.fixture(scope="module")
def outputs(models, rows):
    """Every feature of the student and of the teacher."""
    return [encoded(model, *rows) for model in models]


def encoded(model, ids, mask):
    return jax.jit(partial(encode, model.config))(model.params, ids, mask)


def softmax_overlap(student, teacher, mask, heads):
    """[rows, R] or [rows, Ns, Nt] by NumPy: of (queries, keys) of each side."""

    def attention(sides, row, count):
        queries, keys = (np.asarray(side, np.float64)[row][: mask[row].sum()] for side in sides)
        size = queries.shape[-1] // count
        parts = [slice(i * size, (i + 1) * size) for i in range(count)]
        scores = np.stack([queries[:, part] @ keys[:, part].T / np.sqrt(size) for part in parts])
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    both = [[attention(sides, row, count) for sides, count in zip((student, teacher), heads, strict=True)] for row in range(len(mask))]
    return np.array([[[np.minimum(a, b).sum() for b in teacher] for a in student] for student, teacher in both])


def test_overlap_by_hand():
    a = np.array([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]], np.float32)
    b = np.array([[[[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]], np.float32)
    np.testing.assert_allclose(overlap(jnp.asarray(a), jnp.asarray(b)), [[[0.5 + 0.0, 2.0]]], rtol=1e-6)


def test_relation_heads_divide_both():
    widths = {(384, 384): 12, (384, 768): 12, (312, 768): 12, (48, 36): 12, (32, 48): 8, (7, 49): 7, (13, 26): 1}
    for (student, teacher), heads in widths.items():
        configs = [tiny_config(hidden_size=width, num_heads=1) for width in (student, teacher)]
        assert relation_heads(*configs) == heads


def test_against_numpy_and_the_losses(outputs, rows, found):
    student, teacher = outputs
    mask, heads = rows[1], relation_heads(STUDENT, TEACHER)
    assert found.overlap.shape == (5, 2, 3, 3, 4) and found.relation_kl.shape == (5, 3, heads, 2, 3)
    for i, j in ((1, 1), (2, 3), (1, 3)):
        sides = [(output.query[layer], output.key[layer]) for output, layer in ((student, i), (teacher, j))]
        expected = softmax_overlap(*sides, mask, (3, 4))
        np.testing.assert_allclose(found.overlap[:, i - 1, :, j - 1], expected, rtol=1e-4)
        for k, kind in enumerate(("query", "key", "value")):
            x, y = getattr(student, kind)[i], getattr(teacher, kind)[j]
            total, count = relation_kl(x, y, jnp.asarray(mask), num_relation_heads=heads)
            assert found.relation_kl[:, k, :, i - 1, j - 1].sum() == pytest.approx(float(total), rel=1e-4)
            assert found.relation_kl[:, k].shape[1] * mask.sum() == float(count)
            expected = softmax_overlap((x, x), (y, y), mask, (heads, heads))[:, np.arange(heads), np.arange(heads)]
            np.testing.assert_allclose(found.relation_overlap[:, k, :, i - 1, j - 1], expected, rtol=1e-4)


def test_hidden_states_and_sentences(outputs, rows, found):
    student, teacher = outputs
    real = rows[1] > 0
    for i in range(3):
        for j in range(4):
            expected = linear_cka(np.asarray(student.hidden[i])[real], np.asarray(teacher.hidden[j])[real])
            assert found.cka[i, j] == pytest.approx(expected, rel=1e-4)
    last = np.asarray(student.hidden[2])
    np.testing.assert_allclose(found.sentences["cls"][0], last[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.sentences["mean"][0][1], last[1, :7].mean(axis=0), rtol=1e-4, atol=1e-5)
    assert set(found.group_cka) == {"", "long", "short"}
    assert len(set(found.group_cka.values())) == 3


def test_even_attention(outputs, rows, found):
    teacher, mask = outputs[1], rows[1]
    nothing = np.zeros_like(teacher.query[2])
    expected = softmax_overlap((nothing, nothing), (teacher.query[2], teacher.key[2]), mask, (1, 4))[:, 0]
    np.testing.assert_allclose(found.uniform[:, 1], expected, rtol=1e-4)


def test_a_model_and_itself(models, rows):
    _, teacher = models
    lengths = rows[1].sum(axis=1)
    own = measure(teacher, teacher, *rows, [[""]] * 5)
    np.testing.assert_allclose(np.diag(own.cka), 1.0, rtol=1e-5)
    assert own.group_cka[""] == pytest.approx(1.0, rel=1e-5)
    for layer in range(3):
        for head in range(4):
            np.testing.assert_allclose(own.overlap[:, layer, head, layer, head], lengths, rtol=1e-5)
        whole = np.broadcast_to(lengths[:, None, None], (5, 3, 12))
        np.testing.assert_allclose(own.relation_overlap[:, :, :, layer, layer], whole, rtol=1e-5)
        np.testing.assert_allclose(own.relation_kl[:, :, :, layer, layer], 0.0, atol=1e-4)
    assert own.relation_kl[:, :, :, 0, 1].min() > 0.01


def test_padding_and_batches_change_nothing(models, rows, found, monkeypatch):
    ids, mask = (np.pad(each, ((0, 0), (0, 5))) for each in rows)
    monkeypatch.setattr(comparison, "batch_rows", lambda length: 2)
    groups = [["", "long" if length > 8 else "short"] for _, length in LAYOUT]
    again = measure(*models, ids, mask, groups)
    np.testing.assert_allclose(again.cka, found.cka, rtol=1e-4)
    for field in ("overlap", "uniform", "relation_overlap", "relation_kl"):
        np.testing.assert_allclose(getattr(again, field), getattr(found, field), rtol=1e-4, atol=1e-4)
    for kind in ("cls", "mean"):
        np.testing.assert_allclose(again.sentences[kind][1], found.sentences[kind][1], rtol=1e-4, atol=1e-5)
    assert again.group_cka == pytest.approx(found.group_cka, rel=1e-3)


def test_permuted_heads_are_found(models, rows):
    _, teacher = models
    order = [2, 0, 3, 1]
    columns = np.concatenate([np.arange(head * 12, head * 12 + 12) for head in order])
    layer = dict(teacher.params["layers"]["01"])
    for kind in ("query", "key", "value"):
        layer[kind] = {"kernel": layer[kind]["kernel"][:, columns], "bias": layer[kind]["bias"][columns]}
    layer["attention_output"] = layer["attention_output"] | {"kernel": layer["attention_output"]["kernel"][columns]}
    params = teacher.params | {"layers": teacher.params["layers"] | {"01": layer}}
    found = measure(Model(TEACHER, params), teacher, *rows, [[""]] * 5)
    first = found.overlap.sum(axis=0)[0, :, 0] / rows[1].sum()
    assert first.argmax(axis=1).tolist() == order
    np.testing.assert_allclose(first.max(axis=1), 1.0, rtol=1e-5)
    assert found.cka[-1, -1] == pytest.approx(1.0, rel=1e-4)  # the output is the same, whatever the order of the heads


def test_guesses_against_all_logits(models, rows, monkeypatch):
    monkeypatch.setattr(comparison, "PLACES", 4)
    ids, mask = rows
    masked, labels = masked_rows(ids, mask, Masking(0.5, 0.8, 0.1, 4, (0, 1, 2), 90))
    places = labels != -100
    assert 5 < places.sum() < mask.sum() and not places[mask == 0].any()
    np.testing.assert_array_equal(labels[places], ids[places])
    logits = []
    for model in models:
        hidden = encoded(model, masked, mask).hidden[model.config.num_layers]
        logits.append(np.asarray(mlm_logits(model.config, model.params, hidden))[..., :90])
    student, teacher = logits
    guess = teacher.argmax(axis=-1)
    ranking = np.argsort(-student, axis=-1)
    expected = [places, guess == ranking[..., 0], (ranking[..., :5] == guess[..., None]).any(-1), guess == ids, ranking[..., 0] == ids]
    expected = np.stack([(each & places).sum(axis=1) for each in expected], axis=1)
    counts = measure_mlm(*models, masked, mask, labels, 90)
    np.testing.assert_array_equal(counts, expected)
    own = measure_mlm(models[1], models[1], masked, mask, labels, 90)
    assert own[:, 1].sum() == own[:, 2].sum() == places.sum()
    assert (own[:, 3] == own[:, 4]).all()


def test_the_same_masks_at_every_run(rows):
    masking = Masking(0.15, 0.8, 0.1, 4, (0,), 90)
    first = masked_rows(*rows, masking)
    fewer = masked_rows(rows[0][:2], rows[1][:2], masking)
    np.testing.assert_array_equal(first[0][:2], fewer[0])
