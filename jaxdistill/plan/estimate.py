"""By formula: operations, bytes and memory of a device, and the least time that its chip allows for them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import jax
from jax.sharding import AbstractMesh

from jaxdistill.features import deepest_layer
from jaxdistill.flops import forward_flops_per_token, step_flops_per_token
from jaxdistill.plan.ahead import abstract_batch, abstract_students, abstract_teacher
from jaxdistill.plan.chips import Chip
from jaxdistill.resolve import Run
from jaxdistill.sharding import AXES
from jaxdistill.update import Student


def flops_per_token(run: Run) -> dict[str, int]:
    """Teacher (once for each kind of text) and students -> operations for one token of a training step."""
    length, passes = run.config.data.sequence_length, run.teacher_passes
    names = {name: f"teacher, {name} text" if len(passes) > 1 else "teacher" for name in passes}
    costs = {names[name]: forward_flops_per_token(run.teacher, length, features) for name, features in passes.items()}
    return costs | {student.name: step_flops_per_token(student, length) for student in run.students}


def tokens_per_step(run: Run) -> int:
    """Slots of the global batch, padding included."""
    return run.config.training.batch_size * run.config.data.sequence_length


def device_bytes(tree) -> int:
    """Bytes of a tree of ShapeDtypeStructs with shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def abstract_mesh(run: Run) -> AbstractMesh:
    return AbstractMesh(tuple(run.mesh[axis] for axis in AXES), AXES)


def argument_bytes(run: Run) -> dict[str, int]:
    """What stays on a device between steps, and the batch: name -> bytes of one device."""
    # Students that hold the same arrays are laid out once: a grid has a hundred.
    alike: dict[tuple, list[Student]] = defaultdict(list)
    for student in run.students:
        alike[_arrays_of(student)].append(student)
    few = replace(run, students=tuple(students[0] for students in alike.values()))
    mesh = abstract_mesh(run)
    state, teacher, batch = abstract_students(few, mesh), abstract_teacher(run, mesh), abstract_batch(run, mesh)
    held = [(state.students[students[0].name], len(students)) for students in alike.values()]
    losses = sum(number * device_bytes((s.failures, s.loss_means, s.losses_seen)) for s, number in held)
    return {
        "students' parameters": sum(number * device_bytes(s.trained) for s, number in held),
        "optimizer": sum(number * device_bytes(s.optimizer) for s, number in held),
        "memory banks": sum(number * device_bytes(s.memory) for s, number in held),
        "teacher": device_bytes(teacher),
        "batch": device_bytes(batch) + device_bytes(state.step) + losses,
    }


def _arrays_of(student: Student) -> tuple:
    """What the shapes of a student's state depend on; Adam's moments are as the parameters."""
    terms = tuple((t.name, t.memory_bank, tuple((p.key, p.projections) for p in t.parts)) for t in student.terms)
    return student.config, student.has_mlm_head, student.has_classifier, terms


def peak_flops(chip: Chip, dtype: str) -> float:
    """Operations per second: float32 takes six bfloat16 products on a TPU, and the ordinary units of a GPU."""
    if dtype != "float32":
        return chip.flops
    if chip.platform == "tpu":
        return chip.flops / 6
    parts = chip.multiprocessors
    return 2.0 * parts.count * parts.lanes * chip.clock


def state_traffic(run: Run, held: dict[str, int] | None = None) -> int:
    """Bytes of one device's memory for parameters, optimizer and teacher in a step; activations come on top.

    Parameters are read forward and backward, gradients written and read, parameters and optimizer read and written by the
    update; the teacher is read once for each micro-batch and kind of text.
    """
    found, micro = held or argument_bytes(run), run.config.training.micro_batches
    own, optimizer = found["students' parameters"], found["optimizer"]
    return (2 * micro + 4) * own + 2 * optimizer + micro * len(run.teacher_passes) * found["teacher"]


def interconnect_traffic(run: Run, held: dict[str, int] | None = None) -> float:
    """Bytes that one device sends in a step if nothing is resharded.

    Over data: the gradients' all-reduce. Over fsdp: parameters gathered forward and backward, gradients scattered, the teacher's
    gathered once. Over tensor: two all-reduces of a block's activations forward, two backward; the teacher's two.
    """
    found, micro, mesh = held or argument_bytes(run), run.config.training.micro_batches, run.mesh
    own, teacher = found["students' parameters"], found["teacher"]
    data, fsdp, tensor = (mesh[axis] for axis in AXES)
    sent = 2 * own * (data - 1) / data
    # A device holds 1/fsdp of it, and gets the rest.
    sent += (fsdp - 1) * (3 * own + teacher * len(run.teacher_passes)) * micro
    width = 2 if run.config.training.precision == "bfloat16" else 4
    tokens = tokens_per_step(run) / (data * fsdp)
    blocks = sum(4 * student.config.num_layers * student.config.hidden_size for student in run.students)
    blocks += sum(2 * deepest_layer(features) * run.teacher.hidden_size for features in run.teacher_passes.values())
    return sent + 2 * (tensor - 1) / tensor * tokens * blocks * width


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step that each limit of a device allows; they may overlap, so the longest bounds the step."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(run: Run, chip: Chip, *, sent: float | None = None, dtype: str | None = None, held: dict[str, int] | None = None) -> Roofline:
    """At best, on one device: of its memory's traffic only what no program can do without.

    Args:
      sent: bytes of a step to other chips, where a compiled program says; default: by formula.
      dtype: of the matrix products; default: the run's.
      held: its `argument_bytes`, where they are known already.
    """
    devices = math.prod(run.mesh.values())
    flops = sum(flops_per_token(run).values()) * tokens_per_step(run) / devices
    held = held or argument_bytes(run)
    over = interconnect_traffic(run, held) if sent is None else sent
    peak = peak_flops(chip, dtype or run.config.training.precision)
    return Roofline(flops / peak, state_traffic(run, held) / chip.bandwidth, over / chip.interconnect)


def hours(run: Run, seconds: float) -> float:
    """Of all its steps, evaluation and checkpoints left out."""
    return run.config.training.steps * seconds / 3600
