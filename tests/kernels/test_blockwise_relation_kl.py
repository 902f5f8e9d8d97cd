"""Block by block or at once: the same value and gradient, for every length, head size and cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relation_examples import make_segments, make_vectors

from jaxdistill import kernels, losses
from jaxdistill.config import MeshConfig
from jaxdistill.kernels import head_blocks
from jaxdistill.sharding import create_mesh

HEADS = 4


@partial(jax.jit, static_argnums=0, static_argnames="heads")
def evaluate(relation_kl, student, teacher, mask, segments, *, heads):
    def total(student):
        return relation_kl(student, teacher, mask, num_relation_heads=heads, segment_ids=segments)

    (value, count), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return value, count, gradient


@partial(jax.jit, static_argnums=0, static_argnames="heads")
def evaluate_attention(attention_kl, student, teacher, mask, segments, *, heads):
    """The cross form; sides are (query, key). The gradients of both lie side by side."""

    def total(student):
        return attention_kl(*student, *teacher, mask, num_heads=heads, segment_ids=segments)

    (value, count), gradients = jax.value_and_grad(total, has_aux=True)(student)
    return value, count, jnp.stack(gradients)


def make_sides(batch, length, student, teacher, seed=0):
    queries, keys = (make_vectors(batch, length, student, teacher, seed=n) for n in (seed, seed + 100))
    return tuple(zip(queries, keys, strict=True))


def both(student, teacher, mask, segments=None, *, heads=HEADS):
    """(sum, count, gradient) of the plain form and of the kernel."""
    return [evaluate(form, student, teacher, mask, segments, heads=heads) for form in (losses.relation_kl, kernels.relation_kl)]


def assert_equal(plain, blockwise):
    np.testing.assert_allclose(blockwise[0], plain[0], rtol=1e-5, atol=1e-5)
    assert blockwise[1] == plain[1]
    np.testing.assert_allclose(blockwise[2], plain[2], rtol=1e-5, atol=1e-5 * float(jnp.abs(plain[2]).max()))


@pytest.mark.parametrize("head_size", [8, 12, 16])
def test_all_lengths_at_once(head_size):
    """64 rows whose real tokens are 1..64: the gradient of each row is compared by itself."""
    student, teacher = make_vectors(64, 64, HEADS * head_size, 2 * HEADS * head_size, seed=head_size)
    assert_equal(*both(student, teacher, (np.arange(64) < np.arange(1, 65)[:, None]).astype(np.int32)))


@pytest.mark.parametrize(("length", "head_size"), [(1, 8), (2, 12), (7, 8), (63, 16)])
def test_rows_of_odd_lengths_packed(length, head_size):
    student, teacher = make_vectors(3, length, HEADS * head_size, HEADS * 8, seed=length)
    rng = np.random.default_rng(length)
    texts = [[length], [max(length // 3, 1)] * 2 if length > 1 else [1], rng.multinomial(length, [0.2, 0.5, 0.2, 0.1]).tolist()]
    segments = make_segments(texts, length)
    assert_equal(*both(student, teacher, (segments > 0).astype(np.int32), segments))


@pytest.mark.parametrize(("length", "head_size"), [(1, 8), (7, 12), (63, 16)])
def test_attention_of_odd_lengths_packed(length, head_size):
    student, teacher = make_sides(3, length, HEADS * head_size, HEADS * 8, seed=length)
    segments = make_segments([[length], [max(length // 3, 1)] * 2 if length > 1 else [1], [length // 2]], length)
    arrays = student, teacher, (segments > 0).astype(np.int32), segments
    assert_equal(*(evaluate_attention(form.attention_kl, *arrays, heads=HEADS) for form in (losses, kernels)))


@pytest.mark.parametrize(("elements", "heads_in_block"), [(1, 1), (8 * 81, 8), (10**9, 24)])
def test_every_cut_into_blocks(elements, heads_in_block, monkeypatch):
    monkeypatch.setattr(head_blocks, "_BLOCK_ELEMENTS", {"cpu": elements})
    student, teacher = make_vectors(2, 9, 24, 36)
    segments = make_segments([[9], [4, 3]], 9)
    arrays = student, teacher, segments.clip(0, 1), segments
    plain = evaluate(losses.relation_kl, *arrays, heads=12)
    kernel = lambda *args, **options: kernels.relation_kl(*args, **options)  # noqa: E731 (a fresh one: the cut is compiled in)
    assert_equal(plain, evaluate(kernel, *arrays, heads=12))
    steps = 2 * 12 // heads_in_block
    assert f"length={steps}\n" in str(jax.make_jaxpr(partial(evaluate, kernel, heads=12))(*arrays))
    sides = make_sides(2, 9, 24, 36)
    kernel = lambda *args, **options: kernels.attention_kl(*args, **options)  # noqa: E731
    assert_equal(*(evaluate_attention(form, *sides, *arrays[2:], heads=12) for form in (losses.attention_kl, kernel)))


def test_value_alone_equals_value_with_gradient():
    """They are two passes of the kernel: an evaluation asks for the value only."""
    student, teacher = make_vectors(3, 7, HEADS * 8, HEADS * 8, seed=7)
    mask = np.ones((3, 7), np.int32)
    alone, count = jax.jit(kernels.relation_kl, static_argnames="num_relation_heads")(student, teacher, mask, num_relation_heads=HEADS)
    value, same, _ = evaluate(losses.relation_kl, student, teacher, mask, mask, heads=HEADS)
    np.testing.assert_allclose(alone, value, rtol=1e-5)
    assert count == same


def test_gradient_scales_with_what_follows():
    student, teacher = make_vectors(2, 9, 24, 36)

    @jax.jit
    def after(factor):
        return jax.grad(lambda s: factor * kernels.relation_kl(s, teacher, jnp.ones((2, 9)), num_relation_heads=6)[0])(student)

    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    np.testing.assert_allclose(after(-2.5), -2.5 * after(1.0), rtol=1e-6, atol=1e-6)


def test_self_form_copies_its_vectors_once(monkeypatch):
    """Into blocks: student and teacher, where the cross form has queries and keys of each."""
    copied, split = [], head_blocks._split_blocks
    monkeypatch.setattr(head_blocks, "_split_blocks", lambda *args, **options: copied.append(args) or split(*args, **options))
    vectors, mask = jnp.ones((2, 11, 24)), jnp.ones((2, 11))
    kernels.relation_kl(vectors, vectors, mask, num_relation_heads=6)
    assert len(copied) == 2
    kernels.attention_kl(vectors, vectors, vectors, vectors, mask, num_heads=6)
    assert len(copied) == 6


def test_no_gradient_of_the_teacher_through_a_gradient():
    """Not even where the value comes out of `value_and_grad` and is differentiated again."""
    student, teacher = (jnp.asarray(x) for x in make_vectors(2, 9, 24, 36))

    def value(teacher):
        return jax.value_and_grad(lambda s: kernels.relation_kl(s, teacher, jnp.ones((2, 9)), num_relation_heads=6)[0])(student)[0]

    assert not np.any(jax.jit(jax.grad(value))(teacher))


def test_inside_scan_and_checkpoint():
    """As gradient accumulation and rematerialisation call it."""
    student, teacher = (jnp.asarray(x.reshape(2, 2, 9, 24)) for x in make_vectors(4, 9, 24, 24))

    @jax.jit
    def scanned(student):
        def body(total, pair):
            value = jax.checkpoint(lambda s, t: kernels.relation_kl(s, t, jnp.ones((2, 9)), num_relation_heads=6)[0])(*pair)
            return total + value, None

        return jax.lax.scan(body, jnp.float32(0), (student, teacher))[0]

    value, gradient = jax.value_and_grad(scanned)(student)
    flat = student.reshape(4, 9, 24), teacher.reshape(4, 9, 24)
    plain = evaluate(losses.relation_kl, *flat, jnp.ones((4, 9)), None, heads=6)
    assert_equal(plain, (value, plain[1], gradient.reshape(4, 9, 24)))


@pytest.mark.parametrize(
    ("mesh", "rows", "heads"),
    [
        (MeshConfig(data=4, tensor=2), 3, 4),  # rows that the devices do not divide
        (MeshConfig(data=2, tensor=4), 4, 6),  # heads that they do not
        (MeshConfig(data=4, fsdp=2), 5, 3),  # neither
    ],
)
def test_meshes_that_do_not_divide(mesh, rows, heads):
    student, teacher = make_vectors(rows, 9, 24, 48, seed=rows)
    segments = make_segments([[9], [4, 5], [2], [1], [3, 3]][:rows], 9)
    mask = (segments > 0).astype(np.int32)
    with jax.set_mesh(create_mesh(mesh)):
        sharded = evaluate(kernels.relation_kl, student, teacher, mask, segments, heads=heads)
        sides = make_sides(rows, 9, 24, 48, seed=rows)
        sharded_attention = evaluate_attention(kernels.attention_kl, *sides, mask, segments, heads=heads)
    assert_equal(evaluate(losses.relation_kl, student, teacher, mask, segments, heads=heads), sharded)
    assert_equal(evaluate_attention(losses.attention_kl, *sides, mask, segments, heads=heads), sharded_attention)


@pytest.mark.parametrize("form", ["self", "cross"])
def test_each_device_does_its_own_part(form):
    """Under a mesh nothing but the sum travels: no vectors are gathered."""
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    vectors = jax.ShapeDtypeStruct((8, 16, 48), jnp.float32, sharding=place)
    mask = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        if form == "self":
            gradient = jax.grad(lambda s, t, m: kernels.relation_kl(s, t, m, num_relation_heads=4)[0])
            arrays = vectors, vectors, mask
        else:
            gradient = jax.grad(lambda *arrays: kernels.attention_kl(*arrays, num_heads=4)[0], argnums=(0, 1))
            arrays = vectors, vectors, vectors, vectors, mask
        text = jax.jit(gradient).lower(*arrays).compile().as_text()
    for collective in ("all-gather", "all-to-all", "reduce-scatter", "collective-permute"):
        assert f" {collective}(" not in text and f" {collective}-start(" not in text
