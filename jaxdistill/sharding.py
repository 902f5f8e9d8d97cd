"""Where arrays lie: one table from a parameter's path to logical axes, one from logical axes to the mesh."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdistill.config import MeshConfig
from jaxdistill.errors import InputError

AXES = ("data", "fsdp", "tensor")

# End of a parameter's path -> logical axes. Adam's moments end in the same paths, so they lie where their parameter lies.
PATH_TO_LOGICAL: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embeddings/word/embedding", ("vocab", "embed")),
    (r"embeddings/word/embedding_scale", ("vocab",)),
    (r"embeddings/(position|token_type)/embedding", (None, "embed")),
    (r"(query|key|value)/kernel", ("embed", "heads")),
    (r"(query|key|value)/(bias|kernel_scale)", ("heads",)),
    (r"attention_output/kernel", ("heads", "embed")),
    (r"intermediate/kernel", ("embed", "mlp")),
    (r"intermediate/(bias|kernel_scale)", ("mlp",)),
    (r"output/kernel", ("mlp", "embed")),
    (r"dense/kernel", ("embed", None)),
    (r"mlm/decoder", ("embed", "vocab")),
    (r"mlm/bias", ("vocab",)),
)
LOGICAL_TO_MESH: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
}


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices per axis.

    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh: sizes are at least 1, and at most one of {', '.join(AXES)} may be -1; got {sizes}")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = num_devices // taken
    if math.prod(sizes.values()) != num_devices:
        raise InputError(f"mesh: {sizes} does not cover the {num_devices} devices here; leave data at -1 to take what the other axes leave")
    return sizes


def create_mesh(config: MeshConfig, devices=None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    # make_mesh would give Explicit axes, under which every operation asks for its sharding.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How the array at this path is split; a dimension that its mesh axis does not divide is kept whole."""
    logical = next((axes for pattern, axes in PATH_TO_LOGICAL if re.search(rf"(^|/){pattern}$", path)), ())
    if len(logical) != len(shape):
        return PartitionSpec()
    axes = (LOGICAL_TO_MESH[name] if name else None for name in logical)
    return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)))


def tree_shardings(tree, mesh: Mesh | AbstractMesh):
    """A NamedSharding for every array of a tree (of arrays or ShapeDtypeStructs)."""

    def sharding(path, leaf):
        return NamedSharding(mesh, partition_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def on_host(tree, mesh: Mesh):
    """The arrays of a tree on the host, whole, in every process; those that devices of other processes hold parts of are gathered."""
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        tree = jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.tree.map(np.asarray, jax.device_get(tree))


def placed(tree, mesh: Mesh):
    """Arrays of the host, equal in every process, where `tree_shardings` says; each process copies what its devices hold."""

    def place(leaf, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, tree_shardings(tree, mesh))


def keep_rows(x: jax.Array) -> jax.Array:
    """[B, ...] split over its rows and nothing else. Without it, where parameters are split over fsdp, XLA may rather split the
    width of hidden states and send them around than gather the weights."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(LOGICAL_TO_MESH["batch"]))


def keep_vocabulary(table: jax.Array) -> jax.Array:
    """A word table [V, D] split over `tensor` and nothing else while rows are looked up in it, so that neither the rows of other
    devices nor a gradient of the whole table are made. Without a tensor axis as it lies."""
    mesh = jax.sharding.get_abstract_mesh()
    axis = LOGICAL_TO_MESH["vocab"]
    if mesh.empty or mesh.shape[axis] == 1 or table.shape[0] % mesh.shape[axis]:
        return table
    return jax.lax.with_sharding_constraint(table, PartitionSpec(axis))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of a batch [A, B, S]: micro-batches one after the other, rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(None, LOGICAL_TO_MESH["batch"]))


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Of rows [R, S]: over the data and fsdp axes; with `leading` axes before them, which stay whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, LOGICAL_TO_MESH["batch"]))
