"""Letters of the shapes in signatures, in one place.

B batch, S sequence, D hidden (Ds student, Dt teacher), F feed-forward, N attention heads, H head size, R relation heads,
L layers, V vocabulary, A micro-batches. The tests check them at run time (jaxtyping with beartype); an installation
without jaxtyping reads them as plain arrays.
"""

from __future__ import annotations

import jax

Array = jax.Array
try:
    from jaxtyping import Bool, Float, Int, Key, Num, UInt32
except ModuleNotFoundError:

    class _Shape:
        def __class_getitem__(cls, item):
            return item[0]

    Bool = Float = Int = Key = Num = UInt32 = _Shape

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Num", "UInt32"]
