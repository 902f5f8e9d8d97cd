"""Names of what a run is planned for: v5e:4x4, v5p:4x4x4, h200x8."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec

from jaxdistill.errors import InputError, nearest
from jaxdistill.plan.chips import ALIASES, CHIPS, Chip


@dataclass(frozen=True)
class Topology:
    """So many chips of one kind; of TPUs in the shape of their torus, GPUs in one row."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.chip.name}:{shape}" if self.chip.platform == "tpu" else f"{self.chip.name}x{shape}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices_per_chip


def parse_topology(name: str) -> Topology:
    """`chip:AxB` or `chip:AxBxC` for TPUs, `chip` or `chipxN` for GPUs.

    Raises:
      InputError: an unknown chip, or a shape that is not that of its torus; names what would be right.
    """
    found = re.fullmatch(r"([a-z0-9-]+?)(?::(\d+(?:x\d+)*)|x(\d+))?", name.strip().lower())
    chip = CHIPS.get(ALIASES.get(found[1], found[1])) if found else None
    if chip is None:
        raise InputError(f"--topology: unknown chip in {name!r}{nearest(found[1] if found else name, CHIPS)}")
    shape = tuple(int(size) for size in (found[2] or found[3] or "1").split("x"))
    right = f"{chip.name}x8" if chip.platform == "gpu" else f"{chip.name}:{'x'.join('4' * chip.dimensions)}"
    if chip.platform == "gpu" and (found[2] or 0 in shape):
        raise InputError(f"--topology: {name!r}: of GPUs say how many, as in {right}")
    if chip.platform == "tpu" and (found[2] is None or len(shape) != chip.dimensions or 0 in shape):
        raise InputError(f"--topology: {name!r}: a {chip.name} is a torus of {chip.dimensions} dimensions, as in {right}")
    if chip.platform == "tpu" and math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2):
        raise InputError(f"--topology: {name!r}: a host has 2 x 2 chips, so the first two sides are even, as in {right}")
    return Topology(chip, shape)


def missing_compiler(chip: Chip) -> str | None:
    """The extra that installs the compiler for this chip, where it is not installed."""
    if chip.platform == "tpu":
        return None if find_spec("libtpu") else "tpu"
    return None if find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13") else "cuda13"
