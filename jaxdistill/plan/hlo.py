"""Compiled HLO as text, read into instructions: shapes, called computations, trip counts of loops."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[suf]\d+|c\d+|f8\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = ")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        product = 1
        for size in self.dims:
            product *= size
        return product

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype)
        return self.elements * (int(re.search(r"\d+", self.dtype)[0]) if bits is None else bits) / 8


@dataclass(frozen=True)
class Instruction:
    name: str
    is_root: bool
    type: str  # of the result, as text
    opcode: str
    arguments: str  # what stands in its brackets: operands, or the value of a constant
    rest: str  # attributes after them

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def arrays(self) -> list[Array]:
        """Of the result, tuples flattened."""
        return [Array(dtype, tuple(int(size) for size in dims.split(",") if size)) for dtype, dims in _ARRAY.findall(self.type)]

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names: body, condition, calls, to_apply."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """Of a conditional."""
        if found := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        return [name for side in ("true", "false") if (name := self.called(f"{side}_computation"))]


@dataclass(frozen=True)
class Module:
    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_devices: int


def _balanced(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"brackets do not close in {text[start : start + 60]!r}")


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    end = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
    if not (call := re.match(r"\s*([\w-]+)\(", line[end:])):
        return None
    opening = end + call.end() - 1
    closing = _balanced(line, opening)
    return Instruction(head[2], bool(head[1]), line[start:end], call[1], line[opening + 1 : closing - 1], line[closing:])


def read_module(text: str) -> Module:
    """A module as `Compiled.as_text` prints it."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _HEADER.match(line)):
            current = computations[header[1]] = {}
            entry = header[1] if line.startswith("ENTRY") else entry
        elif found := _instruction(line):
            current[found.name] = found
    partitions = re.search(r"num_partitions=(\d+)", text[:10_000])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def trip_count(module: Module, loop: Instruction, around: dict[str, Instruction]) -> int | None:
    """How often a while loop runs: as the compiler says, or read from `i < limit` and i's start and step; None where neither tells.

    Args:
      around: the computation that the loop stands in.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (module.computations[loop.called(name)] for name in ("condition", "body"))
    compare = _unwrapped(module, next((i for i in condition.values() if i.is_root), None))
    if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.rest or len(compare.operands) != 2:
        return None
    counter, limit = compare.operands
    place = _tuple_place(condition, counter)
    end = _constant(condition, limit)
    initial = around.get(loop.operands[0])
    if end is None and (bound := _tuple_place(condition, limit)) is not None:
        end = _passed(around, initial, bound)
    start, step = _passed(around, initial, place), _step(module, body, place)
    if None in (end, start, step) or step < 1:
        return None
    return max(-((start - end) // step), 0)


def _constant(computation: dict[str, Instruction], name: str | None) -> int | None:
    found = computation.get(name) if name else None
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.get(found.operands[0])
    if found is None or found.opcode != "constant":
        return None
    return int(found.arguments) if re.fullmatch(r"-?\d+", found.arguments) else None


def _tuple_place(computation: dict[str, Instruction], name: str) -> int | None:
    found = computation.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.get(found.operands[0])
    index = re.search(r"index=(\d+)", found.rest) if found is not None and found.opcode == "get-tuple-element" else None
    return int(index[1]) if index else None


def _passed(around: dict[str, Instruction], initial: Instruction | None, place: int | None) -> int | None:
    """The constant that a loop starts with at this place of its tuple."""
    if initial is None or place is None or initial.opcode != "tuple":
        return None
    return _constant(around, initial.operands[place])


def _unwrapped(module: Module, found: Instruction | None) -> Instruction | None:
    """The one operation of a fusion that holds no other, as the CPU's compiler wraps them."""
    if found is None or found.opcode != "fusion":
        return found
    inner = module.computations[found.called("calls")]
    root = next(i for i in inner.values() if i.is_root)
    if any(inner[name].opcode != "parameter" for name in root.operands):
        return found
    arguments = ", ".join(f"%{found.operands[int(inner[name].arguments)]}" for name in root.operands)
    return replace(root, arguments=arguments)


def _step(module: Module, body: dict[str, Instruction], place: int | None) -> int | None:
    root = next((i for i in body.values() if i.is_root), None)
    if root is None or place is None or root.opcode != "tuple":
        return None
    added = body.get(root.operands[place])
    while added is not None and added.opcode in ("copy", "bitcast"):
        added = body.get(added.operands[0])
    added = _unwrapped(module, added)
    if added is None or added.opcode != "add":
        return None
    steps = [value for name in added.operands if (value := _constant(body, name)) is not None]
    return steps[0] if len(steps) == 1 else None
