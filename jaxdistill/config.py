"""What a run is made of: strict, frozen models, read from YAML, a dict or keyword arguments.

A YAML file holds only what differs from the defaults here. Every error names the path of the field in the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jaxdistill.errors import InputError, nearest
from jaxdistill.layer_map import STRATEGIES, Pairs, layer_pairs

# YAML has lists, frozen models want tuples; strict mode would refuse the one for the other.
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SourceConfig(Section):
    """One text: local files (`path`: a file, a folder or a glob) or a dataset of the Hub (`dataset`)."""

    path: str | None = None
    format: Literal["auto", "parquet", "jsonl", "text"] = "auto"
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    weight: Annotated[float, Field(gt=0)] | None = None  # share of the rows drawn; all sources or none

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (local files) or dataset (a dataset of the Hub)")
        other = {"name", "split", "revision"} if self.path else {"format"}
        if ignored := sorted(name for name in other & self.model_fields_set if getattr(self, name) not in (None, "auto", "train")):
            raise ValueError(f"{ignored[0]} means nothing for a {'path' if self.path else 'dataset'}; leave it out")
        return self


class DataConfig(Section):
    sources: Annotated[tuple[SourceConfig, ...], AsTuple, Field(min_length=1)]
    sequence_length: Annotated[int, Field(ge=8, le=8192)] = 128
    held_out: Fraction = 0.01  # share of the documents, chosen by their hash
    packing: bool = False  # rows hold several texts: True keeps them invisible to each other
    tokenizer: str | None = None  # default: the teacher's
    store: str | None = None  # folder of the token store; default: beside the run

    @pydantic.model_validator(mode="after")
    def _weights(self) -> DataConfig:
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("give every source a weight, or none (then each is read once per epoch)")
        return self


class LayerMapConfig(Section):
    """`last_layer`, or {strategy: teacher_layer, teacher_layer: 11}, or {strategy: explicit, pairs: [[3, 11]]}."""

    strategy: str = "last_layer"
    teacher_layer: int | None = None
    inclusive: bool | None = None
    pairs: Annotated[tuple[Annotated[tuple[int, int], AsTuple], ...], AsTuple] | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"strategy": value} if isinstance(value, str) else value

    @pydantic.field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"unknown layer map {value!r}{nearest(value, STRATEGIES)}")
        return value

    def resolve(self, num_student_layers: int, num_teacher_layers: int) -> Pairs:
        options = self.model_dump(exclude={"strategy"}, exclude_none=True)
        return layer_pairs(self.strategy, num_student_layers, num_teacher_layers, **options)


class RelationKL(Section):
    """MiniLMv2: KL of the self-relations of queries, keys and values (`losses.relation_kl`)."""

    kind: Literal["relation_kl"] = "relation_kl"
    weight: Annotated[float, Field(gt=0)] = 1.0
    layer_map: LayerMapConfig = LayerMapConfig()
    relation_heads: Positive = 48
    query: Annotated[float, Field(ge=0)] = 1 / 3
    key: Annotated[float, Field(ge=0)] = 1 / 3
    value: Annotated[float, Field(ge=0)] = 1 / 3

    @pydantic.model_validator(mode="after")
    def _reads_something(self) -> RelationKL:
        if self.query + self.key + self.value == 0:
            raise ValueError("query, key and value all have weight 0: the term would read nothing")
        return self


Term = RelationKL  # the next kind makes this a union discriminated by `kind`
Objective = Annotated[tuple[Term, ...], AsTuple, Field(min_length=1)]


class OptimizerConfig(Section):
    """AdamW; the defaults are those of udagawa2023's MiniLMv2."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.05  # share of the steps
    b1: Fraction = 0.9
    b2: Fraction = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # kernels and embeddings only
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class StudentConfig(Section):
    """A shape by name (`shape`) or by its numbers; numbers override the name. Unsaid numbers: see `students.py`."""

    shape: str | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    initialise: Literal["random", "first_k", "every_k"] | Annotated[tuple[int, ...], AsTuple] = "random"
    objective: Objective | None = None  # default: the run's
    optimizer: OptimizerConfig | None = None  # default: the run's


class TrainingConfig(Section):
    steps: Positive = 10_000
    batch_size: Positive = 256  # rows of the global batch, over all devices and micro-batches
    micro_batches: Positive = 1  # gradient accumulation: the batch in this many pieces, one after the other
    dropout: Fraction | None = None  # of the students; default: the teacher's config
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: float32 on CPU, else bfloat16
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    log_every: Positive = 20
    evaluate_every: Positive = 500
    evaluate_rows: Positive = 512  # held-out rows read by one evaluation, at most
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    tensorboard: bool = True
    wandb: str | None = None  # project name


class MeshConfig(Section):
    """Devices by axis; -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class ExportConfig(Section):
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


STUDENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Config(Section):
    """One run: a teacher, a text and one or more students."""

    teacher: str  # folder or Hub id
    teacher_name: str | None = None  # as cards and tables call it; default: the Hub id or the folder's name
    data: DataConfig
    students: Annotated[dict[str, StudentConfig], Field(min_length=1)]
    objective: Objective = (RelationKL(),)
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    export: ExportConfig = ExportConfig()
    output: str

    @pydantic.field_validator("students")
    @classmethod
    def _names(cls, value: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        for name in value:
            if not STUDENT_NAME.fullmatch(name):
                raise ValueError(f"student name {name!r} becomes a folder: use letters, digits, '.', '_' and '-'")
        return value

    def to_yaml(self) -> str:
        """The config with every default spelled out; reads back to an equal config."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 5e-4 as a number (YAML 1.1 wants 5.0e-4 and else gives a string), and refuses a key said twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that the loader would read as numbers."""


for _kind in (_Loader, _Dumper):
    _float = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _float, list("-+.0123456789"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # ValueError: a date that is none; TypeError: a list as a key
        raise InputError(f"{where}: not valid YAML: {error}") from None


def read_config_file(path: str | Path) -> dict:
    """The mapping in a YAML file; a run folder stands for the config that it holds, with its output where it lies now."""
    path, folder = Path(path), None
    if path.is_dir():
        folder = path.absolute()
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path}: a folder without config.yaml; give a config file or the folder of a run")
        path = path / "config.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; a config is YAML in UTF-8") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: a config is a mapping of fields (teacher, data, students, output), got {type(values).__name__}")
    return values | {"output": str(folder)} if folder else values


def apply_overrides(values: Mapping, overrides: Sequence[str]) -> dict:
    """`values` with each `path.to.field=value` set; the value is read as YAML, list items are named by number."""
    result: Any = _plain(values)  # a deep copy in plain types
    data = result.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), list):  # so that a source written as a string has its fields
        data["sources"] = [{"path": source} if isinstance(source, str) else source for source in data["sources"]]
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise InputError(f"override {override!r}: write key=value, as in training.steps=1000")
        node, keys = result, path.split(".")
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            if isinstance(node, list):
                if not key.isdigit() or int(key) >= len(node):
                    raise InputError(f"override {override!r}: {'.'.join(keys[:i])} is a list of {len(node)}; items have numbers from 0")
                key = int(key)
            elif not isinstance(node, dict):
                raise InputError(f"override {override!r}: {'.'.join(keys[:i])} is a single value, it has no field {key!r}")
            if last:
                node[key] = _parse_yaml(text, f"override {override!r}")
            elif isinstance(node, dict) and node.get(key) is None:
                node[key] = [{}] if keys[i + 1] == "0" else {}  # objective.0.weight changes the default term
            node = node[key]
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a number of NumPy
        return value.item()
    return str(value) if isinstance(value, Path) else value


def _merged(values: Mapping, fields: Mapping) -> dict:
    """`fields` over `values`, section by section."""
    sections = {key for key in fields if isinstance(fields[key], Mapping) and isinstance(values.get(key), Mapping)}
    return {**values, **fields, **{key: _merged(values[key], fields[key]) for key in sections}}


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names of the fields that the section at this place of the config knows."""
    model: Any = Config
    for key in location:
        annotation = model.model_fields[key].annotation if isinstance(key, str) and key in getattr(model, "model_fields", {}) else None
        found = re.findall(r"\b([A-Z]\w+)\b", repr(annotation)) if annotation is not None else []
        sections = [globals()[name] for name in found if isinstance(globals().get(name), type) and issubclass(globals()[name], Section)]
        model = sections[0] if sections else model
    return list(model.model_fields)


def _one_line(error: pydantic.ValidationError) -> str:
    problems = error.errors()
    # An unknown key often explains the others (a missing one beside it): say it first.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    # The branches of a union are pydantic's affair, not part of the user's path.
    path = ".".join(str(key) for key in first["loc"] if not re.match(r"(literal|tuple|list|function-\w+|nullable)\[", str(key)))
    if first["type"] == "extra_forbidden":
        message = f"unknown field{nearest(str(first['loc'][-1]), _fields_at(first['loc'][:-1]))}"
    elif first["type"] == "missing":
        message = "missing; this field is required"
    else:
        got = first["input"]
        shown = f", got {got!r}" if first["type"] != "value_error" and isinstance(got, (str, int, float, type(None))) else ""
        message = first["msg"].removeprefix("Value error, ") + shown
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path or 'config'}: {message}{more}"


def load_config(config: Config | Mapping | str | Path | None = None, overrides: Sequence[str] = (), **fields: Any) -> Config:
    """A checked config from a file, a run folder, a dict or keyword arguments, which go over it; `overrides`: key=value strings.

    Raises:
      InputError: one line that names the file and the field, and what would be right.
    """
    where = ""
    if isinstance(config, Config):
        values: dict = config.model_dump(mode="json")
    elif isinstance(config, (str, Path)):
        values, where = read_config_file(config), f"{config}: "
    else:
        values = dict(config or {})
    values = apply_overrides(_merged(values, fields), overrides)
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(where + _one_line(error)) from None
