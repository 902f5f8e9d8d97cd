"""A config with stages as the runs that it is made of, one after the other.

A stage is an ordinary run in a folder of its own (RUN/stages/<name>); the last is the run itself (RUN). What a stage leaves
for the next is what any run leaves: the exported students. So a boundary needs no state of its own: a run that was
interrupted finds the finished stages and goes on in the one under way.
"""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path

from jaxdistill.config import CheckpointConfig, Config, ExportConfig, PreviousStudent, StageConfig, StudentConfig, changed
from jaxdistill.errors import InputError, nearest


@dataclass(frozen=True)
class Stage:
    """One run of several. `objective` and `students` say where in the config these come from, for messages."""

    name: str  # "" for a run without stages
    config: Config
    objective: str = "objective"
    teacher: str = "teacher"
    students: str = "students"


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The runs of a config, the first one first.

    Raises:
      InputError: a stage that names a student which no stage before it has; names the place in the config.
    """
    for name, student in config.students.items():
        if isinstance(student.initialise, PreviousStudent) and not config.stages:
            raise InputError(f"students.{name}.initialise: a student of the stage before, and the config has no stages")
    if not config.stages:
        return (Stage("", config),)
    output = Path(os.path.expanduser(config.output)).absolute()
    found: list[Stage] = []
    known = dict(config.students)
    folders: dict[str, Path] = {}  # of the stage that trained a student last
    for number, (name, stage) in enumerate(config.stages.items()):
        folder = output / "stages" / name if number < len(config.stages) - 1 else output
        place = f"stages.{name}"
        students = _students(stage, known, place)
        known |= students if isinstance(stage.students, dict) else {}  # what a stage says of the run's holds for itself alone
        where = f"{place}.students" if isinstance(stage.students, dict) else "students"
        students = {own: _started(own, student, stage, found, folders, f"{where}.{own}") for own, student in students.items()}
        seed = config.training.seed + number  # another stage, another order of the text
        # None: in the run's folder, wherever that may lie one day.
        store = config.data.store or (None if folder == output or config.data.task else str(output / "tokens"))
        training = changed(config.training.model_copy(update={"seed": seed}), stage.training)
        fields = _teacher(stage, found, place) | {
            "students": students,
            "objective": stage.objective or config.objective,
            "optimizer": changed(config.optimizer, stage.optimizer),
            "training": training,
            "data": config.data.model_copy(update={"store": store}),
            "export": config.export if folder == output else ExportConfig(),  # in full precision to the next stage
            "stages": {},
            "output": str(folder),
        }
        places = (f"{place}.{field}" if getattr(stage, field) else field for field in ("objective", "teacher"))
        found.append(Stage(name, config.model_copy(update=fields), *places, where))
        folders |= dict.fromkeys(students, folder)
    return tuple(found)


def _students(stage: StageConfig, known: dict[str, StudentConfig], place: str) -> dict[str, StudentConfig]:
    """The students of a stage: its own, or those of the run that its patterns match; what the stage says goes over theirs."""
    if isinstance(stage.students, dict):
        return dict(stage.students)
    patterns = stage.students or ("*",)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise InputError(f"{place}.students: no student matches {pattern!r}{nearest(pattern, known)}")
    said = {"objective": None, "input": None} if stage.objective else {}
    own = {name: student for name, student in known.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    rates = {name: student.optimizer and changed(student.optimizer, stage.optimizer) for name, student in own.items()}
    return {name: student.model_copy(update=said | {"optimizer": rates[name]}) for name, student in own.items()}


def _previous(student: str, found: list[Stage], place: str) -> Path:
    """The exported folder of a student of the stage before."""
    if not found:
        raise InputError(f"{place}: a student of the stage before, and this is the first stage")
    before = found[-1]
    if student not in before.config.students:
        raise InputError(f"{place}: the stage before, {before.name}, has no student {student!r}{nearest(student, before.config.students)}")
    return Path(before.config.output) / "export" / student


def _started(
    name: str, student: StudentConfig, stage: StageConfig, found: list[Stage], folders: dict[str, Path], place: str
) -> StudentConfig:
    """The student with its start as a checkpoint, where it goes on from an earlier stage."""
    # By its value and not by whether it was said: in the config that a run keeps, every default is spelled out.
    if name in folders and not (isinstance(stage.students, dict) and student.initialise != "random"):
        folder = folders[name] / "export" / name
    elif isinstance(student.initialise, PreviousStudent):
        folder = _previous(student.initialise.student, found, f"{place}.initialise")
    else:
        return student
    return student.model_copy(update={"initialise": CheckpointConfig(checkpoint=str(folder)), "embeddings": "random"})


def _teacher(stage: StageConfig, found: list[Stage], place: str) -> dict[str, str | None]:
    if stage.teacher is None:
        return {}
    if isinstance(stage.teacher, str):
        return {"teacher": stage.teacher, "teacher_name": None}
    student = stage.teacher.student
    return {"teacher": str(_previous(student, found, f"{place}.teacher")), "teacher_name": f"{student} (stage {found[-1].name})"}
