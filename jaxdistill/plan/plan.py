"""A run on a topology: what its step needs, sends and takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from jaxdistill.plan.ahead import abstract_arguments, devices_of
from jaxdistill.plan.chips import usable_memory
from jaxdistill.plan.compiled import CompiledStep, DoesNotFitError, LargestBatch, compile_run, largest_batch, rows_per_device, with_rows
from jaxdistill.plan.estimate import Roofline, abstract_mesh, roofline
from jaxdistill.plan.resharding import parameter_shapes, resharded
from jaxdistill.plan.tables import (
    batch_line,
    collective_table,
    cost_table,
    cycle_table,
    heading,
    kernel_table,
    memory_table,
    scaling_line,
    throughput_table,
)
from jaxdistill.plan.topology import Topology, missing_compiler
from jaxdistill.resolve import Run


@dataclass(frozen=True)
class Plan:
    run: Run
    topology: Topology
    best: Roofline
    compiled: CompiledStep | None  # None: by formula alone, and `notes` says why
    largest: LargestBatch | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_run(
    run: Run,
    topology: Topology,
    *,
    compile_step: bool = True,
    search_batch: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Of a run that was resolved for the devices of this topology; compiles its step where the compiler is installed.

    Args:
      search_batch: also find the largest batch that fits, by compiling a few more sizes.
      tell: gets a line before each compilation, which may take minutes.
    """
    chip = topology.chip
    if not compile_step:
        return Plan(run, topology, roofline(run, chip), None, None, ("by formula alone, as asked for",), run.warnings)
    if extra := missing_compiler(chip):
        note = f"by formula alone: pip install 'jaxdistill[{extra}]' compiles the real step for a {chip.name}, which needs no {chip.name}"
        return Plan(run, topology, roofline(run, chip), None, None, (note,), run.warnings)
    devices = devices_of(topology)
    steps: dict[int, CompiledStep] = {}
    notes, refused = [], {}

    def need(rows: int) -> float | None:
        tell(f"compiling the step for {topology.name}, {rows} rows a device ...")
        try:
            steps[rows] = compile_run(with_rows(run, rows), devices)
        except DoesNotFitError as error:
            refused[rows] = str(error)
            return None
        return steps[rows].memory.total

    own = rows_per_device(run)
    if search_batch:
        largest = largest_batch(need, own, usable_memory(chip))
    else:
        largest = None
        need(own)
    compiled = steps.get(own)
    if compiled is None:
        return Plan(
            run, topology, roofline(run, chip), None, largest, (), (*run.warnings, f"{own} rows a device do not fit: {refused[own]}")
        )
    notes.append(f"compiled in {compiled.seconds:.0f} s" + (f", {len(steps) + len(refused)} sizes in all" if search_batch else ""))
    best = roofline(run, chip, sent=compiled.program.sent)
    return Plan(run, topology, best, compiled, largest, tuple(notes), (*run.warnings, *_warnings(run, topology, compiled)))


def _warnings(run: Run, topology: Topology, compiled: CompiledStep) -> list[str]:
    chip, program = topology.chip, compiled.program
    usable, needed = usable_memory(chip), compiled.memory.total
    found = []
    if needed > usable:
        found.append(f"the step needs {needed / 1e9:.1f} GB, over the {usable / 1e9:.1f} GB that a {chip.name} gives it")
    state, teacher, _ = abstract_arguments(run, abstract_mesh(run))
    trained = [student.trained for student in state.students.values()]
    shapes = parameter_shapes(trained, teacher, length=run.config.data.sequence_length)
    found += resharded(program.collectives, shapes, tensor=run.mesh["tensor"] > 1)
    if program.unknown_loops:
        found.append(f"{program.unknown_loops} loops of unknown length are counted once")
    if chip.platform == "tpu" and (silent := program.silent_kernels):
        found.append(f"{silent} calls of custom kernels declare no cost: they count as nothing in the compiler's estimate")
    return found


def show_plan(plan: Plan) -> Group:
    """Everything that `jaxdistill plan` prints of one run."""
    run, chip, compiled = plan.run, plan.topology.chip, plan.compiled
    parts = [Text(f"\n{heading(run, plan.topology)}", style="bold"), *(Text(note) for note in plan.notes)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    parts += [memory_table(run, chip, compiled), cost_table(run, chip, plan.best, compiled)]
    if compiled is not None:
        parts.append(collective_table(chip, compiled.program))
        if line := scaling_line(run, chip, plan.best, compiled):
            parts.append(Text(line))
        if compiled.program.total_cycles:
            parts.append(cycle_table(chip, compiled.program))
    parts += [throughput_table(run, chip, plan.best, compiled), kernel_table(run, compiled and compiled.program)]
    if plan.largest is not None:
        parts.append(Text(batch_line(run, plan.largest, chip)))
    return Group(*parts)
