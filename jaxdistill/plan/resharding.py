"""Collectives that the shardings of parameters and batch do not ask for: somewhere arrays are laid out anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import product

import jax

from jaxdistill.plan.hlo import Array
from jaxdistill.plan.program import Collective

SMALL = 2**16  # bytes: below it a collective costs its latency alone


def parameter_shapes(*trees) -> set[tuple[int, ...]]:
    """Shapes that parameters (ShapeDtypeStructs with shardings) have on a device and on the way to being whole, sides sorted."""
    found = set()
    for leaf in jax.tree.leaves(trees):
        shard = leaf.sharding.shard_shape(leaf.shape)
        found |= {_sides(shape) for shape in product(*({own, whole} for own, whole in zip(shard, leaf.shape, strict=True)))}
    return found


def _sides(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def resharded(collectives: Iterable[Collective], parameters: set[tuple[int, ...]], *, tensor: bool) -> list[str]:
    """A warning for each kind of collective that nothing explains, with the bytes that it sends and the largest one's place.

    All-reduces, all-gathers and reduce-scatters of a parameter's shape are explained; with a `tensor` axis also all-reduces of
    activations. All-to-alls and permutations of arrays never are.
    """
    found: dict[str, list[Collective]] = defaultdict(list)
    for collective in collectives:
        if collective.group > 1 and not _explained(collective, parameters, tensor):
            found[collective.kind].append(collective)
    warnings = []
    for kind, unexplained in found.items():
        largest = max(unexplained, key=lambda c: c.sent)
        array = max(largest.arrays, key=lambda array: array.bytes)
        shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
        sent, times = sum(c.sent for c in unexplained), sum(c.times for c in unexplained)
        place = f" at {largest.op_name}" if largest.op_name else ""
        warnings.append(
            f"resharding: {times} {kind} of what is no parameter, {sent / 1e6:.1f} MB a device and step; the largest of {shape} over "
            f"{largest.group} devices{place}"
        )
    return warnings


def _explained(collective: Collective, parameters: set[tuple[int, ...]], tensor: bool) -> bool:
    large = [array for array in collective.arrays if array.bytes >= SMALL]
    if collective.kind == "all-reduce" and tensor:
        return True
    if collective.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
        return not large
    return all(_is_parameter(array, parameters) for array in large)


def _is_parameter(array: Array, parameters: set[tuple[int, ...]]) -> bool:
    sides = _sides(array.dims)
    if sides in parameters:
        return True
    # A reduce-scatter's result with its group in front, or gathered along one side.
    products = {tuple(sorted((*rest, a * b))) for a, b, rest in _pairs(sides)}
    return bool(products & parameters)


def _pairs(sides: tuple[int, ...]):
    for i in range(len(sides)):
        for j in range(i + 1, len(sides)):
            yield sides[i], sides[j], sides[:i] + sides[i + 1 : j] + sides[j + 1 :]
