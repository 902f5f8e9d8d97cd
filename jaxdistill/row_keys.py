"""Random numbers that are a pure function of (key, row, site, place in the row): dropout masks, masked tokens.

`jax.random.bernoulli` costs about 100 integer operations per element on a CPU, more than the layers around it; a keyed
integer hash costs 10 and fuses with the multiplication. Because a row's numbers depend on the row's number in the global
batch and not on where the row is computed, micro-batches and devices do not change a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.shapes import Array, Key, UInt32


@dataclass
class RowKeys:
    """Two key words per row of the batch; every call of `bits` or `dropout` is another site.

    Args:
      key: key of the step and of the use: the sites of two instances with one key give the same numbers.
      rows: [B], number of each row in the global batch.
    """

    words: UInt32[Array, "B 2"]
    site: int = field(default=0)

    @classmethod
    def create(cls, key: Key[Array, ""], rows: UInt32[Array, " B"]) -> RowKeys:
        return cls(jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row))[-2:])(rows))

    def bits(self, shape: tuple[int, ...]) -> UInt32[Array, "B ..."]:
        """Uniform 32-bit words [B, ...]: a multiply-xorshift hash of the place in the row, keyed before and within."""
        self.site += 1
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

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """Zero each element of x [B, ...] with probability `rate` and scale the others by 1 / (1 - rate)."""
        if rate == 0.0:
            self.site += 1  # a rate changes no mask but its own
            return x
        keep = self.bits(x.shape) >= np.uint32(round(rate * 2**32))
        return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
