"""Every implementation of relation and attention KL against the plain losses and numpy in float64: value, count and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import divergence_by_loops, log_softmax, make_segments, make_vectors, places_of_texts, scores_by_loops, spoil_padding

from jaxdistill import kernels, losses
from jaxdistill.config import MeshConfig
from jaxdistill.errors import InputError
from jaxdistill.kernels import Kernels, attend, relations, relations_kernel, tpu
from jaxdistill.sharding import create_mesh

HEADS = 4
FORCED = {name: Kernels(relations=name, interpret=True) for name in ("plain", "blocks", "attend", "pallas")}
FAST = ("attend", "pallas")


@partial(jax.jit, static_argnums=0, static_argnames="heads")
def evaluate(kl, student, teacher, mask, segments, *, heads=HEADS):
    """Sides are (vectors,) or (queries, keys); the gradients of the student's, one after the other."""

    def total(student):
        keys = {"student_keys": student[1], "teacher_keys": teacher[1]} if len(student) == 2 else {}
        return kl(student[0], teacher[0], mask, num_relation_heads=heads, segment_ids=segments, **keys)

    (value, count), gradients = jax.value_and_grad(total, has_aux=True)(student)
    return value, count, jnp.stack(gradients)


def by(name):
    return partial(kernels.relation_kl, kernels=FORCED[name])


def sides(batch, length, student, teacher, *, cross, seed=0):
    pairs = [make_vectors(batch, length, student, teacher, seed + n) for n in range(1 + cross)]
    return tuple(zip(*pairs, strict=True))


def assert_equal(ours, reference, tolerance=1e-5):
    np.testing.assert_allclose(ours[0], reference[0], rtol=tolerance, atol=tolerance)
    assert ours[1] == reference[1]
    np.testing.assert_allclose(ours[2], reference[2], rtol=tolerance, atol=tolerance * float(jnp.abs(reference[2]).max()))


def gradient_by_loops(student, teacher, segments, num_heads):
    """Of the self relation, float64."""
    gradient, size = np.zeros(student.shape), student.shape[-1] // num_heads
    scores = zip(*(scores_by_loops(side, segments, num_heads) for side in (student, teacher)), strict=True)
    for row, places in places_of_texts(segments):
        for head in range(num_heads):
            delta = np.subtract(*(np.exp(log_softmax(own)) for own in next(scores)))
            own = slice(head * size, (head + 1) * size)
            gradient[row, places, own] = (delta + delta.T) @ student[row, places, own].astype(np.float64) / np.sqrt(size)
    return gradient


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("length", "student_size", "teacher_size"), [(1, 8, 16), (7, 12, 8), (63, 64, 12), (130, 16, 64)])
def test_every_implementation_over_lengths_and_head_sizes(name, cross, length, student_size, teacher_size):
    student, teacher = sides(3, length, HEADS * student_size, HEADS * teacher_size, cross=cross, seed=length)
    texts = [[length], [max(length // 3, 1)] * 2 if length > 1 else [1], [length // 2]]
    segments = make_segments(texts, length)
    student, teacher = (tuple(spoil_padding(x, segments) for x in side) for side in (student, teacher))
    mask = (segments > 0).astype(np.int32)
    for packed in (segments, None):
        assert_equal(evaluate(by(name), student, teacher, mask, packed), evaluate(losses.relation_kl, student, teacher, mask, packed))


@pytest.mark.parametrize("name", FAST)
def test_rows_of_512(name):
    """Longer than one block of queries of either."""
    student, teacher = sides(1, 512, 16, 16, cross=False)
    segments = make_segments([[300, 200]], 512)
    arrays = student, teacher, (segments > 0).astype(np.int32), segments
    assert_equal(evaluate(by(name), *arrays, heads=2), evaluate(losses.relation_kl, *arrays, heads=2))


@pytest.mark.parametrize("cross", [False, True])
def test_pallas_in_blocks_of_queries(cross, monkeypatch):
    """As sequences are computed whose scores do not fit on the chip at once."""
    monkeypatch.setattr(tpu, "_SCORE_ELEMENTS", 128 * 256)
    student, teacher = sides(2, 250, 2 * 12, 2 * 8, cross=cross)
    segments = make_segments([[120, 130], [60]], 250)
    arrays = student, teacher, (segments > 0).astype(np.int32), segments
    fresh = lambda *args, **options: by("pallas")(*args, **options)  # noqa: E731 (the block is compiled in)
    assert_equal(evaluate(fresh, *arrays, heads=2), evaluate(losses.relation_kl, *arrays, heads=2))


def test_attention_in_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(attend, "_BLOCK_ELEMENTS", 2 * HEADS * 30 * 7)
    student, teacher = sides(2, 30, 48, 32, cross=True)
    segments = make_segments([[11, 19], [8]], 30)
    arrays = student, teacher, (segments > 0).astype(np.int32), segments
    fresh = lambda *args, **options: by("attend")(*args, **options)  # noqa: E731
    assert_equal(evaluate(fresh, *arrays), evaluate(losses.relation_kl, *arrays))
    assert "length=5\n" in str(jax.make_jaxpr(partial(evaluate, fresh))(*arrays))  # 6 queries at once


@pytest.mark.parametrize("name", ["blocks", *FAST])
@pytest.mark.parametrize(("scale", "length", "size"), [(1.0, 96, 16), (4.0, 96, 16), (1.0, 1, 8), (1.0, 33, 12), (1.0, 200, 64)])
def test_half_precision_against_float64(name, scale, length, size):
    """Of what the rounded vectors say: the value to 2^-7 of it, the gradient to 2^-7 of its largest number."""
    student, teacher = (scale * x for x in make_vectors(2, length, HEADS * size, HEADS * 16))
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, teacher))
    segments = make_segments([[length], [length // 3, length // 2]], length)
    exact = [np.asarray(x, np.float64) for x in (student, teacher)]
    value, count, gradient = evaluate(by(name), (student,), (teacher,), (segments > 0).astype(np.int32), segments)
    assert gradient.dtype == jnp.bfloat16
    expected, places = divergence_by_loops(*exact, segments, HEADS)
    assert count == places
    np.testing.assert_allclose(value, expected, rtol=2**-7)
    reference = gradient_by_loops(*exact, segments, HEADS)
    np.testing.assert_allclose(np.asarray(gradient[0], np.float64), reference, atol=2**-7 * np.abs(reference).max())


def close_sides(noise: float):
    """A student that is nearly its teacher, in bfloat16, and the exact gradient."""
    teacher, other = make_vectors(2, 96, HEADS * 16, HEADS * 16)
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (teacher + noise * other, teacher))
    segments = make_segments([[96], [31, 40]], 96)
    exact = [np.asarray(x, np.float64) for x in (student, teacher)]
    return student, teacher, segments, gradient_by_loops(*exact, segments, HEADS)


@pytest.mark.parametrize("name", ["blocks", *FAST])
@pytest.mark.parametrize("noise", [0.1, 0.02])
def test_a_close_student_in_half_precision(name, noise):
    """Differences are taken before anything is rounded."""
    student, teacher, segments, reference = close_sides(noise)
    _, _, gradient = evaluate(by(name), (student,), (teacher,), (segments > 0).astype(np.int32), segments)
    np.testing.assert_allclose(np.asarray(gradient[0], np.float64), reference, atol=2**-7 * np.abs(reference).max())


@pytest.mark.parametrize("name", FAST)
def test_large_scores(name):
    """Peaks are taken off: scores in the hundreds, one key far above the others."""
    student, teacher = (12 * x for x in make_vectors(1, 40, 32, 32))
    arrays = (student,), (teacher,), np.ones((1, 40), np.int32), None
    ours, plain = (evaluate(form, *arrays, heads=2) for form in (by(name), losses.relation_kl))
    assert np.isfinite(ours[0])
    assert_equal(ours, plain)


@pytest.mark.parametrize("name", FAST)
def test_value_alone_equals_value_with_gradient(name):
    student, teacher = make_vectors(2, 9, 32, 48)
    mask = np.ones((2, 9), np.int32)
    alone = jax.jit(partial(by(name), num_relation_heads=HEADS))(student, teacher, mask)
    np.testing.assert_allclose(alone[0], evaluate(by(name), (student,), (teacher,), mask, None)[0], rtol=1e-6)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4, tensor=2)])
def test_sharded_equals_single(name, mesh):
    student, teacher = sides(4, 20, 32, 48, cross=True)
    segments = make_segments([[20], [9, 11], [3], [5, 5]], 20)
    arrays = student, teacher, (segments > 0).astype(np.int32), segments
    single = evaluate(losses.relation_kl, *arrays)
    with jax.set_mesh(create_mesh(mesh)):
        assert_equal(evaluate(by(name), *arrays), single)


# cuDNN's part, with plain attention in the place of cuDNN


def fused_attention(query, key, value, *, mask, scale, return_residual):
    """What cuDNN computes and what it refuses, on any device; log-sum-exp as [B, N, T]."""
    assert return_residual and query.shape == key.shape == value.shape and query.shape[-1] % 8 == 0 and query.dtype == value.dtype
    assert mask is None or (mask.shape == (query.shape[0], 1, query.shape[1], query.shape[1]) and query.shape[1] % 2 == 0)
    scores = jnp.einsum("bqrh,bkrh->brqk", query, key, preferred_element_type=jnp.float32) * jnp.float32(scale)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.float32(-(2.0**40)))
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("brqk,bkrh->bqrh", weights, value), jax.nn.logsumexp(scores, axis=-1)


@pytest.fixture
def cudnn_replaced(monkeypatch):
    monkeypatch.setattr(relations, "_not_cudnn", lambda *args: None)
    monkeypatch.setattr(attend, "by_cudnn", partial(attend.with_masks, fused_attention))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("length", "student_size", "teacher_size"), [(9, 8, 16), (24, 12, 12), (33, 16, 64)])
def test_composition_for_cudnn(packed, cross, length, student_size, teacher_size, cudnn_replaced):
    student, teacher = sides(3, length, HEADS * student_size, HEADS * teacher_size, cross=cross)
    segments = make_segments([[length], [3, 4], [5]], length, first=0)
    mask = (segments > 0).astype(np.int32)
    kernel = lambda *args, **options: kernels.relation_kl(*args, kernels=Kernels("gpu", relations="cudnn"), **options)  # noqa: E731
    arrays = student, teacher, mask, segments if packed else None
    assert_equal(evaluate(kernel, *arrays), evaluate(losses.relation_kl, *arrays))


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.02])
def test_cudnn_and_a_close_student(noise, cudnn_replaced):
    """cuDNN rounds its four outputs before their differences are taken: an error of the vectors' size, not of the gradient's."""
    student, teacher, segments, reference = close_sides(noise)
    kernel = lambda *args, **options: kernels.relation_kl(*args, kernels=Kernels("gpu", relations="cudnn"), **options)  # noqa: E731
    _, _, gradient = evaluate(kernel, (student,), (teacher,), (segments > 0).astype(np.int32), segments)
    rounding = 2**-8 * float(jnp.abs(student.astype(jnp.float32)).max()) * 16**-0.5
    np.testing.assert_allclose(np.asarray(gradient[0], np.float64), reference, atol=4 * rounding)


def test_cudnn_is_lowered_for_cuda(monkeypatch):
    """Without a GPU: its calls are there, of narrow heads, and no scores."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    vectors, mask = jax.ShapeDtypeStruct((2, 64, 96), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64), jnp.int32)
    kernel = partial(kernels.relation_kl, kernels=Kernels("gpu"), num_relation_heads=8)
    value = jax.value_and_grad(lambda student, teacher, mask: kernel(student, teacher, mask)[0])
    text = jax.jit(value).trace(vectors, vectors, mask).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward") == 2 and text.count("@__cudnn$fmhaScaleBiasSoftmax(") == 3
    assert "x8x64x64x" not in text and "2x64x8x16xbf16" in text  # of 12 numbers


# What is chosen, and what memory it takes


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "expected"),
    [
        ("cpu", 128, "float32", "blocks"),
        ("gpu", 128, "bfloat16", "cudnn"),
        ("gpu", 512, "float32", "attend"),
        ("tpu", 512, "bfloat16", "pallas"),
        ("tpu", 8192, "bfloat16", "attend"),
    ],
)
def test_what_auto_means(platform, length, dtype, expected):
    assert relations_kernel(Kernels(platform), length, 768, 768, 48, dtype) == expected


@pytest.mark.parametrize(
    ("chosen", "dtype", "message"),
    [
        (Kernels("cpu", relations="cudnn"), "bfloat16", "cudnn is for NVIDIA GPUs, and this run is for a CPU; take auto"),
        (Kernels("gpu", relations="cudnn"), "float32", "cudnn takes bfloat16, and training.precision is float32; take auto"),
        (Kernels("gpu", relations="pallas"), "bfloat16", "pallas is for TPUs, and this run is for a GPU; take auto"),
        (Kernels("tpu", relations="pallas"), "bfloat16", "pallas does not take rows of 4096 with 48 heads of 8 and 16 numbers; take auto"),
    ],
)
def test_what_cannot_be_forced(chosen, dtype, message):
    with pytest.raises(InputError, match=f"kernels.relations: {message}"):
        relations_kernel(chosen, 4096, 384, 768, 48, dtype)


def test_memory_of_twice_the_length():
    """At the same number of tokens: 1.3 times at most, where the plain form's scores double."""

    def temporaries(name, rows, length):
        vectors = jax.ShapeDtypeStruct((rows, length, 96), jnp.float32)
        value = jax.grad(lambda s, t: by(name)(s, t, jnp.ones((rows, length), jnp.int32), num_relation_heads=12)[0])
        return jax.jit(value).lower(vectors, vectors).compile().memory_analysis().temp_size_in_bytes

    growth = {name: temporaries(name, 8, 1024) / temporaries(name, 16, 512) for name in ("plain", "attend")}
    assert growth["attend"] <= 1.3 and growth["plain"] > 1.7, growth
