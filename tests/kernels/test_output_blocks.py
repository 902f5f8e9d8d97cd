"""Output distribution and masked language modelling by blocks: the value and the gradients of the plain losses."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import kernels, losses
from jaxdistill.config import MeshConfig
from jaxdistill.features import VocabularyLogits
from jaxdistill.kernels import Kernels, output
from jaxdistill.sharding import create_mesh

BLOCKS, PLAIN = Kernels(logits="blocks"), Kernels(logits="plain")
PADDED = [[9, 0], [4, 3], [0, 0], [1, 8]]  # rows of 14: real tokens, after so many of padding


def make_side(rows=4, length=14, vocabulary=50, width=24, seed=0, dtype=jnp.float32) -> VocabularyLogits:
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(size=shape) for shape in ((rows, length, width), (vocabulary, width), (vocabulary,)))
    vectors, table, bias = (jnp.asarray(x, jnp.float32) for x in arrays)
    return VocabularyLogits(vectors.astype(dtype), table * jnp.float32(0.5), bias)


def make_mask(counted: str) -> np.ndarray:
    mask = np.zeros((4, 14), np.int32)
    for row, (real, first) in zip(mask, PADDED, strict=True):
        row[first : first + real] = counted != "none"
    if counted == "some":
        mask *= np.random.default_rng(1).random(mask.shape) < 0.3
    return np.ones_like(mask) if counted == "all" else mask


def labels_of(mask, vocabulary=50) -> jax.Array:
    return jnp.asarray(np.where(mask, np.random.default_rng(2).integers(0, vocabulary, mask.shape), -100), jnp.int32)


# Both losses from the same arguments: the cross entropy reads labels drawn at the counted places instead of the teacher.
def kl(form: Kernels, student, teacher, mask, labels, temperature):
    return kernels.output_kl(student, teacher, mask, temperature=temperature, kernels=form)


def cross_entropy(form: Kernels, student, teacher, mask, labels, temperature):
    return kernels.mlm_cross_entropy(student, labels, kernels=form)


LOSSES = {"output_kl": kl, "mlm_cross_entropy": cross_entropy}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@cache
def program(loss, form: Kernels, cuts: tuple):
    """Compiled once for each cut, which is compiled in."""

    @jax.jit
    def run(student, teacher, mask, labels, temperature):
        def mean(student):
            total, count = loss(form, student, teacher, mask, labels, temperature)
            return total / jnp.maximum(count, 1.0), count

        return jax.value_and_grad(mean, has_aux=True)(student)

    return run


def evaluate(loss, form, student, teacher, mask, temperature=2.0):
    """(mean, count, gradients of the mean with respect to the student's vectors, table and bias)."""
    vocabulary = student.bias.shape[0]
    cuts = tuple(output.blocks("cpu", mask.size, vocabulary, split=split) for split in (False, True)) if form == BLOCKS else ()
    run = program(loss, form, cuts)
    (value, count), gradient = run(student, teacher, jnp.asarray(mask), labels_of(np.asarray(mask), vocabulary), temperature)
    return value, count, gradient


def assert_equal(ours, expected, tolerance=1e-5):
    np.testing.assert_allclose(ours[0], expected[0], rtol=tolerance, atol=1e-6)
    assert ours[1] == expected[1]
    for own, plain in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(expected[2]), strict=True):
        assert own.dtype == plain.dtype
        plain = np.asarray(plain, np.float32)
        np.testing.assert_allclose(np.asarray(own, np.float32), plain, rtol=tolerance, atol=tolerance * max(np.abs(plain).max(), 1e-12))


@pytest.fixture(params=[(56, 50), (5, 50), (8, 16), (3, 7), (56, 49)], ids=lambda cut: f"{cut[0]} x {cut[1]}")
def cut(request, monkeypatch):
    """Blocks that the 56 tokens and the vocabulary of 50 are no multiples of; the whole vocabulary at once is one pass."""
    monkeypatch.setattr(output, "blocks", lambda platform, tokens, vocabulary, *, split: output.Blocks(*request.param))


@pytest.mark.parametrize("counted", ["none", "some", "real", "all"])
def test_value_and_gradients(loss, counted, cut):
    sides, mask = (make_side(seed=0), make_side(width=36, seed=1)), make_mask(counted)
    assert_equal(*(evaluate(loss, form, *sides, mask) for form in (BLOCKS, PLAIN)))


def test_value_alone(loss, cut):
    sides, mask = (make_side(seed=0), make_side(width=36, seed=1)), make_mask("some")
    run = partial(loss, mask=jnp.asarray(mask), labels=labels_of(mask), temperature=2.0)
    np.testing.assert_allclose(jax.jit(partial(run, BLOCKS))(*sides), jax.jit(partial(run, PLAIN))(*sides), rtol=1e-5)


@pytest.mark.parametrize("noise", [np.nan, np.inf, 1e30])
def test_noise_where_nothing_is_counted(loss, noise, cut):
    sides, mask = [make_side(seed=0), make_side(width=36, seed=1)], make_mask("real")
    expected = evaluate(loss, BLOCKS, *sides, mask)
    noisy = [VocabularyLogits(jnp.where(mask[..., None] > 0, s.vectors, noise), s.table, s.bias) for s in sides]
    assert_equal(evaluate(loss, BLOCKS, *noisy, mask), expected, 1e-7)


@pytest.mark.parametrize("label", [50, 30522, -1, -101])
def test_label_outside_the_vocabulary_shows(label):
    """In the value, as in the plain form."""
    labels = labels_of(make_mask("some")).at[1, 3].set(label)
    total, count = kernels.mlm_cross_entropy(make_side(), labels, kernels=BLOCKS)
    assert np.isnan(total) and count == losses.mlm_cross_entropy(make_side().dense(), labels)[1]


def test_two_vocabularies():
    with pytest.raises(ValueError, match="two vocabularies: the student has 50 entries, the teacher 49"):
        kernels.output_kl(make_side(), make_side(vocabulary=49), jnp.ones((4, 14)), kernels=BLOCKS)


def test_temperature_may_be_traced(cut):
    """One compiled program for all of a schedule; T^2 keeps the size of the gradient."""
    student, teacher, traces = make_side(seed=0), make_side(width=36, seed=1), []
    mask = jnp.asarray(make_mask("real"))

    @partial(jax.jit, static_argnums=0)
    def run(form, temperature):
        traces.append(form)
        total = lambda s: kernels.output_kl(s, teacher, mask, temperature=temperature, kernels=form)  # noqa: E731
        (value, count), gradient = jax.value_and_grad(total, has_aux=True)(student)
        return value, count, gradient

    for temperature in (1.0, 2.0, 4.0):
        assert_equal(*(run(form, jnp.float32(temperature)) for form in (BLOCKS, PLAIN)))
    assert len(traces) == 2


def test_large_logits(loss, cut):
    """Logits of +-1e4, where most probabilities are 0, and a side that is higher by a constant, which changes nothing."""
    sides = [VocabularyLogits(1e3 * s.vectors, s.table, s.bias) for s in (make_side(seed=0), make_side(seed=1))]
    mask = make_mask("real")
    assert_equal(*(evaluate(loss, form, *sides, mask) for form in (BLOCKS, PLAIN)))
    raised = VocabularyLogits(make_side().vectors, make_side().table, make_side().bias + 1e4)
    value, _, gradient = evaluate(kl, BLOCKS, raised, make_side(), mask)
    assert abs(value) < 1e-2 and np.abs(gradient.bias).max() < 1e-3  # the rounding of float32 at 1e4


def test_no_gradient_reaches_the_teacher():
    gradient = jax.grad(lambda t: kernels.output_kl(make_side(), t, jnp.ones((4, 14)), kernels=BLOCKS)[0])(make_side(seed=1))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def by_hand(student, teacher, mask, temperature) -> tuple[float, list[np.ndarray]]:
    """The mean and its gradients in float64, of output_kl."""
    sides = [[np.asarray(x, np.float64) for x in (side.vectors[mask > 0], side.table, side.bias)] for side in (student, teacher)]
    logs = []
    for vectors, table, bias in sides:
        logits = (vectors @ table.T + bias) / temperature
        logits -= logits.max(axis=-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    delta = temperature * (np.exp(logs[0]) - np.exp(logs[1])) / mask.sum()
    vectors = np.zeros(student.vectors.shape)
    vectors[mask > 0] = delta @ sides[0][1]
    value = temperature**2 * np.sum(np.exp(logs[1]) * (logs[1] - logs[0])) / mask.sum()
    return value, [vectors, delta.T @ sides[0][0], delta.sum(axis=0)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)])
def test_against_float64(dtype, tolerance, cut):
    """In bfloat16 the inputs are rounded and, of what is computed, the difference of the probabilities: half a unit in the last
    place, 2^-9 of each; and the gradient of the vectors, which is of their dtype, once more.
    """
    sides, mask = [make_side(seed=0, dtype=dtype), make_side(width=36, seed=1, dtype=dtype)], make_mask("real")
    rounded = [VocabularyLogits(s.vectors, s.table.astype(dtype).astype(jnp.float32), s.bias) for s in sides]
    value, _, gradient = evaluate(kl, BLOCKS, *rounded, mask)
    exact, exact_gradient = by_hand(*rounded, mask, 2.0)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    assert (gradient.vectors.dtype, gradient.table.dtype, gradient.bias.dtype) == (dtype, jnp.float32, jnp.float32)
    for own, right in zip(jax.tree.leaves(gradient), exact_gradient, strict=True):
        np.testing.assert_allclose(np.asarray(own, np.float64), right, rtol=tolerance, atol=tolerance * np.abs(right).max())


MESHES = {
    "data": (MeshConfig(data=8), 48),
    "tensor": (MeshConfig(data=1, tensor=8), 48),
    "mixed": (MeshConfig(data=2, fsdp=2, tensor=2), 48),
    "mixed, vocabulary whole": (MeshConfig(data=2, fsdp=2, tensor=2), 49),
    "nothing divides": (MeshConfig(data=1, fsdp=1, tensor=8), 49),
}


@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(loss, axes, monkeypatch):
    """Devices have different numbers of counted tokens, and each has several blocks of those and of its vocabulary."""
    cut = lambda platform, tokens, vocabulary, *, split: output.Blocks(3, 5 if split else vocabulary)  # noqa: E731
    monkeypatch.setattr(output, "blocks", cut)
    config, vocabulary = MESHES[axes]
    sides = make_side(8, 14, vocabulary, seed=0), make_side(8, 14, vocabulary, 32, seed=1)
    mask = np.concatenate([make_mask("real"), make_mask("some")])
    expected = evaluate(loss, PLAIN, *sides, mask)
    mesh = create_mesh(config)
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    batch, vocab = ("data", "fsdp"), "tensor" if vocabulary == 48 else None
    placed = [VocabularyLogits(place(s.vectors, batch), place(s.table, vocab, "fsdp"), place(s.bias, vocab)) for s in sides]
    with jax.set_mesh(mesh):
        found = evaluate(loss, BLOCKS, *placed, place(mask, batch))
        alone = jax.jit(lambda s, t, m, y: loss(BLOCKS, s, t, m, y, 2.0))(*placed, place(mask, batch), labels_of(mask, vocabulary))
    assert_equal(found, expected)
    np.testing.assert_allclose(alone[0] / alone[1], expected[0], rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_temporaries_do_not_grow_with_tokens(loss, platform):
    """Of 4,096 tokens over 30,000 entries, whose logits are 491 MB a side: what grows with the tokens is their vectors."""

    def temporaries(form, rows):
        shapes = (rows, 256, 16), (30_000, 16), (30_000,)
        sides = [VocabularyLogits(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))] * 2
        places = jax.ShapeDtypeStruct((rows, 256), jnp.int32)
        run = lambda s, t, mask, labels: loss(form, s, t, mask, labels, 2.0)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(run)).lower(*sides, places, places).compile().memory_analysis().temp_size_in_bytes

    form = Kernels(platform, logits="blocks")
    few, many = (temporaries(form, rows) for rows in (4, 16))
    block = output.blocks(platform, 16 * 256, 30_000, split=False)
    assert many < 6 * 4 * block.tokens * block.columns  # both sides' logits, and what their difference is made of
    assert many - few < 5 * 12 * 256 * 16 * 4
    assert temporaries(PLAIN, 4) > 2e8
