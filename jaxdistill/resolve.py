"""From a config to a run whose every part has been checked: nothing is written, no text is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from jaxdistill.config import Config
from jaxdistill.data import TextTokenizer, check_tokenizer, load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.models import EncoderConfig, find_model, load_config
from jaxdistill.objective import bind_objective, features_read
from jaxdistill.optimizer import create_optimizer
from jaxdistill.sharding import mesh_shape
from jaxdistill.students import copied_layers, student_config
from jaxdistill.train_step import StepSettings, Student


@dataclass(frozen=True)
class Run:
    """One run, resolved. `config` has every choice made that "auto" or a default left open, and absolute paths."""

    config: Config
    teacher_folder: Path
    teacher: EncoderConfig
    tokenizer_source: Path
    tokenizer: TextTokenizer
    students: tuple[Student, ...]
    copied: dict[str, tuple[int, ...] | None]  # teacher layers that each student starts from
    settings: StepSettings
    mesh: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def store(self) -> Path:
        return Path(self.config.data.store) if self.config.data.store else self.output / "tokens"

    @property
    def teacher_features(self):
        """What the students' objectives together read of the teacher."""
        return frozenset().union(*(features_read(student.terms)[1] for student in self.students))

    @property
    def layer_map(self) -> dict[str, dict[str, list[list[int]]]]:
        """Student -> term -> [student layer, teacher layer] pairs."""
        return {s.name: {term.name: [list(pair) for pair in term.pairs] for term in s.terms} for s in self.students}


def resolve(config: Config, *, num_devices: int | None = None) -> Run:
    """Check a config against its teacher, its tokenizer and the devices (default: those here).

    Raises:
      InputError: one line that names the field and what would be right.
    """
    teacher_folder = find_model(config.teacher)
    teacher = load_config(teacher_folder)
    tokenizer_source = find_model(config.data.tokenizer) if config.data.tokenizer else teacher_folder
    tokenizer = load_tokenizer(tokenizer_source)
    where = "data.tokenizer" if config.data.tokenizer else "teacher"
    # Only where positions are counted from it does the padding index matter; BERT's kind often names another than its tokenizer.
    pad_token_id = teacher.pad_token_id if teacher.positions_from_padding else None
    check_tokenizer(tokenizer, vocab_size=teacher.vocab_size, pad_token_id=pad_token_id, where=where)
    if config.data.sequence_length > teacher.max_sequence_length:
        raise InputError(
            f"data.sequence_length: {config.data.sequence_length} is over the {teacher.max_sequence_length} positions of the teacher"
        )
    config = _settled(config, teacher_folder)
    mesh = mesh_shape(config.mesh, num_devices or jax.device_count())
    _check_batch(config, mesh)
    students, copied, warnings = [], {}, []
    for name, student in config.students.items():
        place = f"students.{name}"
        shape, warned = student_config(student, teacher, dropout=config.training.dropout, where=place)
        where = f"{place}.objective" if student.objective else "objective"
        terms = bind_objective(student.objective or config.objective, shape, teacher, where)
        optimizer = create_optimizer(student.optimizer or config.optimizer, config.training.steps)
        students.append(Student(name, shape, terms, optimizer))
        copied[name] = copied_layers(student, shape, teacher, place)
        warnings += warned
    settings = StepSettings(teacher, config.training.precision, config.training.seed, config.data.packing)
    return Run(
        config, teacher_folder, teacher, tokenizer_source, tokenizer, tuple(students), copied, settings, mesh, tuple(warnings)
    )


def _settled(config: Config, teacher_folder: Path) -> Config:
    """The precision that "auto" means here, and paths that hold from any working directory."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sources = tuple(source.model_copy(update={"path": absolute(source.path)}) for source in config.data.sources)
    teacher, name = config.teacher, config.teacher_name or config.teacher
    if Path(teacher).expanduser().is_dir():
        teacher, name = absolute(teacher), config.teacher_name or Path(absolute(teacher)).name
    tokenizer = config.data.tokenizer
    if tokenizer and Path(tokenizer).expanduser().is_dir():
        tokenizer = absolute(tokenizer)
    data = config.data.model_copy(update={"sources": sources, "store": absolute(config.data.store), "tokenizer": tokenizer})
    training = config.training.model_copy(update={"precision": precision})
    settled = {"teacher": teacher, "teacher_name": name, "data": data, "training": training, "output": absolute(config.output)}
    return config.model_copy(update=settled)


def _check_batch(config: Config, mesh: dict[str, int]) -> None:
    rows, pieces, devices = config.training.batch_size, config.training.micro_batches, mesh["data"] * mesh["fsdp"]
    if rows % (pieces * devices):
        closest = max(rows // (pieces * devices), 1) * pieces * devices
        raise InputError(
            f"training.batch_size: {rows} rows do not divide into {pieces} micro-batches over {devices} devices (mesh data x fsdp); "
            f"{closest} would"
        )
