"""Students: shapes by name, checks against the teacher, and their first parameters."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.config import CheckpointConfig, PreviousStudent, StudentConfig
from jaxdistill.errors import InputError, nearest
from jaxdistill.models import EncoderConfig, init_params, label_order, layer_name
from jaxdistill.shapes import Array, Float, Key

# layers, heads, hidden, feed-forward; without a prefix udagawa2023, table 1.
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "6L-DistilBERT": (6, 12, 768, 3072),
    "6L": (6, 12, 384, 1536),
    "4L": (4, 12, 576, 768),
    "3L": (3, 12, 384, 1024),
    # wang2023, section 4: task-specific students of RoBERTa-base.
    "wang2023/3L": (3, 12, 768, 3072),
    # whatslost2023, of RoBERTa-base: one of its 12 layers, 12 heads and 768 hidden numbers is reduced (in the last, two). The
    # feed-forward of the narrow ones is not published: 4 x hidden here.
    "whatslost2023/3L": (3, 12, 768, 3072),
    "whatslost2023/6L": (6, 12, 768, 3072),
    "whatslost2023/9L": (9, 12, 768, 3072),
    "whatslost2023/4AH": (12, 4, 768, 3072),
    "whatslost2023/8AH": (12, 8, 768, 3072),
    "whatslost2023/384D": (12, 12, 384, 1536),
    "whatslost2023/516D": (12, 12, 516, 2064),
    "whatslost2023/6L_384D": (6, 12, 384, 1536),
}
# Of a teacher of 12 layers for a student of 6: DistilBERT's own choice (Sanh et al. 2019), 0, 2, 4, 7, 9, 11 counted from zero.
DISTILBERT = (1, 3, 5, 8, 10, 12)


def student_config(
    student: StudentConfig,
    teacher: EncoderConfig,
    *,
    dropout: float | None,
    attention_dropout: float | None = None,
    where: str,
    labels: tuple[str, ...] = (),
) -> tuple[EncoderConfig, list[str]]:
    """The encoder of a student, and warnings about it.

    Vocabulary, positions and constants are the teacher's. Numbers that neither the shape's name nor the config gives:
    heads and hidden size of the teacher; its feed-forward size at equal width, else 4 x hidden.

    Args:
      dropout, attention_dropout: rates; None: of attention as `dropout`, else the teacher's.
      labels: of the task that it learns, by name; it then has a classification head.

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
    of_attention = dropout if attention_dropout is None else attention_dropout
    said = {"hidden_dropout": dropout, "attention_dropout": of_attention}
    rates = {name: rate for name, rate in said.items() if rate is not None}
    return dataclasses.replace(teacher, labels=labels, **shape, **rates), warnings


def copied_layers(student: StudentConfig, config: EncoderConfig, teacher: EncoderConfig, where: str) -> tuple[int, ...] | None:
    """Teacher layers (1..L_T) that the student's blocks start from; None: they start at random or from a checkpoint.

    Raises:
      InputError: another width, a layer that the teacher lacks, or not one layer per block; `distilbert` of other depths;
        projected `embeddings` for a student that is not narrower or that does not start at random.
    """
    if student.embeddings != "random":
        _check_projection(student, config, teacher, where)
    if student.initialise == "random" or isinstance(student.initialise, (CheckpointConfig, PreviousStudent)):
        return None
    layers = _named_layers(student, config.num_layers, teacher.num_layers, where)
    for field in ("hidden_size", "intermediate_size", "num_heads"):
        ours, theirs = getattr(config, field), getattr(teacher, field)
        if ours != theirs:
            raise InputError(
                f"{where}.initialise: copying teacher layers needs equal shapes: {field} is {ours}, the teacher's {theirs}; use random"
            )
    return layers


def _named_layers(student: StudentConfig, depth: int, num_teacher: int, where: str) -> tuple[int, ...]:
    if student.initialise in ("first_k", "every_k") and depth > num_teacher:
        raise InputError(f"{where}.initialise: {student.initialise} needs a student no deeper than the teacher's {num_teacher} layers")
    if student.initialise == "first_k":
        layers = tuple(range(1, depth + 1))
    elif student.initialise == "every_k":
        layers = tuple(i * num_teacher // depth for i in range(1, depth + 1))
    elif student.initialise == "distilbert":
        if (depth, num_teacher) != (len(DISTILBERT), DISTILBERT[-1]):
            raise InputError(
                f"{where}.initialise: distilbert is teacher layers {', '.join(map(str, DISTILBERT))} for 6 layers of 12, "
                f"not for {depth} of {num_teacher}; use every_k"
            )
        layers = DISTILBERT
    else:
        layers = student.initialise
    if len(layers) != depth:
        raise InputError(f"{where}.initialise: names {len(layers)} teacher layers for a student of {depth} blocks; name one for each")
    for layer in layers:
        if not 1 <= layer <= num_teacher:
            raise InputError(f"{where}.initialise: teacher layer {layer} is out of range, the teacher has layers 1..{num_teacher}")
    return layers


def _check_projection(student: StudentConfig, config: EncoderConfig, teacher: EncoderConfig, where: str) -> None:
    ours, theirs = config.hidden_size, teacher.hidden_size
    if student.initialise != "random":
        raise InputError(
            f"{where}.embeddings: {student.embeddings} is for a student that starts at random, "
            "initialise already says where the embeddings come from; leave one of the two out"
        )
    if ours >= theirs:
        right = "initialise: first_k or every_k copies them" if ours == theirs else "random is what a wider one has"
        raise InputError(
            f"{where}.embeddings: {student.embeddings} is for a student narrower than the teacher's {theirs}, got {ours}; {right}"
        )


def check_checkpoint(config: EncoderConfig, other: EncoderConfig, where: str) -> None:
    """Whether a student can start from the parameters of `other`.

    Raises:
      InputError: another shape; names every difference, with both values.
    """
    fields = ("family", "num_layers", "num_heads", "hidden_size", "intermediate_size", "vocab_size")
    fields += ("max_position_embeddings", "type_vocab_size", "activation")
    pairs = [(field, getattr(other, field), getattr(config, field)) for field in fields]
    if different := [f"{field} is {theirs}, the student's {ours}" for field, theirs, ours in pairs if theirs != ours]:
        raise InputError(f"{where}.initialise: the checkpoint has another shape: {'; '.join(different)}")


def describe_initialisation(student: StudentConfig, layers: Sequence[int] | None, *, kept: float | None = None) -> str:
    """What the student starts from, in a short phrase; `kept`: the share that `projected_embeddings` returned."""
    start = student.initialise
    if isinstance(start, CheckpointConfig):
        return f"checkpoint {start.checkpoint}" + (f", student {start.student}" if start.student else "")
    if isinstance(start, PreviousStudent):
        return f"student {start.student} of the stage before"
    if layers is not None:
        return f"teacher layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    if student.embeddings != "random":
        share = "" if kept is None else f" ({100 * kept:.0f} % kept)"
        return f"{student.embeddings} of the teacher's embeddings{share}, blocks random"
    return "random"


def student_key(seed: int, name: str) -> Key[Array, ""]:
    """Key of a student by its name, so that it starts and drops out alike whichever students run beside it."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def projected_embeddings(teacher: dict, hidden_size: int, how: Literal["pca", "svd"]) -> tuple[dict, Float[Array, ""]]:
    """The teacher's word, position and token-type tables [n, Dt] at a student's width [n, Ds], and the share that is kept.

    `svd` projects onto the top right-singular vectors of the word table, which loses the least of its squared norm; `pca`
    takes the mean word off and projects onto the principal directions, which loses the least of the variance: the share is
    that of the norm or of the variance. The tables are added up, so they share the basis, and the mean leaves the words alone:
    every sum holds one word. Each direction's largest component is positive, which fixes its sign.

    Args:
      teacher: the "embeddings" of its parameters.
    """
    words = jnp.asarray(teacher["word"]["embedding"], jnp.float32)
    if how == "pca":
        words = words - words.mean(axis=0, keepdims=True)
    project = partial(jnp.matmul, precision="highest")  # the accelerators' own would leave three digits
    variances, directions = jnp.linalg.eigh(project(words.T, words))  # ascending
    basis = directions[:, ::-1][:, :hidden_size]
    largest = jnp.take_along_axis(basis, jnp.abs(basis).argmax(axis=0, keepdims=True), axis=0)
    basis = basis * jnp.sign(largest)
    tables = {name: project(jnp.asarray(teacher[name]["embedding"], jnp.float32), basis) for name in ("position", "token_type")}
    tables |= {"word": project(words, basis)}
    return {name: {"embedding": table} for name, table in tables.items()}, variances[-hidden_size:].sum() / variances.sum()


def initial_params(
    config: EncoderConfig,
    key: Key[Array, ""],
    teacher_params: dict,
    layers: Sequence[int] | None,
    *,
    mlm: bool = False,
    classifier: bool = False,
    embeddings: Literal["random", "pca", "svd"] = "random",
    checkpoint: dict | None = None,
) -> dict:
    """First parameters, float32. Pure: call it under jit.

    With `checkpoint`, its encoder; else with `layers`, the teacher's embeddings and these blocks of its; else random, with
    the teacher's projected `embeddings` where they are pca or svd. A head (`mlm`) comes with the encoder where there is one,
    without a decoder of its own: a student's is tied.

    A classification head (`classifier`, with the pooler that BERT's reads) starts at random: from the teacher wang2023 takes
    embeddings and layers alone. That of a checkpoint goes on, which `own_head` has left in where it is one for the same labels; a
    pooler alone does not: an intermediate stage exports one that it has not trained.
    """
    params = init_params(config, key, mlm=mlm, classifier=classifier)
    source: dict = {}
    if checkpoint is not None:
        source = checkpoint
        heads = {"pooler", "classifier"} & params.keys() & source.keys() if "classifier" in source else set()
        params |= {name: source[name] for name in ("embeddings", "layers", *sorted(heads))}
    elif layers is not None:
        source = teacher_params
        copied = {layer_name(i): source["layers"][layer_name(n)] for i, n in enumerate(layers, 1)}
        params |= {"embeddings": source["embeddings"], "layers": copied}
    elif embeddings != "random":
        params["embeddings"] |= projected_embeddings(teacher_params["embeddings"], config.hidden_size, embeddings)[0]
    if mlm and "mlm" in source:
        params["mlm"] = {name: leaf for name, leaf in source["mlm"].items() if name != "decoder"}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def own_head(config: EncoderConfig, other: EncoderConfig, params: dict) -> dict:
    """Of a checkpoint's parameters those that a student of these labels starts from: without a head for other labels.

    Labels are the same by their names, or by their number where the checkpoint only numbers them (LABEL_0) or is a regression.
    """
    same = label_order(config.labels, other.labels) == list(range(len(config.labels)))
    return params if same else {name: value for name, value in params.items() if name != "classifier"}


def export_pooler(config: EncoderConfig, key: Key[Array, ""], teacher: EncoderConfig, teacher_params: dict) -> dict:
    """The pooler of an exported base model, without which transformers would invent one at every load.

    No loss here trains it: the teacher's when the widths are equal, else a random one that is the same at every export.
    """
    if "pooler" in teacher_params and teacher.hidden_size == config.hidden_size:
        return teacher_params["pooler"]
    return jax.tree.map(np.asarray, init_params(dataclasses.replace(config, num_layers=0, vocab_size=1), key, pooler=True)["pooler"])
