"""Checksums of arrays: the same on any number of devices and under any sharding, so that silent damage of a checkpoint shows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import InputError
from jaxdistill.processes import gathered


class DamagedError(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


def array_path(path) -> str:
    """Of a leaf in a tree: students/small/trained/params/embeddings/word/embedding."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def checksums(tree: Any) -> dict[str, int]:
    """Path of every array -> a number of 32 bits; one changed word always changes it.

    Each shard is summed where it lies and the sums are added here: many programs with a collective each, under way at once, are a
    deadlock on fake devices.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):  # no mesh: a shard lies on one device of it
        sums = [[_checksum(*shard) for shard in _shards(leaf)] for _, leaf in leaves]
    own = [sum(map(int, of_leaf)) for of_leaf in jax.device_get(sums)]
    totals = [sum(of_leaf) % 2**32 for of_leaf in zip(*gathered(own), strict=True)]
    return dict(zip([array_path(path) for path, _ in leaves], totals, strict=True))


def _shards(x: jax.Array) -> Iterator[tuple[jax.Array | np.ndarray, np.ndarray, np.ndarray]]:
    """Every part of an array once, over all processes: its data, where it starts and the array's strides, in words."""
    strides = np.cumprod([1, *x.shape[:0:-1]])[::-1] if x.ndim else np.zeros(0)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            starts = [part.start or 0 for part in shard.index]
            # In host memory already, and then on the first device, for which alone it is compiled.
            data = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
            yield data, np.array(starts, np.int64).astype(np.uint32), strides.astype(np.uint32)


@jax.jit
def _checksum(x: jax.Array, starts: jax.Array, strides: jax.Array) -> jax.Array:
    """The sum, modulo 2^32, of the words times an odd hash of their place: whatever the order, and odd numbers lose no bit."""
    size = x.dtype.itemsize
    if size > 4:
        raise ValueError(f"words of {size} bytes have no checksum")
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        place += (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + starts[axis]) * strides[axis]
    place = (place ^ (place >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    place = (place ^ (place >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(words * ((place ^ (place >> jnp.uint32(16))) | jnp.uint32(1)), dtype=jnp.uint32)


@contextlib.contextmanager
def damage() -> Iterator[None]:
    """Whatever reading a damaged checkpoint raises, as DamagedError; what the machine or its disk are to blame for is left as it is."""
    try:
        yield
    except (InputError, DamagedError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        if re.search(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE", str(error)):
            raise
        said = re.sub(r" See full TensorStore details.*", "", str(error))  # the repr of a method
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise DamagedError(f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}") from error
