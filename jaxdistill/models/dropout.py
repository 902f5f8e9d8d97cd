"""Dropout whose mask is a pure function of (key, row, place in the network, place in the row).

`jax.random.bernoulli` costs about 100 integer operations per element on a CPU, more than the layers around it; a keyed
integer hash costs 10 and fuses with the multiplication. Because a row's mask depends on the row's number in the global
batch and not on where the row is computed, micro-batches and devices do not change a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.shapes import Array, Key, UInt32


@dataclass
class DropoutKeys:
    """Two key words per row of the batch; every call of `apply` is another site of the network.

    Args:
      key: key of the step and the student.
      rows: [B], number of each row in the global batch.
    """

    words: UInt32[Array, "B 2"]
    site: int = field(default=0)

    @classmethod
    def create(cls, key: Key[Array, ""], rows: UInt32[Array, " B"]) -> DropoutKeys:
        return cls(jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row))[-2:])(rows))

    def apply(self, x: jax.Array, rate: float) -> jax.Array:
        """Zero each element of x [B, ...] with probability `rate` and scale the others by 1 / (1 - rate)."""
        self.site += 1
        if rate == 0.0:
            return x
        keep = self._bits(x.shape) >= np.uint32(round(rate * 2**32))
        return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))

    def _bits(self, shape: tuple[int, ...]) -> jax.Array:
        """Uniform 32-bit words: a multiply-xorshift hash of the place in the row, keyed before and within."""
        site = np.uint32(self.site * 0x9E3779B9 % 2**32)
        tail = (1,) * (len(shape) - 1)
        before = _mix(self.words[:, 0] + site).reshape(-1, *tail)
        within = (self.words[:, 1] ^ site).reshape(-1, *tail)
        place, stride = jnp.zeros((), jnp.uint32), 1
        for axis in range(len(shape) - 1, 0, -1):
            index = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape[1:]), axis)
            place, stride = place + index * np.uint32(stride), stride * shape[axis]
        x = (place * np.uint32(0x9E3779B9)) ^ before
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = ((x ^ (x >> 15)) + within) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
