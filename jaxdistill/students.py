"""Students: shapes by name, checks against the teacher, and their first parameters."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxdistill.config import StudentConfig
from jaxdistill.errors import InputError, nearest
from jaxdistill.models import EncoderConfig, init_params, layer_name
from jaxdistill.shapes import Array, Key

# layers, heads, hidden, feed-forward: udagawa2023 table 1.
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "6L-DistilBERT": (6, 12, 768, 3072),
    "6L": (6, 12, 384, 1536),
    "4L": (4, 12, 576, 768),
    "3L": (3, 12, 384, 1024),
}


def student_config(
    student: StudentConfig, teacher: EncoderConfig, *, dropout: float | None, where: str
) -> tuple[EncoderConfig, list[str]]:
    """The encoder of a student, and warnings about it.

    Vocabulary, positions and constants are the teacher's. Numbers that neither the shape's name nor the config gives:
    heads and hidden size of the teacher; its feed-forward size at equal width, else 4 x hidden.

    Raises:
      InputError: unknown name, no depth, heads that do not divide the hidden size.
    """
    if student.shape is not None and student.shape not in SHAPES:
        raise InputError(f"{where}.shape: unknown shape {student.shape!r}{nearest(student.shape, SHAPES)}; or give num_layers")
    names = ("num_layers", "num_heads", "hidden_size", "intermediate_size")
    sizes: dict[str, int | None] = dict(zip(names, SHAPES[student.shape], strict=True)) if student.shape else dict.fromkeys(names)
    sizes |= {name: getattr(student, name) for name in names if getattr(student, name) is not None}
    if sizes["num_layers"] is None:
        raise InputError(f"{where}: how deep? give shape ({', '.join(SHAPES)}) or num_layers")
    hidden = sizes["hidden_size"] or teacher.hidden_size
    heads = sizes["num_heads"] or teacher.num_heads
    inner = sizes["intermediate_size"] or (teacher.intermediate_size if hidden == teacher.hidden_size else 4 * hidden)
    if hidden % heads:
        fitting = [n for n in range(1, hidden + 1) if hidden % n == 0 and hidden // n >= 8]
        closest = sorted(sorted(fitting, key=lambda n: abs(n - heads))[:4])
        raise InputError(f"{where}: {heads} heads do not divide the hidden size {hidden}; num_heads {', '.join(map(str, closest))} would")
    warnings = []
    if hidden < teacher.hidden_size and inner == teacher.intermediate_size:
        warnings.append(f"{where}.intermediate_size: {inner} is the teacher's although the student is narrower; {4 * hidden} is usual")
    if sizes["num_layers"] > teacher.num_layers:
        warnings.append(f"{where}.num_layers: {sizes['num_layers']} is deeper than the teacher's {teacher.num_layers}")
    shape = {"num_layers": sizes["num_layers"], "num_heads": heads, "hidden_size": hidden, "intermediate_size": inner}
    rates = {} if dropout is None else {"hidden_dropout": dropout, "attention_dropout": dropout}
    return dataclasses.replace(teacher, **shape, **rates), warnings


def copied_layers(student: StudentConfig, config: EncoderConfig, teacher: EncoderConfig, where: str) -> tuple[int, ...] | None:
    """Teacher layers (1..L_T) that the student's blocks start from; None: all random.

    Raises:
      InputError: another width, a layer that the teacher lacks, or not one layer per block.
    """
    depth = config.num_layers
    if student.initialise == "random":
        return None
    if student.initialise in ("first_k", "every_k") and depth > teacher.num_layers:
        raise InputError(
            f"{where}.initialise: {student.initialise} needs a student no deeper than the teacher's {teacher.num_layers} layers"
        )
    if student.initialise == "first_k":
        layers = tuple(range(1, depth + 1))
    elif student.initialise == "every_k":
        layers = tuple(i * teacher.num_layers // depth for i in range(1, depth + 1))
    else:
        layers = student.initialise
    if len(layers) != depth:
        raise InputError(f"{where}.initialise: names {len(layers)} teacher layers for a student of {depth} blocks; name one for each")
    for layer in layers:
        if not 1 <= layer <= teacher.num_layers:
            raise InputError(f"{where}.initialise: teacher layer {layer} is out of range, the teacher has layers 1..{teacher.num_layers}")
    for field in ("hidden_size", "intermediate_size", "num_heads"):
        ours, theirs = getattr(config, field), getattr(teacher, field)
        if ours != theirs:
            raise InputError(
                f"{where}.initialise: copying teacher layers needs equal shapes: {field} is {ours}, the teacher's {theirs}; use random"
            )
    return layers


def student_key(seed: int, name: str) -> Key[Array, ""]:
    """Key of a student by its name, so that it starts and drops out alike whichever students run beside it."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def initial_params(config: EncoderConfig, key: Key[Array, ""], teacher_params: dict, layers: Sequence[int] | None) -> dict:
    """First parameters, float32; with `layers`, the teacher's embeddings and these blocks of its. Pure: call it under jit."""
    params = init_params(config, key)
    if layers is not None:
        params["embeddings"] = teacher_params["embeddings"]
        params["layers"] = {layer_name(i): teacher_params["layers"][layer_name(n)] for i, n in enumerate(layers, 1)}
    return params


def export_pooler(config: EncoderConfig, key: Key[Array, ""], teacher: EncoderConfig, teacher_params: dict) -> dict:
    """The pooler of an exported base model, without which transformers would invent one at every load.

    No loss here trains it: the teacher's when the widths are equal, else a random one that is the same at every export.
    """
    if "pooler" in teacher_params and teacher.hidden_size == config.hidden_size:
        return teacher_params["pooler"]
    return jax.tree.map(np.asarray, init_params(dataclasses.replace(config, num_layers=0, vocab_size=1), key, pooler=True)["pooler"])
