"""From a config to a run whose every part has been checked: nothing is written, no text is read (of a task the rows, to count them)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from jaxdistill.config import CheckpointConfig, Config
from jaxdistill.data import Masking, TextTokenizer, check_tokenizer, languages, load_tokenizer
from jaxdistill.errors import InputError, nearest
from jaxdistill.features import Feature, deepest_layer
from jaxdistill.implementations import check_attention, fuses_attention, relations_of, without_cudnn
from jaxdistill.kernels import Kernels, Platform
from jaxdistill.models import EncoderConfig, find_model, load_config, split_revision, with_mlm_head
from jaxdistill.objective import bind_objective, features_read, needs_labels, reads_labels, reads_masked
from jaxdistill.optimizer import create_optimizer
from jaxdistill.parts import BoundTerm
from jaxdistill.revisions import pin_models
from jaxdistill.sharding import mesh_shape
from jaxdistill.stages import Stage, stages_of
from jaxdistill.students import check_checkpoint, copied_layers, student_config
from jaxdistill.tasks import Task, find_task, num_training_rows
from jaxdistill.train_step import StepSettings, teacher_reads
from jaxdistill.update import Input, Student
from jaxdistill.urls import is_url, local_path


@dataclass(frozen=True)
class Model:
    """An encoder that a run reads: in a folder, or in one that an earlier stage will have written by then."""

    folder: Path
    config: EncoderConfig
    has_mlm_head: bool
    tokenizer: Path


@dataclass(frozen=True)
class Run:
    """One run, resolved. `config` has every choice made that "auto" or a default left open, and absolute paths."""

    config: Config
    stage: str  # "" without stages
    teacher_folder: Path
    teacher: EncoderConfig
    tokenizer_source: Path
    tokenizer: TextTokenizer
    students: tuple[Student, ...]
    copied: dict[str, tuple[int, ...] | None]  # teacher layers that each student starts from
    checkpoints: dict[str, Path]  # folders of the students that start from one
    settings: StepSettings
    mesh: dict[str, int]
    warnings: tuple[str, ...]
    saved: Config  # what its folder keeps: `config`, or for the last of several stages the config of them all

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def store(self) -> Path | str:
        """The folder of the token store, or its URL."""
        store = self.config.data.store
        return store if store and is_url(store) else Path(store) if store else self.output / "tokens"

    @property
    def task(self) -> Task | None:
        return find_task(self.config.data.task.name) if self.config.data.task else None

    @property
    def teacher_features(self) -> frozenset[Feature]:
        """What the students' objectives together read of the teacher."""
        return frozenset().union(*self.teacher_passes.values())

    @property
    def teacher_passes(self) -> dict[Input, frozenset[Feature]]:
        """Inputs on which the teacher runs, and what is read of it there."""
        return teacher_reads(self.students)

    @property
    def layer_map(self) -> dict[str, dict[str, object]]:
        """Student -> term -> [student layer, teacher layer] pairs; with a note where these are not fixed."""

        def entry(term):
            pairs = [list(pair) for pair in term.pairs]
            return {"pairs": pairs, "note": term.note} if term.note else pairs

        return {s.name: {term.name: entry(term) for term in s.terms} for s in self.students}


def resolve_stages(config: Config, *, num_devices: int | None = None, platform: Platform | None = None) -> tuple[Run, ...]:
    """The runs of a config (one without stages), each checked against those before it.

    Args:
      num_devices, platform: that it is to run on; default: those here.

    Raises:
      InputError: one line that names the field and what would be right.
    """
    config = pin_models(in_steps(_absolute_output(config)))
    without: tuple[str, ...] = ()
    if platform is None and not fuses_attention(jax.devices()[0]):
        kernels, without = without_cudnn(config.kernels)
        config = config.model_copy(update={"kernels": kernels})
    runs: list[Run] = []
    planned: dict[str, Model] = {}
    for stage in stages_of(config):
        run = _resolve(stage, planned, num_devices or jax.device_count(), platform or jax.default_backend())
        runs.append(run)
        for student in run.students:
            folder = run.output / "export" / student.name
            planned[str(folder)] = Model(folder, student.config, student.has_mlm_head, run.tokenizer_source)
    trained = {student.name for run in runs for student in run.students}
    idle = tuple(f"students.{name}: no stage trains it" for name in config.students if name not in trained)
    runs[0] = replace(runs[0], warnings=runs[0].warnings + idle + without)
    if len(runs) > 1:
        runs[-1] = replace(runs[-1], saved=_settled(config, platform or jax.default_backend()))
    return tuple(runs)


def resolve(config: Config, *, num_devices: int | None = None, platform: Platform | None = None) -> Run:
    """Check a config against its teacher, its tokenizer and the devices (default: those here); with stages, its last one.

    Raises:
      InputError: one line that names the field and what would be right.
    """
    return resolve_stages(config, num_devices=num_devices, platform=platform)[-1]


def _resolve(stage: Stage, planned: Mapping[str, Model], num_devices: int, platform: Platform) -> Run:
    config = stage.config
    teacher = _model(config.teacher, planned, stage.teacher)
    tokenizer_source = find_model(config.data.tokenizer) if config.data.tokenizer else teacher.tokenizer
    tokenizer = load_tokenizer(tokenizer_source)
    _check_text(config, teacher.config, tokenizer)
    config = _settled(config, platform)
    mesh = mesh_shape(config.mesh, num_devices)
    _check_batch(config, mesh)
    students, copied, checkpoints, warnings = [], {}, {}, []
    for name, student in config.students.items():
        place = f"{stage.students}.{name}"
        objective, where = (student.objective, f"{place}.objective") if student.objective else (config.objective, stage.objective)
        labels = find_task(config.data.task.name).outputs if config.data.task and reads_labels(objective) else ()
        rates = {"dropout": config.training.dropout, "attention_dropout": config.training.attention_dropout}
        shape, warned = student_config(student, teacher.config, **rates, where=place, labels=labels)
        head = {"steps": config.training.steps, "teacher_has_mlm_head": teacher.has_mlm_head, "masked_share": config.masking.rate}
        terms = bind_objective(objective, shape, teacher.config, where, **head)
        text = student.input or ("masked" if reads_masked(objective) else "clean")
        if text == "clean" and needs_labels(objective):
            raise InputError(f"{place}.input: a term of its objective counts the masked places, and clean text has none; take masked")
        if reads_labels(objective) and reads_masked(objective):
            raise InputError(f"{where}: terms of a task's labels and of masked text in one objective; give each a stage of its own")
        features, _ = features_read(terms)
        students.append(Student(name, shape, terms, create_optimizer(config.optimizer_of(name), config.training.steps, features), text))
        _check_batch_of_terms(config, terms, where)
        if deepest_layer(features) < shape.num_layers:
            warnings.append(f"{place}: no loss reads its blocks above {deepest_layer(features)}; they stay as they start")
        copied[name] = copied_layers(student, shape, teacher.config, place)
        if isinstance(student.initialise, CheckpointConfig):
            checkpoints[name] = _checkpoint(students[-1], student.initialise, planned, place)
        warnings += warned
    _check_inputs(config, students, stage.students)
    reads_logits = any(feature.kind == "logits" for features in teacher_reads(students).values() for feature in features)
    kernels = Kernels(platform, **config.kernels.model_dump())
    settings = StepSettings(
        teacher.config, config.training.precision, config.training.seed, config.data.packing,
        _masking(config, students, tokenizer), config.training.freeze_after, kernels, config.training.rematerialise,
        _spike_factor(config), languages=len(languages(config.data)),
    )  # fmt: skip
    warnings += check_attention(settings, config, students, stage.students)
    for student in students:
        relations_of(student, settings, config, mesh)
    models = _folder(teacher, with_head=reads_logits), teacher.config, tokenizer_source, tokenizer
    return Run(config, stage.name, *models, tuple(students), copied, checkpoints, settings, mesh, tuple(warnings), saved=config)


def _spike_factor(config: Config) -> float:
    if config.training.spike_factor is not None:
        return config.training.spike_factor
    return 0.0 if config.data.task else 10.0  # a task's few examples are soon learnt, and one that is not stands out lawfully


def _model(path_or_hub_id: str, planned: Mapping[str, Model], place: str) -> Model:
    if path_or_hub_id in planned:
        return planned[path_or_hub_id]
    try:
        folder = find_model(path_or_hub_id)
        return Model(folder, load_config(folder), with_mlm_head(folder) is not None, folder)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _checkpoint(student: Student, start: CheckpointConfig, planned: Mapping[str, Model], place: str) -> Path:
    """The folder of the parameters that a student starts from, with their MLM head if it has one: a model's, or a run's export."""
    name = start.checkpoint
    folder = Path(os.path.expanduser(name)).absolute()
    if name not in planned and (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        there = sorted(path.name for path in (folder / "export").iterdir()) if (folder / "export").is_dir() else []
        own = start.student or (student.name if student.name in there or len(there) != 1 else there[0])
        if own not in there:
            raise InputError(f"{place}.initialise: the run in {folder} has exported no student {own!r}{nearest(own, there)}")
        name = str(folder / "export" / own)
    elif start.student:
        raise InputError(f"{place}.initialise.student: {start.checkpoint} is not the folder of a run")
    model = _model(name, planned, f"{place}.initialise.checkpoint")
    check_checkpoint(student.config, model.config, place)
    return _folder(model, with_head=student.has_mlm_head)


def _folder(model: Model, *, with_head: bool) -> Path:
    """Where the model's weights are, or will be: those with the MLM head, where one is wanted and there."""
    if not (with_head and model.has_mlm_head):
        return model.folder
    # One that an earlier stage has yet to export lies where every export puts it.
    return (with_mlm_head(model.folder) if model.folder.is_dir() else None) or model.folder / "mlm"


def _check_batch_of_terms(config: Config, terms: Sequence[BoundTerm], where: str) -> None:
    if config.training.batch_size == 1 and any(term.kind == "hidden_contrastive" for term in terms):
        raise InputError(f"{where}: hidden_contrastive compares the rows of a batch, and training.batch_size is 1; take more")


def _check_text(config: Config, teacher: EncoderConfig, tokenizer: TextTokenizer) -> None:
    where = "data.tokenizer" if config.data.tokenizer else "teacher"
    # Only where positions are counted from it does the padding index matter; BERT's kind often names another than its tokenizer.
    pad_token_id = teacher.pad_token_id if teacher.positions_from_padding else None
    check_tokenizer(tokenizer, vocab_size=teacher.vocab_size, pad_token_id=pad_token_id, where=where)
    if config.data.sequence_length > teacher.max_sequence_length:
        raise InputError(
            f"data.sequence_length: {config.data.sequence_length} is over the {teacher.max_sequence_length} positions of the teacher"
        )


def _check_inputs(config: Config, students: list[Student], where: str) -> None:
    """All students read the same text, unless the config asks for both."""
    first = {student.input: student.name for student in reversed(students)}
    if len(first) > 1 and not config.training.both_inputs:
        raise InputError(
            f"{where}: {first['masked']} needs masked text and {first['clean']} clean text, and one batch feeds them all; give them the "
            f"same input, or set training.both_inputs to true (a second teacher pass)"
        )


def _masking(config: Config, students: list[Student], tokenizer: TextTokenizer) -> Masking | None:
    if all(student.input == "clean" for student in students):
        return None
    if tokenizer.mask_id is None:
        raise InputError("masking: the tokenizer has no mask token, which OD and MLM objectives put into the text")
    special = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
    return Masking(config.masking.rate, config.masking.mask, config.masking.random, tokenizer.mask_id, special, tokenizer.vocab_size)


def in_steps(config: Config) -> Config:
    """The config with steps in place of epochs, of the run and of every stage: as many as see each of a task's rows so often.

    Raises:
      InputError: an unknown task, epochs of a text, whose rows are not known before it is prepared; rows that cannot be read.
    """
    if config.data.task:
        find_task(config.data.task.name)
    said = {f"stages.{name}.training": stage.training for name, stage in config.stages.items() if stage.training}
    given = [place for place, training in {"training": config.training, **said}.items() if training.epochs is not None]
    if not given:
        return config
    if not config.data.task:
        raise InputError(f"{given[0]}.epochs: only a task's rows can be counted beforehand; give steps, or data.task")
    num_rows, training = num_training_rows(config.data.task), config.training

    def steps(epochs: float, batch_size: int | None) -> dict[str, int | None]:
        return {"steps": math.ceil(epochs * num_rows / (batch_size or training.batch_size)), "epochs": None}

    stages = {}
    for name, stage in config.stages.items():
        own = stage.training
        epochs = own and (own.epochs or (None if own.steps else training.epochs))  # the run's, with its own batch size
        update = {"training": own.model_copy(update=steps(epochs, own.batch_size))} if epochs else {}
        stages[name] = stage.model_copy(update=update)
    whole = training.model_copy(update=steps(training.epochs, None) if training.epochs else {})
    return config.model_copy(update={"training": whole, "stages": stages})


def _absolute_output(config: Config) -> Config:
    if any(len(os.fsencode(part)) > 255 for part in Path(config.output).parts):
        raise InputError("output: a name in it is longer than the 255 bytes that a folder's may have")
    return config.model_copy(update={"output": str(Path(os.path.expanduser(config.output)).absolute())})


def _settled(config: Config, platform: Platform) -> Config:
    """The precision that "auto" means here, and paths that hold from any working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or is_url(path) else str(local_path(path).absolute())

    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if platform == "cpu" else "bfloat16"
    sources, task = config.data.sources, config.data.task
    sources = sources and tuple(source.model_copy(update={"path": absolute(source.path)}) for source in sources)
    task = task and task.model_copy(update={"data": absolute(task.data)})
    teacher, name = config.teacher, config.teacher_name or split_revision(config.teacher)[0]
    if os.path.isdir(os.path.expanduser(teacher)):
        teacher, name = absolute(teacher), config.teacher_name or Path(absolute(teacher)).name
    tokenizer = config.data.tokenizer
    if tokenizer and os.path.isdir(os.path.expanduser(tokenizer)):
        tokenizer = absolute(tokenizer)
    data = config.data.model_copy(update={"sources": sources, "task": task, "store": absolute(config.data.store), "tokenizer": tokenizer})
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
