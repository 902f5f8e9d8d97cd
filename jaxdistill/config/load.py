"""Configs from YAML, dicts and key=value overrides; every error is one line that names the path of the field."""

from __future__ import annotations

import fnmatch
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel

from jaxdistill.config import data, sections, terms
from jaxdistill.config.sections import Config, PreviousStudent, StageConfig
from jaxdistill.config.terms import KINDS, Section
from jaxdistill.errors import InputError, nearest
from jaxdistill.redaction import holds_secret

Model = TypeVar("Model", bound=Section)


LARGEST_CONFIG = 1 << 20  # characters of YAML, and values once its aliases are written out


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 5e-4 as a number (YAML 1.1 wants 5.0e-4 and else gives a string), and refuses a key said twice,
    an alias of what it stands in, and aliases of aliases that would grow without end."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _written_out(node, {})
        return node

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the strings that the loader would read as numbers."""


for _kind in (_Loader, Dumper):
    _float = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _float, list("-+.0123456789"))


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below and with this one, were every alias a copy."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.constructor.ConstructorError(None, None, "an alias of what it stands in", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0  # under way
    own = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = [part for pair in own for part in pair] if isinstance(node, yaml.MappingNode) else own
    total = 1 + sum(_written_out(part, sizes) for part in parts)
    if total > LARGEST_CONFIG:
        raise yaml.constructor.ConstructorError(None, None, f"its aliases stand for more than {LARGEST_CONFIG:,} values", node.start_mark)
    sizes[id(node)] = total
    return total


def parse_yaml(text: str, where: str) -> Any:
    """Raises InputError for what is not YAML, or would not end."""
    if len(text) > LARGEST_CONFIG:
        raise InputError(f"{where}: {len(text):,} characters are no config")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deep") from None
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
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: a config is a mapping of fields (teacher, data, students, output), got {type(values).__name__}")
    return values | {"output": str(folder)} if folder else values


def apply_overrides(values: Mapping, overrides: Sequence[str]) -> dict:
    """`values` with each `path.to.field=value` set; the value is read as YAML, list items are named by number."""
    result: Any = _plain(values)  # a deep copy in plain types
    data = result.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), list):  # so that a source written as a string has its fields
        data["sources"] = [{"path": source} if isinstance(source, str) else source for source in data["sources"]]
    if isinstance(data, dict) and isinstance(data.get("task"), str):
        data["task"] = {"name": data["task"]}
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise InputError(f"override {override!r}: write key=value, as in training.steps=1000")
        node, keys = result, path.split(".")
        done = 0  # keys walked
        while done < len(keys):
            # A name may hold dots, as that of a grid's cell: the longest that is there.
            joined = (n for n in range(len(keys), done + 1, -1) if isinstance(node, dict) and ".".join(keys[done:n]) in node)
            end = next(joined, done + 1)
            key, last = ".".join(keys[done:end]), end == len(keys)
            if isinstance(node, list):
                if not key.isdigit() or int(key) >= len(node):
                    raise InputError(f"override {override!r}: {'.'.join(keys[:done])} is a list of {len(node)}; items have numbers from 0")
                key = int(key)
            elif not isinstance(node, dict):
                raise InputError(f"override {override!r}: {'.'.join(keys[:done])} is a single value, it has no field {key!r}")
            if last:
                node[key] = parse_yaml(text, f"override {override!r}")
            elif isinstance(node, dict) and node.get(key) is None:
                node[key] = [{}] if keys[end] == "0" else {}  # objective.0.weight changes the default term
            node, done = node[key], end
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


def _section_at(location: Sequence[str | int], model: type[Section]) -> type[Section]:
    """The section at this place of a config; names of terms stand in the place as pydantic puts them there."""
    modules = (data, sections, terms, sys.modules[model.__module__])
    known = {name: kind for module in modules for name, kind in vars(module).items() if isinstance(kind, type)}
    for key in location:
        if key in KINDS:
            model = KINDS[str(key)]
        elif key in known and issubclass(known[str(key)], Section):  # the branch of a union
            model = known[str(key)]
        elif key in model.model_fields:
            found = re.findall(r"\b([A-Z]\w+)\b", repr(model.model_fields[str(key)].annotation))
            model = next((known[name] for name in found if issubclass(known.get(name, str), Section)), model)
    return model


# What pydantic puts into a place beside the user's own path: branches of unions.
_BRANCH = re.compile(
    r"(literal|tuple|list|function-\w+|nullable|constrained-\w+|tagged-union|dict)(\[.*)?|int|float|str|bool|[A-Z]\w+", re.DOTALL
)


def _path(location: Sequence[str | int]) -> str:
    parts = []
    for i, key in enumerate(location):
        branch = (
            isinstance(key, str)
            and _BRANCH.fullmatch(key)
            and (key[0].islower() or any(hasattr(module, key) for module in (data, sections, terms)))
        )
        tag = key in KINDS and i > 0 and isinstance(location[i - 1], int)
        if not (branch and i > 0 and ("[" in key or location[i - 1] != "students")) and not tag:
            parts.append(str(key))
    return ".".join(part for part in parts if part != "[key]")


def _one_line(error: pydantic.ValidationError, model: type[Section]) -> str:
    problems = error.errors()
    # An unknown key often explains the others (a missing one beside it): say it first.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown field{nearest(str(first['loc'][-1]), list(_section_at(first['loc'][:-1], model).model_fields))}"
    elif first["type"] == "union_tag_invalid":
        kind = first["ctx"]["tag"]
        path, message = f"{path}.kind", f"unknown term {kind!r}{nearest(kind, KINDS)}"
    elif first["type"] == "missing":
        message = "missing; this field is required"
    else:
        got = first["input"]
        shown = f", got {got!r}" if first["type"] != "value_error" and isinstance(got, (str, int, float, type(None))) else ""
        message = first["msg"].removeprefix("Value error, ") + shown
    others = {_path(problem["loc"]) for problem in problems} - {path}  # of a union, every branch has its complaint about one place
    others = [other for other in others if not path.startswith(f"{other}.") and not other.startswith(f"{path.rpartition('.')[0]}.")]
    more = f" (and {len(others)} more)" if others else ""
    return f"{path or 'config'}: {message}{more}"


def expand_grid(values: Mapping) -> dict:
    """`values` with its `grid` (a list of axes, each a mapping of name -> student fields) multiplied out into `students`.

    A cell is named by its values, joined with dots; later axes go over earlier ones.

    Raises:
      InputError: an axis that is no mapping of names to mappings, or a cell whose name a student has already.
    """
    grid = values.get("grid")
    if grid is None:
        return {key: value for key, value in values.items() if key != "grid"}
    if not isinstance(grid, list) or not grid:
        raise InputError("grid: a list of axes is needed, each a mapping of names to fields of a student")
    for i, axis in enumerate(grid):
        if not isinstance(axis, Mapping) or not axis or not all(isinstance(fields, Mapping) for fields in axis.values()):
            raise InputError(f"grid.{i}: an axis is a mapping of names to fields of a student, as in {{6L: {{shape: 6L}}}}")
    if not isinstance(values.get("students") or {}, Mapping):
        raise InputError("students: a mapping of names to their fields is needed beside a grid")
    students = dict(values.get("students") or {})
    for names in itertools.product(*grid):
        fields: dict = {}
        for axis, name in zip(grid, names, strict=True):
            fields = _merged(fields, axis[name])
        cell = ".".join(map(str, names))
        if cell in students:
            raise InputError(f"grid: there are two students {cell!r}, the cell of the grid and one before it")
        students[cell] = fields
    return {key: value for key, value in values.items() if key != "grid"} | {"students": students}


def select_students(config: Config, patterns: Sequence[str]) -> Config:
    """The config with those students alone whose names match one of the patterns (as in a shell); none given: all.

    A stage that names students by patterns keeps those that match one of them; without any it falls away.

    Raises:
      InputError: a pattern that no student matches.
    """
    if not patterns:
        return config
    own = {name for stage in config.stages.values() if isinstance(stage.students, dict) for name in stage.students}
    names = sorted({*config.students, *own})
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--student: no student matches {pattern!r}{nearest(pattern, names)}")
    kept = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    stages: dict[str, StageConfig] = {}
    for name, stage in reversed(config.stages.items()):
        # A teacher or start of a stage that is kept is needed, whatever the patterns say.
        students = _selected(stage.students, kept)
        if students:
            stages = {name: stage.model_copy(update={"students": students} if stage.students else {})} | stages
            kept |= {stage.teacher.student} if isinstance(stage.teacher, PreviousStudent) else set()
    if config.stages and not stages:
        raise InputError(f"--student: no stage trains {', '.join(sorted(kept))}")
    students = {name: student for name, student in config.students.items() if name in kept} or config.students
    return config.model_copy(update={"students": students, "stages": stages})


def _selected(students: Mapping | Sequence | None, kept: set[str]):
    """Of a stage's students those that are kept; nothing where none is."""
    if isinstance(students, Mapping):
        return {name: student for name, student in students.items() if name in kept}
    return tuple(pattern for pattern in students or ("*",) if fnmatch.filter(kept, pattern))


def load_config(config: Config | Mapping | str | Path | None = None, overrides: Sequence[str] = (), **fields: Any) -> Config:
    """A checked config from a file, a run folder, a dict or keyword arguments, which go over it; `overrides`: key=value strings.

    Raises:
      InputError: one line that names the file and the field, and what would be right.
    """
    where = ""
    if isinstance(config, Config):
        values: dict = config.model_dump(mode="json", exclude_none=True)
    elif isinstance(config, (str, Path)):
        values, where = read_config_file(config), f"{config}: "
    else:
        values = dict(config or {})
    try:
        to_grid = [override for override in overrides if re.match(r"grid[.=]", override)]
        values = expand_grid(apply_overrides(_merged(values, fields), to_grid))
        values = apply_overrides(values, [override for override in overrides if override not in to_grid])
    except InputError as error:
        raise InputError(f"{where}{error}" if str(error).startswith("grid") else str(error)) from None
    return validated(Config, values, where)


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a config with its place, keys too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield place, str(key)
            yield from _strings(item, f"{place}.{key}" if place else str(key))


def validated(model: type[Model], values: Mapping, where: str = "") -> Model:
    """Raises InputError, one line that names the field; also for a password or a token, since a run writes its config down."""
    for place, text in _strings(values):
        if "\0" in text or any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            raise InputError(f"{where}{place or 'config'}: {text[:100]!r} holds a character that neither a text nor a path may have")
        if holds_secret(text):
            raise InputError(
                f"{where}{place or 'config'}: holds a password or a token, which would be written into the run; leave it out: credentials "
                f"come from the environment (`hf auth login` or HF_TOKEN; a store's own variables)"
            )
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(where + _one_line(error, model)) from None
