"""Checksums of arrays: by hand, of any sharding, and that one bit is enough."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.config import MeshConfig
from jaxdistill.faults.checksums import checksums
from jaxdistill.sharding import create_mesh


def by_hand(array: np.ndarray) -> int:
    """The same in Python's whole numbers."""
    words = array.view(f"u{array.dtype.itemsize}").ravel().tolist() if array.dtype != bool else array.ravel().tolist()
    total = 0
    for place, word in enumerate(words):
        place = ((place ^ place >> 16) * 0x85EBCA6B) % 2**32
        place = ((place ^ place >> 13) * 0xC2B2AE35) % 2**32
        total += int(word) * ((place ^ place >> 16) | 1)
    return total % 2**32


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "matrix": draw.normal(size=(6, 8)).astype(np.float32),
        "block": draw.normal(size=(2, 4, 3)).astype(np.float32),
        "scalar": np.int32(-7).reshape(()),
        "half": draw.normal(size=(5,)).astype(jnp.bfloat16),
        "flags": np.array([True, False, True]),
    }


def test_by_hand():
    found = checksums({"tree": jax.tree.map(jnp.asarray, arrays())})
    assert found == {f"tree/{name}": by_hand(array) for name, array in arrays().items()}


def test_any_sharding_gives_the_same():
    expected = by_hand(arrays()["matrix"])
    for mesh in (MeshConfig(), MeshConfig(fsdp=2), MeshConfig(data=2, fsdp=2, tensor=2)):
        for spec in (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("fsdp", "tensor"))):
            placed = jax.device_put(arrays()["matrix"], NamedSharding(create_mesh(mesh), spec))
            with jax.set_mesh(create_mesh(mesh)):
                assert checksums([placed]) == {"0": expected}


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 47), bit=st.integers(0, 31))
def test_one_bit_shows(place: int, bit: int):
    array = arrays()["matrix"]
    before = by_hand(array)
    array.view("u4").reshape(-1)[place] ^= np.uint32(1 << bit)
    assert checksums([jnp.asarray(array)])["0"] != before


def test_exchanged_words_show():
    array = arrays()["matrix"]
    assert checksums([jnp.asarray(array[::-1])]) != checksums([jnp.asarray(array)])


def test_words_of_eight_bytes_are_refused():
    with jax.enable_x64(True), pytest.raises(ValueError, match="words of 8 bytes"):
        checksums([jnp.zeros(3, jnp.float64)])
