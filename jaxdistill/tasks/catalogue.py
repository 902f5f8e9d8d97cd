"""The tasks: their columns, labels, splits and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxdistill.errors import InputError, nearest

NLI = ("entailment", "neutral", "contradiction")
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


@dataclass(frozen=True)
class Split:
    """Rows of one configuration of a dataset: `name` of `suite` on the Hub, the folder suite/name (or name) here."""

    suite: str  # glue, xnli, snli
    name: str  # configuration; "" where the dataset has one only
    split: str


@dataclass(frozen=True)
class Task:
    """One task. `tests` are what a model is scored on, by the name that the score gets; the first one is the dev set."""

    name: str
    title: str  # as in the papers' tables
    columns: tuple[str, ...]  # one text or two
    labels: tuple[str, ...]  # in the order of their numbers; () is regression
    metrics: tuple[str, ...]  # the first one stands for the task in an average
    train: Split
    tests: dict[str, Split] = field(default_factory=dict)
    range: tuple[float, float] | None = None  # of a regression's label

    @property
    def num_labels(self) -> int:
        return len(self.outputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the outputs of a classification head for the task are called; a regression has one."""
        return self.labels or ("score",)


def _glue(name: str, title: str, columns: str, labels: tuple[str, ...], metrics: str, *, dev: tuple[str, ...] = ("validation",), **more):
    tests = {split: Split("glue", name, split) for split in dev}
    return Task(name, title, tuple(columns.split()), labels, tuple(metrics.split()), Split("glue", name, "train"), tests, **more)


_XNLI_TESTS = {language: Split("xnli", language, "test") for language in XNLI_LANGUAGES}
_PAIR = "sentence1 sentence2"
_NOT = ("entailment", "not_entailment")
# Metrics: Wang et al. 2019 (GLUE). udagawa2023 prints MRPC's F1 and STS-B's Pearson.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "CoLA", "sentence", ("unacceptable", "acceptable"), "matthews"),
        _glue("sst2", "SST-2", "sentence", ("negative", "positive"), "accuracy"),
        _glue("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), "f1 accuracy"),
        _glue("stsb", "STS-B", _PAIR, (), "pearson spearman", range=(0.0, 5.0)),
        _glue("qqp", "QQP", "question1 question2", ("not_duplicate", "duplicate"), "accuracy f1"),
        _glue("mnli", "MNLI", "premise hypothesis", NLI, "accuracy", dev=("validation_matched", "validation_mismatched")),
        _glue("qnli", "QNLI", "question sentence", _NOT, "accuracy"),
        _glue("rte", "RTE", _PAIR, _NOT, "accuracy"),
        _glue("wnli", "WNLI", _PAIR, ("not_entailment", "entailment"), "accuracy"),
        Task(
            "xnli", "XNLI", ("premise", "hypothesis"), NLI, ("accuracy",), Split("xnli", "en", "train"),
            {"validation": Split("xnli", "en", "validation")} | _XNLI_TESTS,
        ),
        Task(
            "snli", "SNLI", ("premise", "hypothesis"), NLI, ("accuracy",), Split("snli", "", "train"),
            {"validation": Split("snli", "", "validation")} | _XNLI_TESTS,
        ),
    )
}  # fmt: skip
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
SUITES = {"glue": GLUE, "xnli": ("xnli",)}


def find_tasks(names: tuple[str, ...], where: str = "tasks") -> tuple[Task, ...]:
    """Tasks by name; `glue` stands for its nine.

    Raises:
      InputError: an unknown name.
    """
    found: dict[str, Task] = {}
    for i, name in enumerate(names):
        if name not in TASKS and name not in SUITES:
            raise InputError(f"{where}.{i}: unknown task {name!r}{nearest(name, {*TASKS, *SUITES})}")
        found |= {each: TASKS[each] for each in SUITES.get(name, (name,))}
    return tuple(found.values())
