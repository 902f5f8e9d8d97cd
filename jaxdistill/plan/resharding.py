"""Collectives that the shardings of parameters and batch do not ask for: somewhere arrays are laid out anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import jax

from jaxdistill.plan.hlo import Array
from jaxdistill.plan.program import Collective

SMALL = 2**16  # bytes: below it a collective costs its latency alone


def parameter_shapes(*trees, length: int) -> set[tuple[int, ...]]:
    """Shapes that parameters (ShapeDtypeStructs with shardings) have on a device and on the way to being whole, sides sorted.

    Of a position table also the rows that are used, as many as a row has slots (`length`).
    """
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        shard = leaf.sharding.shard_shape(leaf.shape)
        shapes = {*product(*({own, whole} for own, whole in zip(shard, leaf.shape, strict=True)))}
        if "position" in jax.tree_util.keystr(path):
            shapes |= {(length, *shape[1:]) for shape in shapes}
        found |= {_sides(shape) for shape in shapes}
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
        if collective.group > 1 and (unexplained := _unexplained(collective, parameters, tensor)):
            found[collective.kind].append(replace(collective, arrays=unexplained))
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


def _unexplained(collective: Collective, parameters: set[tuple[int, ...]], tensor: bool) -> tuple[Array, ...]:
    """Its arrays that nothing explains; one that is combined of several may hold parameters as well."""
    large = tuple(array for array in collective.arrays if array.bytes >= SMALL)
    if collective.kind == "all-reduce":
        if tensor:
            return ()
        large = tuple(array for array in large if len(array.dims) > 1)  # a GPU's compiler sums many gradients as one flat array
    if collective.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
        return large
    return tuple(array for array in large if not _is_parameter(array, parameters))


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
