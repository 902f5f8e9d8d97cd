"""What a compiled step says of itself: cycles, collectives with their bytes, custom calls; loops count as often as they run."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from jaxdistill.plan.hlo import Array, Instruction, Module, read_module, trip_count

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")
_CALLS = {"call": "to_apply", "async-start": "calls", "fusion": "calls"}


@dataclass(frozen=True)
class Collective:
    """One collective operation of one device, `times` a step."""

    kind: str
    arrays: tuple[Array, ...]  # whole: what was gathered, what is to be scattered
    group: int  # devices that take part together
    op_name: str
    times: int = 1

    @property
    def bytes(self) -> float:
        """Of its arrays, once."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, at the least that any algorithm needs (a ring's)."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.bytes * share * self.times


@dataclass
class Tally:
    """Of a computation and everything that it calls."""

    cycles: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # op_name -> the compiler's estimate
    collectives: list[Collective] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # custom call of an own kernel or a library -> runs
    # (operations, bytes, exponentials and the like) that kernels without cycles declare
    kernel_costs: list[tuple[float, float, float]] = field(default_factory=list)
    instructions: int = 0
    silent_kernels: int = 0  # runs of kernels that have neither cycles nor a declared cost
    unknown_loops: int = 0  # whose bodies are counted once

    def add(self, other: Tally, times: int = 1) -> None:
        for name, cycles in other.cycles.items():
            self.cycles[name] += cycles * times
        for name, runs in other.kernels.items():
            self.kernels[name] += runs * times
        self.collectives += [Collective(c.kind, c.arrays, c.group, c.op_name, c.times * times) for c in other.collectives]
        self.kernel_costs += [tuple(number * times for number in cost) for cost in other.kernel_costs]
        self.instructions += other.instructions * times
        self.silent_kernels += other.silent_kernels * times
        self.unknown_loops += other.unknown_loops

    @property
    def total_cycles(self) -> float:
        return sum(self.cycles.values())

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives)


def tally(text: str) -> Tally:
    """Reads `Compiled.as_text()`. Of a conditional the longer branch counts: the update, not the step that is skipped.

    Longer by cycles, bytes sent, instructions, the first of these in which they differ."""
    module = read_module(text)
    return _Reader(module).computation(module.entry)


class _Reader:
    def __init__(self, module: Module):
        self.module = module
        self.done: dict[str, Tally] = {}
        self.channels: set[str] = set()  # of collectives in fusions, where one that is overlapped stands in each of its pieces

    def computation(self, name: str) -> Tally:
        if name not in self.done:
            found, around = Tally(), self.module.computations[name]
            for instruction in around.values():
                self._count(instruction, around, found)
            self.done[name] = found
        return self.done[name]

    def _count(self, i: Instruction, around: dict[str, Instruction], found: Tally) -> None:
        found.instructions += 1
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
            found.cycles[i.op_name] += int(cycles[1])
        if i.opcode == "while":
            times = trip_count(self.module, i, around)
            found.unknown_loops += times is None
            found.add(self.computation(i.called("body")), 1 if times is None else times)
        elif i.opcode == "conditional":
            branches = [self.computation(name) for name in i.branches]
            found.add(max(branches, key=lambda branch: (branch.total_cycles, branch.sent, branch.instructions)))
        elif i.opcode == "fusion":
            self._fusion(i, found)
        elif i.opcode in _CALLS and (name := i.called(_CALLS[i.opcode])):
            found.add(self.computation(name))
        elif collective := self._collective(i):
            found.collectives.append(collective)
        elif i.opcode == "custom-call":
            self._custom_call(i, cycles is not None, found)

    def _fusion(self, i: Instruction, found: Tally) -> None:
        """Its cycles are its own; inside, only collectives and kernels count."""
        inner = self.module.computations[i.called("calls")]
        for instruction in inner.values():
            if instruction.opcode == "fusion":
                self._fusion(instruction, found)
            collective = self._collective(instruction)
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            if collective is None or (channel and channel[1] in self.channels):
                continue
            if channel:
                self.channels.add(channel[1])
            if "all-reduce-scatter" in i.called("calls"):  # a TPU's: each device keeps its piece of the sum
                collective = Collective("reduce-scatter", collective.arrays, collective.group, collective.op_name or i.op_name)
            found.collectives.append(collective)

    def _collective(self, i: Instruction) -> Collective | None:
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            return None
        arrays, group = i.arrays, 2 if kind == "collective-permute" else group_size(i.rest, self.module.num_devices)
        if i.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, contexts)
            arrays = [array for array in arrays if array.dims or array.dtype != "u32"]
            arrays = arrays[len(arrays) // 2 :]
        if kind == "reduce-scatter":
            arrays = [Array(array.dtype, (group, *array.dims)) for array in arrays]
        return Collective(kind, tuple(arrays), group, i.op_name)

    @staticmethod
    def _custom_call(i: Instruction, has_cycles: bool, found: Tally) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', i.rest)
        name = target[1] if target else ""
        if name != "tpu_custom_call" and not name.startswith("__"):  # the rest are marks that the compiler leaves for itself
            return
        kernel = re.search(r'"?kernel_name"?[:=]\s*"([^"]*)"', i.rest)
        found.kernels[kernel[1] if kernel else name] += 1
        if has_cycles:
            return
        cost = re.search(r'"cost_estimate":\{([^}]*)\}', i.rest)
        if cost is None:
            found.silent_kernels += 1
            return
        values = {key: float(value) for key, value in re.findall(r'"(\w+)":"?(\d+)', cost[1])}
        found.kernel_costs.append(tuple(values.get(name, 0.0) for name in ("flops", "bytes_accessed", "transcendentals")))


def group_size(attributes: str, num_devices: int) -> int:
    """Devices of one replica group, in any of the forms in which HLO writes them; all of them where none is named."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        # An axis may be named in part: 'axis_0':(1)2 is two of its devices.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return num_devices
