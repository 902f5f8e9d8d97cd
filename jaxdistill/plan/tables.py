"""A plan as tables."""

from __future__ import annotations

import math
from collections import defaultdict

from rich.table import Table

from jaxdistill.implementations import chosen
from jaxdistill.plan.chips import CHIPS, Chip, usable_memory
from jaxdistill.plan.compiled import CompiledStep, LargestBatch, rows_per_device
from jaxdistill.plan.estimate import (
    Roofline,
    argument_bytes,
    flops_per_token,
    hours,
    interconnect_traffic,
    roofline,
    state_traffic,
    tokens_per_step,
)
from jaxdistill.plan.program import Tally
from jaxdistill.plan.topology import Topology
from jaxdistill.report import summary_table
from jaxdistill.resolve import Run

INSPECTED = ("v5e", "v6e", "v5p", "a100", "h100", "h200")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def memory_table(run: Run, chip: Chip | None = None, compiled: CompiledStep | None = None, *, held: dict[str, int] | None = None) -> Table:
    """Bytes of one device: by formula what stays there, from the compiler what a step needs beside it."""
    found = held or argument_bytes(run)
    total = sum(found.values())
    rows = [(name, _gigabytes(size), "-") for name, size in found.items() if size]
    rows.append(("arguments of the step, together", _gigabytes(total), "-" if compiled is None else _gigabytes(compiled.memory.arguments)))
    if compiled is not None:
        memory = compiled.memory
        parts = {"temporaries": memory.temporaries, "results not in their place": memory.results, "program": memory.code}
        rows += [(name, "-", _gigabytes(size)) for name, size in parts.items() if size >= 5e5]
        total = memory.total
        rows.append(("all", "-", _gigabytes(total)))
    title = "Memory of a device (GB)"
    if chip is not None:
        usable = usable_memory(chip)
        default = f", {usable / 1e9:.1f} of them JAX's by default" if usable < chip.memory else ""
        title += f": {100 * total / usable:.1f} % of a {chip.name} with {chip.memory / 1e9:.1f} GB{default}"
    columns = ("what", "by formula", "compiled")
    if compiled is None:  # temporaries are the compiler's to say
        rows, columns, title = [row[:2] for row in rows], columns[:2], f"{title}, without temporaries"
    return summary_table(rows, columns, title)


def cost_table(run: Run, chip: Chip, best: Roofline, compiled: CompiledStep | None) -> Table:
    """Operations and bytes for one token and in one step of a device, and the least time for each."""
    devices = math.prod(run.mesh.values())
    tokens = tokens_per_step(run) / devices
    flops = sum(flops_per_token(run).values()) * tokens
    traffic, sent, sent_source = state_traffic(run), interconnect_traffic(run), "by formula, if nothing is resharded"
    if compiled is not None:
        sent, sent_source = compiled.program.sent, "collectives of the program"
    weights = "weights and optimizer, by formula; activations come on top"
    rows = [
        ("operations", f"{flops / tokens / 1e6:,.1f} M", f"{flops / 1e12:.3f} T", _milliseconds(best.compute), "by formula"),
        ("memory", f"{traffic / tokens / 1e6:,.3f} MB", f"{traffic / 1e9:.2f} GB", _milliseconds(best.memory), weights),
        ("interconnect", f"{sent / tokens / 1e6:,.4f} MB", f"{sent / 1e9:.3f} GB", _milliseconds(best.interconnect), sent_source),
    ]
    if compiled is not None and compiled.accessed is not None:
        accessed = compiled.accessed
        values = (f"{accessed / tokens / 1e6:,.3f} MB", f"{accessed / 1e9:.2f} GB", _milliseconds(accessed / chip.bandwidth))
        source = "the compiler's count, on-chip copies too, bodies of loops once: no bound"
        rows.append(("bytes accessed", *values, source))
    title = f"Roofline of a {chip.name}: {_milliseconds(best.seconds)} ms a step, bound by {best.bound}"
    return summary_table(rows, ("limit", "a token", "a device and step", "ms", "source"), title)


def compiler_seconds(chip: Chip, program: Tally) -> float | None:
    """The compiler's cycles one after the other, and its kernels by the cost that they declare; None where it has none."""
    if not program.total_cycles or chip.clock is None or chip.platform != "tpu":
        return None
    exponentials = chip.clock * 8 * 128  # a second: of one register each cycle
    costs = program.kernel_costs
    declared = sum(max(flops / chip.flops, size / chip.bandwidth, others / exponentials) for flops, size, others in costs)
    return program.total_cycles / chip.clock + declared


def throughput_table(run: Run, chip: Chip, best: Roofline, compiled: CompiledStep | None) -> Table:
    """Tokens a second and hours of the run, at best and by the compiler's estimate (a GPU's: at half of the best)."""
    estimates = {"roofline": best.seconds}
    seconds = compiler_seconds(chip, compiled.program) if compiled else None
    if seconds is not None:
        estimates["compiler's cycles, then the collectives"] = seconds + best.interconnect
    else:
        estimates["half of the peak, or the roofline"] = max(2 * best.compute, best.seconds)
    devices, tokens = math.prod(run.mesh.values()), tokens_per_step(run)
    rows = []
    for name, step in estimates.items():
        rate = tokens / step
        values = (_milliseconds(step), f"{rate:,.0f}", f"{rate / devices:,.0f}", f"{100 * best.compute / step:.0f} %")
        rows.append((name, *values, _hours(hours(run, step))))
    columns = ("estimate", "step (ms)", "tokens/s", "a device", "of peak", "hours")
    steps, batch = run.config.training.steps, run.config.training.batch_size
    return summary_table(rows, columns, f"Time of {steps:,} steps of {batch:,} x {run.config.data.sequence_length} = {tokens:,} tokens")


def collective_table(chip: Chip, program: Tally) -> Table:
    """Collectives by kind and number of devices."""
    groups: dict[tuple[str, int], list] = defaultdict(lambda: [0, 0.0, 0.0])
    for c in program.collectives:
        if c.group > 1:
            group = groups[c.kind, c.group]
            group[0], group[1], group[2] = group[0] + c.times, group[1] + c.bytes * c.times, group[2] + c.sent
    rows = [
        (kind, group, times, f"{size / 1e6:.2f}", f"{sent / 1e6:.2f}", _milliseconds(sent / chip.interconnect))
        for (kind, group), (times, size, sent) in sorted(groups.items(), key=lambda item: -item[1][2])
    ]
    rows = rows or [("none", "-", "-", "-", "-", "-")]
    columns = ("collective", "over devices", "a step", "arrays (MB)", "sent by a device (MB)", "ms at full links")
    return summary_table(rows, columns, "Collectives of a step")


def scaling_line(run: Run, chip: Chip, best: Roofline, compiled: CompiledStep) -> str | None:
    """What the collectives leave of the speed of so many single devices; None where there is one."""
    devices = math.prod(run.mesh.values())
    if devices == 1:
        return None
    computing = compiler_seconds(chip, compiled.program) or 2 * best.compute
    apart, together = (computing / step for step in (computing + best.interconnect, max(computing, best.interconnect)))
    return (
        f"scaling: {100 * apart:.1f} % of {devices} single devices' speed with {_milliseconds(computing)} ms of computing and then "
        f"{_milliseconds(best.interconnect)} ms of collectives at full links, {100 * together:.1f} % where they overlap"
    )


def part_of(op_name: str) -> str:
    """Where in the step an instruction comes from, and whether it is a matrix product."""
    if "losses" in op_name:
        place = "losses"
    elif "/teacher/" in op_name or op_name.startswith("teacher"):
        place = "teacher"
    elif "update" in op_name:
        place = "update"
    elif "transpose(" in op_name:
        place = "students, backward"
    elif "jvp(" in op_name:
        place = "students, forward"
    else:
        return "rest (copies, fills)"
    return f"{place}: {'matrix products' if op_name.endswith(('dot_general', 'conv_general_dilated')) else 'other'}"


def cycle_table(chip: Chip, program: Tally) -> Table:
    """Where the compiler's cycles go; of kernels that have none, what they declare."""
    groups: dict[str, float] = defaultdict(float)
    for name, cycles in program.cycles.items():
        groups[part_of(name)] += cycles
    total = program.total_cycles
    rows = []
    for name, cycles in sorted(groups.items(), key=lambda item: -item[1]):
        time = _milliseconds(cycles / chip.clock) if chip.clock else "-"
        rows.append((name, f"{cycles / 1e6:.2f}", time, f"{100 * cycles / total:.0f} %"))
    time = _milliseconds(total / chip.clock) if chip.clock else "-"
    rows.append(("all", f"{total / 1e6:.2f}", time, "100 %"))
    where = f"at {chip.clock / 1e9:g} GHz" if chip.clock else f"(the clock of {chip.name} is not published: no times)"
    return summary_table(
        rows, ("part of the step", "M cycles", "ms", "share"), f"The compiler's own estimate, {where}; loops as often as they run"
    )


def kernel_table(run: Run, program: Tally | None = None) -> Table:
    """What `kernels` comes to, and the custom kernels that the program calls."""
    rows = [(field, said, _by_kernel(names)) for field, said, names in chosen(run.settings, run.config, run.students, run.mesh)]
    rows += [(f"in the program: {name}", "-", f"{runs} times a step") for name, runs in (program.kernels if program else {}).items()]
    return summary_table(rows, ("kernel", "config", "computed by"), f"Kernels on {run.settings.kernels.platform}")


def _by_kernel(names: dict[str, str]) -> str:
    """Kernel: who is computed by it; of many the first."""
    found: dict[str, list[str]] = defaultdict(list)
    for who, kernel in names.items():
        found[kernel].append(who)
    few = {kernel: ", ".join(who[:4]) + (f" and {len(who) - 4} more" if len(who) > 4 else "") for kernel, who in found.items()}
    return "; ".join(f"{kernel}: {who}" for kernel, who in few.items()) or "not used"


def batch_line(run: Run, found: LargestBatch, chip: Chip) -> str:
    """The largest batch in words, with what was compiled for it."""
    sizes = {rows: "does not fit" if size is None else f"{size / 1e9:.2f} GB" for rows, size in sorted(found.tried.items())}
    compiled = ", ".join(f"{rows} rows: {size}" for rows, size in sizes.items())
    if found.rows is None:
        return f"largest batch: not even one row fits ({compiled})"
    pieces = run.config.training.micro_batches
    whole = run.config.training.batch_size // rows_per_device(run) * found.rows
    return (
        f"largest batch: {found.rows} rows a device{' and micro-batch' if pieces > 1 else ''} fit the {usable_memory(chip) / 1e9:.1f} GB "
        f"of a {chip.name}: training.batch_size={whole} (a line through two sizes, then compiled; {compiled})"
    )


def chips_table(run: Run, held: dict[str, int]) -> Table:
    """The run on as many devices of common chips as its mesh has, at best: for `inspect`, where nothing is compiled."""
    rows = []
    for name in INSPECTED:
        chip = CHIPS[name]
        best = roofline(run, chip, dtype="bfloat16", held=held)
        half = max(2 * best.compute, best.seconds)
        times = (_milliseconds(best.seconds), best.bound, _hours(hours(run, best.seconds)), _hours(hours(run, half)))
        rows.append((name, f"{100 * sum(held.values()) / usable_memory(chip):.1f} %", *times))
    devices = math.prod(run.mesh.values())
    columns = ("chip", "memory for weights, optimizer", "step at best (ms)", "bound by", "hours at best", "hours at half the peak")
    title = f"On {devices} such device{'s' * (devices > 1)} in bfloat16, by formula; `jaxdistill plan` compiles the step"
    return summary_table(rows, columns, title)


def heading(run: Run, topology: Topology) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items())
    stage = f", stage {run.stage}" if run.stage else ""
    rows = f"{rows_per_device(run)} rows of {run.config.data.sequence_length} tokens a device"
    return f"Plan for {topology.name}{stage}: {topology.num_devices} devices as {mesh}; {rows}, {run.config.training.precision}"
