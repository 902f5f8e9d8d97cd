"""The model card of a student: what a stranger needs to know before using it, in the Hub's format."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdistill.config import SourceConfig, parse_yaml
from jaxdistill.errors import InputError
from jaxdistill.metrics import FILE_NAME, read_history
from jaxdistill.models import EncoderConfig, hub_origin, num_parameters, split_revision
from jaxdistill.progress import duration, significant
from jaxdistill.redaction import redacted
from jaxdistill.resolve import Run
from jaxdistill.students import describe_initialisation
from jaxdistill.train_step import Student

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARRIED = ("license", "license_name", "license_link", "language", "base_model")


@dataclass(frozen=True)
class Score:
    """A score of `evaluate` on one test: mean and deviation over seeds, in percent."""

    title: str  # of the task
    dataset: str  # id on the Hub
    name: str  # configuration of the dataset; "" where it has one only
    split: str
    metric: str
    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Published:
    """What a card says beside what the run knows."""

    place: str = "path/to/this/folder"  # a Hub id, or a folder
    dtype: str = "float32"
    step: int | None = None  # of the checkpoint; None: the last
    licence: str | None = None  # None: the teacher's
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()  # about the scores
    versions: Mapping[str, str] | None = None  # packages that trained it
    teacher_sha256: str = ""


def card_of(folder: Path) -> dict[str, Any]:
    """The metadata of the card in a model folder; empty where there is none that can be read."""
    file = folder / "README.md"
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = _FRONT_MATTER.match(text)
        values = parse_yaml(found[1], str(file)) if found else {}
    except (InputError, OSError, UnicodeDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def licence_of(stages: Sequence[Run]) -> dict[str, str]:
    """`license` (with `license_name` and `license_link`) that the teachers of a student's runs ask for; empty where one does not say.

    Of teachers under different licences the student is under all of them: `other`, with their names.
    """
    found = [{key: str(value) for key, value in teacher_facts(run).items() if key.startswith("license")} for run in stages]
    if not all(each.get("license") for each in found):
        return {}
    names = list(dict.fromkeys(each.get("license_name") or each["license"] for each in found))
    return found[0] if len(names) == 1 else {"license": "other", "license_name": " and ".join(names)}


def teacher_facts(run: Run) -> dict[str, Any]:
    """What the teacher's own card says of licence and language, and which model of the Hub it is (`base_model`)."""
    folder = run.teacher_folder.parent if run.teacher_folder.name == "mlm" else run.teacher_folder
    card = card_of(folder)
    facts = {name: card[name] for name in _CARRIED if isinstance(card.get(name), (str, list))}
    if not isinstance(facts.get("license", ""), str):  # several: the first is what the Hub shows
        facts["license"] = next((each for each in facts["license"] if isinstance(each, str)), "unknown")
    if "jaxdistill" not in (card.get("tags") or ()):
        facts.pop("base_model", None)  # what the teacher itself was made from; of a student of ours, the origin of both
    origin, name = hub_origin(folder), str(run.config.teacher_name)
    if origin or _HUB_NAME.fullmatch(name):
        facts["base_model"] = origin[0] if origin else name
    return facts


def model_card(run: Run, name: str, shape: EncoderConfig, stages: Sequence[Run], published: Published) -> str:
    """The text of README.md.

    Args:
      shape: of the exported folder.
      stages: the runs that trained the student, `run` last.
    """
    own, facts = _student(run, name), teacher_facts(stages[0])
    licence = {"license": published.licence} if published.licence else licence_of(stages)
    metadata = _metadata(run, own, facts, licence, published.scores)
    scores = ""
    if published.scores:
        rows = "".join(
            f"| {score.title} {score.split} | {score.metric} | {_shown(score)} | {score.seeds} |\n" for score in published.scores
        )
        notes = "".join(f"\n{note}." for note in published.notes)
        scores = f"\n## Scores\n\n| test | metric | score, % | seeds |\n|---|---|---:|---:|\n{rows}{notes}\n" if rows else ""
    parameters = f"{num_parameters(shape) / 1e6:,.1f} M parameters (the teacher has {num_parameters(run.teacher) / 1e6:,.1f} M)"
    layers = f"{shape.num_layers} layer{'s' if shape.num_layers > 1 else ''}"
    table = "".join(f"| {row} | {text} |\n" for row, text in _rows(run, own, stages, facts, licence, published))
    return redacted(f"""---
{metadata}
---
# {published.place.rpartition("/")[2] if _HUB_NAME.fullmatch(published.place) else name}

A {shape.family} encoder of {layers} x {shape.hidden_size} ({shape.num_heads} heads, feed-forward
{shape.intermediate_size}), {parameters}, distilled with jaxdistill from {_teacher(stages[0], facts)}.

| | |
|---|---|
{table}{scores}
## How to load it

{_loading(own, published.place)}
{_limits(run, own, shape)}
""")


def _student(run: Run, name: str) -> Student:
    return next(student for student in run.students if student.name == name)


def _shown(score: Score) -> str:
    return f"{score.mean:.1f}" + ("" if score.deviation is None else f" ± {score.deviation:.1f}")


def _cell(text: object) -> str:
    """Within a cell of a table, whatever it holds."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _metadata(run: Run, own: Student, facts: Mapping[str, Any], licence: Mapping[str, str], scores: Sequence[Score]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    kinds = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=score.dataset,
            dataset_name=score.title,
            dataset_config=score.name or None,
            dataset_split=score.split,
            metric_type=kinds.get(score.metric, score.metric),
            metric_name=f"{score.metric}, %" + (f", mean of {score.seeds} seeds" if score.seeds > 1 else ""),
            metric_value=round(score.mean, 2),
        )
        for score in scores
    ]
    datasets = [source.dataset for source in run.config.data.sources or () if source.dataset]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if own.has_classifier else "feature-extraction",
        tags=["distillation", "jaxdistill"],
        language=facts.get("language"),
        base_model=facts.get("base_model"),
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=own.name if results else None,
        eval_results=results or None,
        **licence,
    )
    return data.to_yaml()


def _teacher(run: Run, facts: Mapping[str, Any]) -> str:
    """By its name, with a link and its commit where it is of the Hub."""
    name, revision = _cell(run.config.teacher_name), split_revision(run.config.teacher)[1]
    origin = hub_origin(run.teacher_folder.parent if run.teacher_folder.name == "mlm" else run.teacher_folder)
    link = origin[0] if origin else name if _HUB_NAME.fullmatch(name) else ""
    revision = origin[1] if origin else revision
    if not link:
        made = facts.get("base_model")
        return f"`{name}`" + (f", made from {made}" if isinstance(made, str) and _HUB_NAME.fullmatch(made) else "")
    return f"[{name}](https://huggingface.co/{link})" + (f" at revision `{revision}`" if revision else "")


def _data(run: Run) -> tuple[str, str]:
    if run.task:
        return "task", f"{run.task.title} ({run.config.data.task.name}), one example a row"
    return "text", "; ".join(map(_source, run.config.data.sources or ()))


def _source(source: SourceConfig) -> str:
    share = "" if source.weight is None else f", weight {source.weight:g}"
    if source.path is not None:  # the name alone: where it lay is nobody's business
        return f"`{_cell(Path(source.path).name)}`{share}"
    parts = [f"[{source.dataset}](https://huggingface.co/datasets/{source.dataset})", source.name, source.split]
    revision = f", revision `{source.revision}`" if source.revision else ""
    return _cell(", ".join(filter(None, parts))) + revision + share


def _rows(
    run: Run, own: Student, stages: Sequence[Run], facts: Mapping[str, Any], licence: Mapping[str, str], published: Published
) -> list[tuple[str, str]]:
    name, config = own.name, run.config
    rows = [("teacher", f"{_teacher(stages[0], facts)}, {stages[0].teacher.num_layers} x {stages[0].teacher.hidden_size}")]
    if published.teacher_sha256:
        rows.append(("sha256 of the last teacher's weights", f"`{published.teacher_sha256}`"))
    rows.append(_data(run))
    first = stages[0].config.students[name]
    rows.append(("start", _cell(_started(describe_initialisation(first, stages[0].copied[name])))))
    for stage in stages:
        before = f", after {stages[stages.index(stage) - 1].stage}" if stage is not stages[0] else ""
        title = f"stage {stage.stage}: " if len(stages) > 1 else ""
        rows += [(title + row, text) for row, text in _training(stage, name, before, published.step if stage is run else None)]
    rows.append(("precision", f"{config.training.precision} products, float32 parameters; these weights are {published.dtype}"))
    said = licence.get("license_name") or licence.get("license")
    whose = "" if published.licence else ", as the teacher"
    rows.append(("licence", _cell(f"{said}{whose}") if said else "not stated by the teacher: ask its makers before you pass this model on"))
    if published.versions:
        rows.append(("software", ", ".join(f"{package} {version}" for package, version in published.versions.items())))
    return rows


def _started(phrase: str) -> str:
    """The description of a start, of a checkpoint the name alone."""
    kind, _, place = phrase.partition(" ")
    return phrase if kind != "checkpoint" else f"the checkpoint {place if _HUB_NAME.match(place) else Path(place).name}"


def _training(run: Run, name: str, before: str, step: int | None) -> list[tuple[str, str]]:
    """What one run did to a student: length, objective, optimizer, hardware, losses."""
    own, config, training = _student(run, name), run.config, run.config.training
    records = [each for each in _history(run) if step is None or each["step"] <= step]
    tokens = max((record.get("tokens") or 0 for record in records), default=0)
    done = step or training.steps
    length = f"{done:,} steps of {training.batch_size:,} x {config.data.sequence_length} tokens"
    length += f" (of {training.steps:,} planned)" if done != training.steps else ""
    seen = f"; {tokens:,} tokens seen" if tokens else ""
    rate = config.optimizer_of(name)
    optimizer = (
        f"AdamW, learning rate {rate.learning_rate:g}, {rate.schedule}, warm-up {rate.warmup:g}, betas {rate.b1:g} and {rate.b2:g}, "
    )
    optimizer += f"epsilon {rate.eps:g}, weight decay {rate.weight_decay:g}, clipping at {rate.clip_norm:g}; seed {training.seed}"
    rows = [("training", f"{length}, {own.input} text{before}{seen}")]
    if before:
        rows.append(("teacher", _teacher(run, teacher_facts(run))))
    rows.append(("objective (student layer <- teacher layer)", _cell("; ".join(term.description for term in own.terms))))
    rows.append(("optimizer", optimizer))
    if hardware := _hardware(records):
        rows.append(("hardware", hardware))
    held_out = [record[f"{name}/held_out"] for record in records if _is_number(record.get(f"{name}/held_out"))]
    if held_out:
        rows.append(("held-out loss", f"{significant(held_out[0])} before, {significant(held_out[-1])} after"))
    return rows


def _history(run: Run) -> list[dict[str, Any]]:
    return read_history(run.output) if (run.output / FILE_NAME).is_file() else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _hardware(records: Sequence[Mapping[str, Any]]) -> str:
    """Devices with the time on each, in the order in which they came: a run may go on elsewhere."""
    spent: dict[str, float] = {}
    before = 0.0
    for record in records:
        if isinstance(record.get("devices"), str) and _is_number(record.get("seconds")):
            spent[record["devices"]] = spent.get(record["devices"], 0.0) + max(record["seconds"] - before, 0.0)
            before = record["seconds"]
    return ", then ".join(f"{_cell(devices)} for {duration(seconds)} (h:min:s)" for devices, seconds in spent.items())


def _loading(own: Student, place: str) -> str:
    kind = "AutoModelForSequenceClassification" if own.has_classifier else "AutoModel"
    head = ("", "")
    if own.has_mlm_head:
        masked = f'AutoModelForMaskedLM.from_pretrained("{place}", subfolder="mlm")'
        head = (", AutoModelForMaskedLM", f"masked_language_model = {masked}  # the same encoder with its MLM head\n")
    return f"""```python
from transformers import {kind}{head[0]}, AutoTokenizer

model = {kind}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
{head[1]}```
"""


def _limits(run: Run, own: Student, shape: EncoderConfig) -> str:
    use = "An encoder to fine-tune. The distillation did not train its pooler."
    if own.has_classifier:
        outputs = f"the labels {', '.join(shape.labels)}" if len(shape.labels) > 1 else "one number, the task's own"
        use = f"A finished model for {run.task.title}: its outputs are {outputs}."
    return f"""## Limits

{use}
It takes at most {shape.max_sequence_length} tokens and was distilled on rows of {run.config.data.sequence_length}. It has learnt to
repeat its teacher on the text above, errors and biases included; languages and domains that the text lacks were not trained, and nothing
beyond what this card lists was measured."""
