"""Relation and attention KL without [B, R, S, S] matrices: which implementation computes them, on each device its own part.

All but the plain form give value and gradient in one pass: the cotangent of a sum is one scalar, so the gradient is written down
where the value is computed, and it is all that is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdistill import losses
from jaxdistill.errors import InputError
from jaxdistill.kernels import attend, head_blocks, tpu
from jaxdistill.kernels.choice import ON_CPU, Kernels
from jaxdistill.losses.relations import check_keys, zero_padding
from jaxdistill.shapes import Array, Float, Int, Num
from jaxdistill.sharding import LOGICAL_TO_MESH


def relations_kernel(
    kernels: Kernels, length: int, student_width: int, teacher_width: int, num_heads: int, dtype: str, where: str = "kernels.relations"
) -> str:
    """The name of the implementation (as in `KernelsConfig.relations`) that computes relations of these shapes.

    auto: head blocks on a CPU; on a GPU cuDNN's attention for half precision, else attention in blocks of queries; on a TPU the
    Pallas kernel where a sequence fits into VMEM, else attention in blocks of queries.

    Args:
      length: of the rows, in slots.
      num_heads: relation heads that one device computes, divisors of both widths.

    Raises:
      InputError: the one that the config forces cannot compute this.
    """
    heads = student_width // num_heads, teacher_width // num_heads
    obstacles = {"cudnn": _not_cudnn(kernels, heads, dtype), "pallas": _not_pallas(kernels, length, num_heads, heads)}
    if kernels.relations != "auto":
        if obstacle := obstacles.get(kernels.relations):
            raise InputError(f"{where}: {kernels.relations} {obstacle}; take auto")
        return kernels.relations
    best = {"cpu": "blocks", "gpu": "cudnn", "tpu": "pallas"}[kernels.platform]
    return "attend" if obstacles.get(best) else best


def _not_cudnn(kernels: Kernels, heads: tuple[int, int], dtype: str) -> str | None:
    if kernels.platform != "gpu":
        return f"is for NVIDIA GPUs, and this run is for a {kernels.platform.upper()}"
    if dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16, and training.precision is {dtype}"
    largest = attend.cudnn_head_size(max(heads), max(heads))
    # On Hopper it takes 256; which GPU it is to be is not known here, and relation heads are seldom so wide.
    return f"takes heads of at most 128 numbers, and these need {largest}" if largest > 128 else None


def _not_pallas(kernels: Kernels, length: int, num_heads: int, heads: tuple[int, int]) -> str | None:
    if kernels.platform != "tpu" and not kernels.interpret:
        return f"is for TPUs, and this run is for a {kernels.platform.upper()}"
    if not tpu.fits(length, num_heads, *heads):
        return f"does not take rows of {length} with {num_heads} heads of {heads[0]} and {heads[1]} numbers"
    return None


def relation_kl(
    student: Float[Array, "B S Ds"],
    teacher: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_relation_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    student_keys: Float[Array, "B S Ds"] | None = None,
    teacher_keys: Float[Array, "B S Dt"] | None = None,
    kernels: Kernels = ON_CPU,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.relation_kl`; no gradient reaches the teacher. Under a mesh each device does its own rows and heads.

    Raises:
      ValueError: R does not divide one of the widths, or keys of one side only.
      InputError: `kernels` forces what cannot compute this (`relations_kernel`).
    """
    check_keys(student_keys, teacher_keys)
    for vectors in (student, teacher):
        if vectors.shape[-1] % num_relation_heads:
            raise ValueError(f"{num_relation_heads} relation heads do not divide the hidden size {vectors.shape[-1]}")
    mesh = jax.sharding.get_abstract_mesh()
    batch, heads = LOGICAL_TO_MESH["batch"], LOGICAL_TO_MESH["heads"]
    if not mesh.empty and num_relation_heads % mesh.shape["tensor"]:
        heads = None
    local_heads = num_relation_heads // (mesh.shape["tensor"] if heads and not mesh.empty else 1)
    share = local_heads / num_relation_heads
    widths = (round(vectors.shape[-1] * share) for vectors in (student, teacher))
    name = relations_kernel(kernels, mask.shape[1], *widths, local_heads, str(student.dtype))
    if name == "plain":
        keys = {"student_keys": student_keys, "teacher_keys": teacher_keys}
        return losses.relation_kl(student, teacher, mask, num_relation_heads=num_relation_heads, segment_ids=segment_ids, **keys)
    # A side is (vectors,) or (queries, keys): its first and last are what is multiplied.
    student, teacher = (tuple(x for x in side if x is not None) for side in ((student, student_keys), (teacher, teacher_keys)))
    teacher = jax.lax.stop_gradient(teacher)
    segments = (mask > 0).astype(jnp.int32) if segment_ids is None else jnp.where(mask > 0, segment_ids, 0).astype(jnp.int32)
    count = jnp.sum((mask > 0).astype(jnp.float32)) * num_relation_heads
    how = _How(name, kernels, local_heads)
    if mesh.empty or mesh.size == 1:
        return _divergence(student, teacher, segments, how), count
    if mask.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        batch = None
    axes = tuple(axis for axis in (*(batch or ()), heads) if axis)

    def local(student, teacher, segments):
        return jax.lax.psum(_divergence(student, teacher, segments, how), axes)

    vectors, rows = PartitionSpec(batch, None, heads), PartitionSpec(batch)
    total = jax.shard_map(local, in_specs=(vectors, vectors, rows), out_specs=PartitionSpec(), check_vma=False)
    return total(student, teacher, segments), count


def attention_kl(
    student_query: Float[Array, "B S Ds"],
    student_key: Float[Array, "B S Ds"],
    teacher_query: Float[Array, "B S Dt"],
    teacher_key: Float[Array, "B S Dt"],
    mask: Num[Array, "B S"],
    *,
    num_heads: int,
    segment_ids: Int[Array, "B S"] | None = None,
    kernels: Kernels = ON_CPU,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The numbers of `losses.attention_kl`."""
    own = {"student_keys": student_key, "teacher_keys": teacher_key, "segment_ids": segment_ids, "kernels": kernels}
    return relation_kl(student_query, teacher_query, mask, num_relation_heads=num_heads, **own)


@dataclass(frozen=True)
class _How:
    """What is settled before any number is known."""

    name: str
    kernels: Kernels
    num_heads: int  # of this device


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _divergence(student, teacher, segments, how: _How) -> jax.Array:
    """Sum of the KL over real queries and heads. Segments [B, S]: 0 = padding; a query sees keys of its own number."""
    return _compute(student, teacher, segments, how, with_gradient=False)[0]


def _compute(student, teacher, segments, how: _How, *, with_gradient: bool):
    if how.name == "pallas":
        return tpu.divergence(student, teacher, segments, how.num_heads, with_gradient=with_gradient, interpret=how.kernels.interpret)
    student, teacher = jax.tree.map(lambda x: zero_padding(x, segments), (student, teacher))
    if how.name == "blocks":
        blocks = partial(head_blocks.divergence, platform=how.kernels.platform)
        return blocks(student, teacher, segments, how.num_heads, with_gradient=with_gradient)
    attention = attend.in_query_blocks if how.name == "attend" else attend.by_cudnn
    attention = partial(attention, segments=segments)
    return attend.divergence(attention, student, teacher, segments, how.num_heads, with_gradient=with_gradient)


def _forward(student, teacher, segments, how: _How):
    total, gradients = _compute(student, teacher, segments, how, with_gradient=True)
    return total, (gradients, teacher)


def _backward(how: _How, residual, cotangent):
    gradients, teacher = residual
    scaled = tuple((cotangent * gradient.astype(jnp.float32)).astype(gradient.dtype) for gradient in gradients)
    return scaled, jax.tree.map(jnp.zeros_like, teacher), None


_divergence.defvjp(_forward, _backward)
