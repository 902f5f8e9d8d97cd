"""The dry run: what a config would do and cost, without reading its text."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxdistill.features import deepest_layer
from jaxdistill.flops import forward_flops_per_token, step_flops_per_token
from jaxdistill.models import EncoderConfig, init_params
from jaxdistill.report import summary_table
from jaxdistill.resolve import Run
from jaxdistill.sharding import AXES, partition_spec
from jaxdistill.students import describe_initialisation


def inspection(run: Run) -> Group:
    """Everything that `jaxdistill inspect` prints after the resolved config."""
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in run.warnings]
    title = [Text(f"\nStage {run.stage}", style="bold")] if run.stage else []
    return Group(*title, *warnings, parameter_table(run), layer_table(run), sharding_table(run), cost_table(run))


def _abstract_params(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * _size(shape[1:]) if shape else 1


def parameter_table(run: Run) -> Table:
    """Shape and parameters of the teacher and of every student, in millions."""
    models = [("teacher", run.teacher), *((student.name, student.config) for student in run.students)]
    rows = []
    for name, config in models:
        groups: dict[str, int] = defaultdict(int)
        for path, shape in _abstract_params(config).items():
            groups[path.split("/")[0]] += _size(shape)
        shape = f"{config.num_layers} x {config.hidden_size}, {config.num_heads} heads, ffn {config.intermediate_size}"
        total = sum(groups.values())
        numbers = (groups["embeddings"], groups["layers"] // config.num_layers, total)
        rows.append((name, shape, *(f"{number / 1e6:.2f}" for number in numbers)))
    return summary_table(rows, ("model", "layers x hidden", "embeddings (M)", "a block (M)", "all (M)"), "Parameters")


def layer_table(run: Run) -> Table:
    """Which layers are compared, and where the students start from."""
    rows = []
    for student in run.students:
        start = describe_initialisation(run.config.students[student.name], run.copied[student.name])
        for term in student.terms:
            parts = {part.name.split("/")[1]: f"{part.weight:.3g}" for part in term.parts if "/" in part.name and part.weight != 1.0}
            weights = " ".join([str(term.weight), *(f"{name} {weight}" for name, weight in parts.items())])
            rows.append((student.name, start, student.input, term.name, term.layers, weights))
    columns = ("student", "starts from", "text", "term", "layers (student<-teacher)", "weight")
    depths = ", ".join(f"on {name} text to layer {deepest_layer(features)}" for name, features in run.teacher_passes.items())
    return summary_table(rows, columns, f"Layer map; the teacher runs {depths}")


def sharding_table(run: Run) -> Table:
    """How the parameters of each student lie on the mesh; the optimizer state lies alike."""
    mesh = AbstractMesh(tuple(run.mesh[axis] for axis in AXES), AXES)
    rows = []
    for student in run.students:
        groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        for path, shape in _abstract_params(student.config).items():
            spec = partition_spec(path, shape, mesh)
            name = "/".join(part for part in path.split("/") if not part.isdigit())
            pieces = _size(tuple(mesh.shape[axis] for axis in spec if axis))
            groups[name, _show(spec, mesh)][0] += 1
            groups[name, _show(spec, mesh)][1] += _size(shape) * 4 / pieces / 1e6
        rows += [(student.name, path, spec, count, f"{megabytes:.2f}") for (path, spec), (count, megabytes) in groups.items()]
    shape = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items())
    return summary_table(rows, ("student", "parameter", "split over", "arrays", "MB on a device"), f"Shardings on {shape}")


def _show(spec: PartitionSpec, mesh: AbstractMesh) -> str:
    axes = [axis if axis and mesh.shape[axis] > 1 else "-" for axis in spec]
    return " x ".join(axes) if set(axes) - {"-"} else "whole"


def cost_table(run: Run) -> Table:
    """Tokens and floating-point operations of a step and of the run, and the arrays that stay on the devices."""
    config, length = run.config, run.config.data.sequence_length
    tokens = config.training.batch_size * length
    passes = run.teacher_passes
    names = {name: f"teacher, {name} text" if len(passes) > 1 else "teacher" for name in passes}
    costs = [(names[name], forward_flops_per_token(run.teacher, length, features)) for name, features in passes.items()]
    costs += [(student.name, step_flops_per_token(student, length)) for student in run.students]
    total = sum(cost for _, cost in costs)
    rows = [(name, f"{cost / 1e6:.1f}", f"{cost * tokens / 1e12:.3f}", f"{100 * cost / total:.0f} %") for name, cost in costs]
    rows.append(("all", f"{total / 1e6:.1f}", f"{total * tokens / 1e12:.3f}", "100 %"))
    steps = config.training.steps
    whole = f"{tokens:,} tokens a step, {tokens * steps:,} in {steps:,} steps, {total * tokens * steps / 1e12:,.4g} TFLOP"
    return summary_table(rows, ("part", "MFLOP a token", "TFLOP a step", "share"), f"Cost: {whole}")
