"""The step as its compiler sees it: memory, bytes, the program; and the largest batch that fits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax

from jaxdistill.plan.ahead import compile_ahead
from jaxdistill.plan.estimate import argument_bytes
from jaxdistill.plan.program import Tally, tally
from jaxdistill.resolve import Run
from jaxdistill.sharding import AXES


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while a step runs."""

    arguments: float
    temporaries: float
    results: float  # that do not take the place of an argument
    code: float

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.results + self.code


@dataclass(frozen=True)
class CompiledStep:
    memory: Memory
    accessed: float | None  # bytes of the memory's traffic; of loops once around; None where the compiler does not say
    program: Tally
    seconds: float  # that the compilation took


class DoesNotFitError(Exception):
    """The compiler finds no place for the step in the device's memory; says how much it would need, where it knows."""


def compile_run(run: Run, devices: Sequence) -> CompiledStep:
    """Compiles the step of a run for these devices.

    Raises:
      DoesNotFitError: its temporaries exceed the memory of a device.
    """
    start = time.perf_counter()
    try:
        compiled = compile_ahead(run, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error).lower():  # fewer rows would not mend a kernel that is too large
            raise
        raise DoesNotFitError(_first_sentence(str(error))) from None
    seconds = time.perf_counter() - start
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    results = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    # What the program does not read of its arguments is no argument of it, and stays on the devices all the same.
    arguments = max(stats.argument_size_in_bytes, sum(argument_bytes(run).values()))
    memory = Memory(arguments, stats.temp_size_in_bytes, results, stats.generated_code_size_in_bytes)
    return CompiledStep(memory, cost.get("bytes accessed"), tally(compiled.as_text()), seconds)


def _first_sentence(message: str) -> str:
    return re.split(r"(?<=[.)])\s", message.removeprefix("RESOURCE_EXHAUSTED: ").strip())[0]


def rows_per_device(run: Run) -> int:
    """Rows of one micro-batch on one device (with a tensor axis: on each of its devices)."""
    return run.config.training.batch_size // _pieces(run)


def _pieces(run: Run) -> int:
    return run.config.training.micro_batches * run.mesh[AXES[0]] * run.mesh[AXES[1]]


def with_rows(run: Run, rows: int) -> Run:
    """The run with so many rows on a device in each micro-batch."""
    training = run.config.training.model_copy(update={"batch_size": rows * _pieces(run)})
    return replace(run, config=run.config.model_copy(update={"training": training}))


@dataclass(frozen=True)
class LargestBatch:
    """`rows` of a micro-batch fit on one device; `tried` says which were compiled, and the bytes each needs (None: did not fit)."""

    rows: int | None
    tried: dict[int, float | None]


def largest_batch(need: Callable[[int], float | None], rows: int, capacity: float, *, attempts: int = 4) -> LargestBatch:
    """The most rows that fit: a line through two sizes says how many, and so many are compiled to be sure.

    Args:
      need: rows -> bytes of one device, or None where they do not fit; called once for each size.
      rows: to begin with.
      attempts: sizes to compile after the first two. Each is at most 16 times what is known to fit, since a line through small
        batches sees little of what grows; and smaller than what did not fit.
    """
    tried: dict[int, float | None] = {}

    def fits(n: int) -> bool:
        if n not in tried:
            tried[n] = need(n)
        return tried[n] is not None and tried[n] <= capacity

    small = rows
    while not fits(small) and small > 1:
        small = max(small // 4, 1)
    if not fits(small):
        return LargestBatch(None, tried)
    fits(2 * small if small == 1 else small // 2)
    for _ in range(attempts):
        largest, refused = max(n for n in tried if fits(n)), min((n for n in tried if not fits(n)), default=None)
        guess = _on_the_line(tried, capacity, farthest=16 * largest)
        if refused is not None:  # one whose size is known bends the line; else a step back
            guess = min(guess, _rounded(refused - 1 if tried[refused] is not None else refused * 15 // 16))
        if guess <= largest or (fits(guess) and guess < 16 * largest):
            break
    return LargestBatch(max(n for n in tried if fits(n)), tried)


def _on_the_line(tried: dict[int, float | None], capacity: float, *, farthest: int) -> int:
    """Where the line through the two largest sizes that were compiled meets the capacity, but no farther away."""
    (few, low), (many, high) = sorted((n, size) for n, size in tried.items() if size is not None)[-2:]
    if high <= low:  # what does not grow with the batch hides what does
        return farthest
    return min(_rounded(int(many + (capacity - high) * (many - few) / (high - low))), farthest)


def _rounded(rows: int) -> int:
    return rows // 8 * 8 if rows >= 8 else max(rows, 1)
