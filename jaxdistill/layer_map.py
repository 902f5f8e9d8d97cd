"""Layer maps: which teacher layers each student layer learns from.

Layers are numbered as in the papers: 0 is the embedding output, 1..L are the Transformer blocks.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence

from jaxdistill.errors import InputError, nearest

Pairs = tuple[tuple[int, int], ...]


def _last_layer(num_student: int, num_teacher: int) -> Pairs:
    return ((num_student, num_teacher),)


def _last(num_student: int, num_teacher: int) -> Pairs:
    if num_student > num_teacher:
        raise InputError(
            f"layer maps 'last' and 'uniform_plus_last' need a student no deeper than the teacher, "
            f"got {num_student} and {num_teacher} layers"
        )
    return tuple((i, num_teacher - num_student + i) for i in range(1, num_student + 1))


def _uniform(num_student: int, num_teacher: int) -> Pairs:
    stride = -(-num_teacher // num_student)
    return tuple((i, min(stride * i, num_teacher)) for i in range(1, num_student + 1))


def _uniform_consecutive(num_student: int, num_teacher: int, *, inclusive: bool = False) -> Pairs:
    stride = -(-num_teacher // num_student)
    pairs = []
    for i in range(1, num_student + 1):
        first = stride * (i - 1) + (0 if inclusive else 1)
        layers = {min(layer, num_teacher) for layer in range(first, stride * i + 1)}
        pairs += [(i, layer) for layer in sorted(layers)]
    return tuple(pairs)


def _uniform_plus_last(num_student: int, num_teacher: int) -> Pairs:
    return tuple(sorted(set(_uniform(num_student, num_teacher)) | set(_last(num_student, num_teacher))))


def _teacher_layer(num_student: int, num_teacher: int, *, teacher_layer: int) -> Pairs:
    if not 1 <= abs(teacher_layer) <= num_teacher:
        raise InputError(
            f"layer map 'teacher_layer': {teacher_layer} is out of range, "
            f"the teacher has layers 1..{num_teacher}, or -1..-{num_teacher} from the end"
        )
    return ((num_student, teacher_layer if teacher_layer > 0 else num_teacher + 1 + teacher_layer),)


def _first_and_last_uniform(num_student: int, num_teacher: int) -> Pairs:
    if num_student == 1:
        return ((1, num_teacher),)
    step = (num_teacher - 1) / (num_student - 1)
    return tuple((i, int(1 + step * (i - 1) + 0.5)) for i in range(1, num_student + 1))


def _random(num_student: int, num_teacher: int, *, seed: int = 0, draw: int = 0) -> Pairs:
    # Python promises the numbers of `random()` after a seed, not those of `sample`; a string is hashed alike in every process.
    rng = random.Random(f"{seed}/{draw}")
    if num_student > num_teacher:
        layers = sorted(1 + int(rng.random() * num_teacher) for _ in range(num_student))
    else:  # selection sampling: every subset is as likely, and it comes out in order
        layers = []
        for layer in range(1, num_teacher + 1):
            if rng.random() * (num_teacher + 1 - layer) < num_student - len(layers):
                layers.append(layer)
    return tuple(enumerate(layers, 1))


def _learned(num_student: int, num_teacher: int) -> Pairs:
    return tuple((i, j) for i in range(1, num_student + 1) for j in range(1, num_teacher + 1))


def _explicit(num_student: int, num_teacher: int, *, pairs: Sequence[Sequence[int]]) -> Pairs:
    return tuple((int(student), int(teacher)) for student, teacher in pairs)


STRATEGIES: dict[str, Callable[..., Pairs]] = {
    "last_layer": _last_layer,
    "last": _last,
    "uniform": _uniform,
    "uniform_consecutive": _uniform_consecutive,
    "uniform_plus_last": _uniform_plus_last,
    "teacher_layer": _teacher_layer,
    "first_and_last_uniform": _first_and_last_uniform,
    "random": _random,
    "learned": _learned,
    "explicit": _explicit,
}


def layer_pairs(strategy: str, num_student_layers: int, num_teacher_layers: int, *, embeddings: bool = False, **options) -> Pairs:
    """Pairs (student layer, teacher layer) of a named map, sorted.

    Strategies (udagawa2023 section 3, wang2023, whatslost2023): `last_layer`, `last`, `uniform`, `uniform_consecutive`
    (option `inclusive`), `uniform_plus_last`, `teacher_layer` (option `teacher_layer`: 1..L_T, or -1 for the last, -2 for
    the one before it), `first_and_last_uniform`, `explicit` (option `pairs`); and

    - `random` (options `seed`, `draw`; RAIL-KD, Haidar et al. 2022): draw number `draw` of a random increasing map, one teacher
      layer for each of the student's, none twice unless the student is the deeper one. The same in every process.
    - `learned` (ALP-KD, Passban et al. 2021): every pair of blocks; which of them count is decided by attention at run time.

    Args:
      embeddings: of any strategy: the embeddings learn from the embeddings as well, pair (0, 0) (TinyBERT, Jiao et al. 2020).

    Raises:
      InputError: unknown strategy or option, or a layer outside 0..L of its side.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"unknown layer map {strategy!r}{nearest(strategy, STRATEGIES)}")
    if num_student_layers < 1 or num_teacher_layers < 1:
        raise InputError(f"layer map {strategy!r}: both depths must be at least 1, got {num_student_layers} and {num_teacher_layers}")
    parameters = inspect.signature(STRATEGIES[strategy]).parameters.values()
    own = {option.name: option for option in parameters if option.kind is option.KEYWORD_ONLY}
    for name in options:
        if name not in own:
            raise InputError(f"layer map {strategy!r} has no option {name!r}; its options: {', '.join(sorted([*own, 'embeddings']))}")
    for name, option in own.items():
        if option.default is option.empty and name not in options:
            raise InputError(f"layer map {strategy!r} needs the option {name!r}")
    pairs = tuple(sorted(set(STRATEGIES[strategy](num_student_layers, num_teacher_layers, **options))))
    if not pairs:
        raise InputError(f"layer map {strategy!r} is empty: name at least one [student, teacher] pair")
    if embeddings:
        pairs = tuple(sorted({(0, 0), *pairs}))
    for student, teacher in pairs:
        if not 0 <= student <= num_student_layers:
            raise InputError(
                f"layer map {strategy!r}: student layer {student} is out of range, the student has layers 0..{num_student_layers}"
            )
        if not 0 <= teacher <= num_teacher_layers:
            raise InputError(
                f"layer map {strategy!r}: teacher layer {teacher} is out of range, the teacher has layers 0..{num_teacher_layers}"
            )
    return pairs
