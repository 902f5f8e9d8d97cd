"""What a run is made of: strict, frozen models.

A YAML file holds only what differs from the defaults here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, Field

from jaxdistill.config.data import DataConfig, Fraction, Share
from jaxdistill.config.terms import AsTuple, Folder, Objective, Positive, RelationKL, Section

Size = Annotated[int, Field(ge=1, le=2**24)]


class OptimizerConfig(Section):
    """AdamW; the defaults are those of udagawa2023's MiniLMv2."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.05  # share of the steps
    b1: Fraction = 0.9
    b2: Fraction = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # kernels and embeddings only
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # 0 (or null): none

    @pydantic.field_validator("clip_norm", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return 0.0 if value is None else value


class _Changes(Section):
    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_null(cls, value: Any) -> Any:
        """Null would read as "not said": where it means something there is another word for it."""
        for field, said in value.items() if isinstance(value, dict) else ():
            if said is None and field in cls.model_fields:
                raise ValueError(f"{field}: null changes nothing; leave it out{' (or 0: none)' if field == 'clip_norm' else ''}")
        return value


def _changes(section: type[Section], name: str) -> type[Section]:
    """A section whose fields may all be left out: what it says goes over another's."""
    fields: dict[str, Any] = {}
    for field, info in section.model_fields.items():
        kind = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        fields[field] = (kind | None, None)
    return pydantic.create_model(name, __base__=_Changes, __module__=__name__, **fields)


OptimizerChanges = _changes(OptimizerConfig, "OptimizerChanges")


class MaskingConfig(Section):
    """The corrupted text that OD and MLM read (BERT's scheme), drawn afresh at every step."""

    rate: Annotated[float, Field(gt=0, le=1)] = 0.15  # share of the tokens that are to be predicted; of these
    mask: Share = 0.8  # become the mask token
    random: Share = 0.1  # become a random token; the rest stays

    @pydantic.model_validator(mode="after")
    def _shares(self) -> MaskingConfig:
        if self.mask + self.random > 1 + 1e-9:
            raise ValueError(f"mask {self.mask} and random {self.random} together are over 1")
        return self


class CheckpointConfig(Section):
    """Parameters to start from: a model folder, a Hub id or the folder of a run (and which of its students)."""

    checkpoint: str
    student: str | None = None  # of a run folder; default: the one of the same name, or the only one


class PreviousStudent(Section):
    """A student of the stage before."""

    student: str


class StudentConfig(Section):
    """A shape by name (`shape`) or by its numbers; numbers override the name. Unsaid numbers: see `students.py`."""

    shape: str | None = None
    num_layers: Annotated[int, Field(ge=1, le=200)] | None = None
    num_heads: Annotated[int, Field(ge=1, le=10_000)] | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    initialise: (
        Literal["random", "first_k", "every_k", "distilbert"] | Annotated[tuple[int, ...], AsTuple] | CheckpointConfig | PreviousStudent
    ) = "random"
    embeddings: Literal["random", "pca", "svd"] = "random"  # of a narrower student that starts at random: see students.py
    input: Literal["clean", "masked"] | None = None  # default: masked if the objective has an OD or MLM term, else clean
    objective: Objective | None = None  # default: the run's
    optimizer: OptimizerChanges | None = None  # what differs from the run's


class TrainingConfig(Section):
    steps: Positive | None = 10_000  # None only where `epochs` stands for it, until the run is resolved
    epochs: Annotated[float, Field(gt=0)] | None = None  # of a task's rows, instead of steps
    batch_size: Positive = 256  # rows of the global batch, over all devices and micro-batches
    micro_batches: Positive = 1  # gradient accumulation: the batch in this many pieces, one after the other
    both_inputs: bool = False  # clean and masked text in one run: a second teacher pass
    dropout: Fraction | None = None  # of the students; default: the teacher's config
    attention_dropout: Fraction | None = None  # of their attention weights; default: `dropout`, else the teacher's config
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: float32 on CPU, else bfloat16
    teacher_weights: Literal["auto", "int8"] = "auto"  # auto: as the products; int8: matrices with a scale per column
    # What the students' gradients compute again instead of keeping it: attention weights; elementwise: all but products with weights
    rematerialise: Literal["none", "attention", "elementwise", "blocks"] = "none"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    freeze_after: Positive = 20  # skipped updates in a row (not finite, or a spike); then the student is frozen, the others go on
    # A loss over this many times its running mean is a spike: the update is skipped. 0: none is. Default: 10, on a task 0
    spike_factor: Annotated[float, Field(ge=0)] | None = None
    rollbacks: Annotated[int, Field(ge=0)] = 1  # of a run in which no student is left: to the last good checkpoint, on other batches
    log_every: Positive = 20
    evaluate_every: Positive = 500
    evaluate_rows: Positive = 512  # held-out rows read by one evaluation, at most
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    tensorboard: bool = True
    wandb: str | None = None  # project name

    @pydantic.model_validator(mode="before")
    @classmethod
    def _epochs_for_steps(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("epochs") is not None and "steps" not in value:
            return value | {"steps": None}
        return value

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        _check_length(self.steps, self.epochs)
        if self.steps is None and self.epochs is None:
            raise ValueError("steps: null says nothing; give steps, or epochs of a task")
        return self


def _check_length(steps: int | None, epochs: float | None) -> None:
    if steps is not None and epochs is not None:
        raise ValueError(f"steps {steps} and epochs {epochs:g} both say how long; leave one of the two out")


TrainingChanges = _changes(TrainingConfig, "TrainingChanges")


class MeshConfig(Section):
    """Devices by axis; -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class KernelsConfig(Section):
    """Which implementation computes the same numbers; auto: by device and shape (`kernels/choice.py`). `plain` is the formula."""

    attention: Literal["auto", "plain", "cudnn", "splash"] = "auto"  # of both encoders
    relations: Literal["auto", "plain", "blocks", "attend", "cudnn", "pallas"] = "auto"  # relation and attention KL
    logits: Literal["auto", "plain", "blocks"] = "auto"  # output distribution and masked language modelling


class ExportConfig(Section):
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Students = Annotated[dict[str, StudentConfig], Field(min_length=1)]


def _check_names(names, what: str) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{what} name {name!r} becomes a folder: use letters, digits, '.', '_' and '-', at most 100")


def changed(section: Section, changes: Section | None):
    """`section` with every field that `changes` says."""
    return section if changes is None else section.model_copy(update=changes.model_dump(exclude_none=True))


class StageConfig(Section):
    """One stage of several, one after the other: what it says goes over the run's fields, also over the students' own.

    A student that an earlier stage trained goes on from there; a new one starts as it says.
    """

    teacher: str | PreviousStudent | None = None
    students: Students | Annotated[tuple[str, ...], AsTuple, Field(min_length=1)] | None = None  # new ones, or names and globs of the run's
    objective: Objective | None = None
    optimizer: OptimizerChanges | None = None
    training: TrainingChanges | None = None

    @pydantic.field_validator("students")
    @classmethod
    def _names(cls, value):
        _check_names(value if isinstance(value, dict) else (), "student")
        return value

    @pydantic.field_validator("training")
    @classmethod
    def _one_length(cls, value):
        if value is not None:
            _check_length(value.steps, value.epochs)
        return value


def _empty_for_null(value: Any) -> Any:
    """A stage that changes nothing, written as YAML writes an empty mapping."""
    return {name: {} if stage is None else stage for name, stage in value.items()} if isinstance(value, dict) else value


class Config(Section):
    """One run: a teacher, a text and one or more students; with `stages`, several runs that build on one another."""

    teacher: str  # folder or Hub id
    teacher_name: str | None = None  # as cards and tables call it; default: the Hub id or the folder's name
    data: DataConfig
    masking: MaskingConfig = MaskingConfig()
    students: Students
    objective: Objective = (RelationKL(),)
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    stages: Annotated[dict[str, StageConfig], BeforeValidator(_empty_for_null)] = Field(default_factory=dict)
    mesh: MeshConfig = MeshConfig()
    kernels: KernelsConfig = KernelsConfig()
    export: ExportConfig = ExportConfig()
    output: Folder

    def optimizer_of(self, student: str) -> OptimizerConfig:
        """The run's optimizer with the student's changes."""
        return changed(self.optimizer, self.students[student].optimizer)

    @pydantic.field_validator("students")
    @classmethod
    def _student_names(cls, value: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        _check_names(value, "student")
        return value

    @pydantic.field_validator("stages")
    @classmethod
    def _stage_names(cls, value: dict[str, StageConfig]) -> dict[str, StageConfig]:
        _check_names(value, "stage")
        return value

    def to_yaml(self) -> str:
        """The config with every default spelled out; reads back to an equal config."""
        from jaxdistill.config.load import Dumper

        return yaml.dump(self.model_dump(mode="json", exclude_none=True), Dumper=Dumper, sort_keys=False)
