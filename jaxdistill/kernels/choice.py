"""Which implementation computes what: settled once for the devices of a run, by name where the config forces one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Kernels:
    """`platform` is that of the devices that the step is compiled for, which need not be here. The rest as in `KernelsConfig`.

    What "auto" means is said beside each kernel, by a function of platform and shape that `inspect` and `plan` ask as well.
    """

    platform: Platform = "cpu"
    attention: str = "auto"
    relations: str = "auto"
    logits: str = "auto"
    interpret: bool = False  # Pallas kernels run by the interpreter, on any device: for tests


ON_CPU = Kernels()  # plain attention, which every device computes
