"""The dry run: what a config would do and cost, without reading its text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxdistill.data import TokenStore, language_shares
from jaxdistill.features import deepest_layer
from jaxdistill.models import EncoderConfig, init_params
from jaxdistill.objective import initial_projections
from jaxdistill.plan import argument_bytes, chips_table, flops_per_token, kernel_table, memory_table, tokens_per_step
from jaxdistill.report import summary_table
from jaxdistill.resolve import Run
from jaxdistill.sharding import AXES, partition_spec
from jaxdistill.students import describe_initialisation
from jaxdistill.update import Student
from jaxdistill.urls import is_url


def inspection(run: Run) -> Group:
    """Everything that `jaxdistill inspect` prints after the resolved config."""
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in run.warnings]
    title = [Text(f"\nStage {run.stage}", style="bold")] if run.stage else []
    tables = (parameter_table(run), layer_table(run), sharding_table(run), cost_table(run))
    held = argument_bytes(run)
    in_bfloat16 = argument_bytes(replace(run, settings=replace(run.settings, dtype="bfloat16")))
    if run.settings.languages and not run.config.data.streaming:
        # Shares are of rows, and these are known once the text is prepared.
        tables += (language_table(run, TokenStore(run.store)) if _prepared(run) else Text("languages: shares are known after `prepare`"),)
    return Group(*title, *warnings, *tables, kernel_table(run), memory_table(run, held=held), chips_table(run, in_bfloat16))


def _prepared(run: Run) -> bool:
    return not is_url(run.store) and (Path(run.store) / "manifest.json").is_file()


def _paths(tree) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


@cache
def _abstract_params(config: EncoderConfig, **heads: bool) -> dict[str, tuple[int, ...]]:
    return _paths(jax.eval_shape(partial(init_params, config, **heads), jax.random.key(0)))


def _abstract_model(student: Student) -> dict[str, tuple[int, ...]]:
    return _abstract_params(student.config, mlm=student.has_mlm_head, classifier=student.has_classifier)


def _abstract_trained(student: Student) -> dict[str, tuple[int, ...]]:
    """Of everything that the optimizer trains: encoder, heads, projections."""
    projections = jax.eval_shape(partial(initial_projections, student.terms), jax.random.key(0))
    return _abstract_model(student) | {f"projections/{k}": v for k, v in _paths(projections).items()}


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * _size(shape[1:]) if shape else 1


def parameter_table(run: Run) -> Table:
    """Shape and parameters of the teacher and of every student, in millions."""
    models = [("teacher", run.teacher, _abstract_params(run.teacher))]
    models += [(student.name, student.config, _abstract_trained(student)) for student in run.students]
    rows = []
    for name, config, params in models:
        groups: dict[str, int] = defaultdict(int)
        for path, shape in params.items():
            groups[path.split("/")[0]] += _size(shape)
        shape = f"{config.num_layers} x {config.hidden_size}, {config.num_heads} heads, ffn {config.intermediate_size}"
        encoder = groups["embeddings"] + groups["layers"]
        heads = groups["mlm"] + groups["pooler"] + groups["classifier"]
        numbers = (groups["embeddings"], groups["layers"] // config.num_layers, encoder, heads, groups["projections"])
        rows.append((name, shape, *(f"{number / 1e6:.2f}" if number else "-" for number in numbers)))
    columns = ("model", "layers x hidden", "embeddings (M)", "a block (M)", "encoder (M)", "head (M)", "projections (M)")
    return summary_table(rows, columns, "Parameters; projections are trained and not exported")


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
    """How what is trained lies on the mesh, students of one shape together; the optimizer state lies alike."""
    mesh = AbstractMesh(tuple(run.mesh[axis] for axis in AXES), AXES)
    shapes: dict[tuple, list[str]] = defaultdict(list)
    for student in run.students:
        shapes[tuple(_abstract_model(student).items())].append(student.name)
    rows = []
    for params, names in shapes.items():
        title = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
        for path, shape in params:
            spec = partition_spec(path, shape, mesh)
            name = "/".join(part for part in path.split("/") if not part.isdigit())
            pieces = _size(tuple(mesh.shape[axis] for axis in spec if axis))
            groups[name, _show(spec, mesh)][0] += 1
            groups[name, _show(spec, mesh)][1] += _size(shape) * 4 / pieces / 1e6
        rows += [(title, path, spec, count, f"{megabytes:.2f}") for (path, spec), (count, megabytes) in groups.items()]
    for student in run.students:
        if projections := [shape for path, shape in _abstract_trained(student).items() if path.startswith("projections/")]:
            rows.append((student.name, "projections", "whole", len(projections), f"{sum(map(_size, projections)) * 4 / 1e6:.2f}"))
    shape = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items())
    return summary_table(rows, ("students", "parameter", "split over", "arrays", "MB on a device"), f"Shardings on {shape}")


def _show(spec: PartitionSpec, mesh: AbstractMesh) -> str:
    axes = [axis if axis and mesh.shape[axis] > 1 else "-" for axis in spec]
    return " x ".join(axes) if set(axes) - {"-"} else "whole"


def language_table(run: Run, store: TokenStore) -> Table:
    """What each language has in the text, what the run draws of it, and how often it reads it."""
    training, found = run.config.training, language_shares(run.config.data, store.source_rows("train"))
    total = sum(language.rows for language in found)
    epochs = training.steps * training.batch_size / total
    rows = [
        (
            each.name, f"{each.rows:,}", f"{100 * each.rows / total:.2f} %", f"{100 * each.drawn / total:.2f} %",
            f"{epochs * each.drawn / each.rows:.3g}" if each.rows else "-",
        )
        for each in found
    ]  # fmt: skip
    return summary_table(rows, ("language", "rows to train on", "of the text", "of the run", "epochs"), "Languages")


def cost_table(run: Run) -> Table:
    """Tokens and floating-point operations of a step and of the run."""
    tokens, costs, steps = tokens_per_step(run), flops_per_token(run), run.config.training.steps
    total = sum(costs.values())
    rows = [(name, f"{cost / 1e6:.1f}", f"{cost * tokens / 1e12:.3f}", f"{100 * cost / total:.0f} %") for name, cost in costs.items()]
    rows.append(("all", f"{total / 1e6:.1f}", f"{total * tokens / 1e12:.3f}", "100 %"))
    whole = f"{tokens:,} tokens a step, {tokens * steps:,} in {steps:,} steps, {total * tokens * steps / 1e12:,.4g} TFLOP"
    return summary_table(rows, ("part", "MFLOP a token", "TFLOP a step", "share"), f"Cost: {whole}")
