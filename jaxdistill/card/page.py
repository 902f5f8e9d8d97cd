"""The card's page: metadata, a table of what was done, scores, how to load the student and what it is not for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdistill.card.cells import HUB_NAME, cell
from jaxdistill.card.teacher import licence_of, teacher_facts, teacher_named, weights_row
from jaxdistill.card.text import Manifest, codes_of, datasets_of, text_rows, tokens_by_language
from jaxdistill.metrics import FILE_NAME, read_history
from jaxdistill.models import EncoderConfig, num_parameters
from jaxdistill.progress import duration, significant
from jaxdistill.redaction import redacted
from jaxdistill.resolve import Run
from jaxdistill.students import describe_initialisation
from jaxdistill.train_step import Student


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
    revision: str = "main"  # branch of the Hub
    dtype: str = "float32"
    step: int | None = None  # of the checkpoint; None: the last
    licence: str | None = None  # None: the teacher's
    scores: tuple[Score, ...] = ()
    notes: tuple[str, ...] = ()  # about the scores
    versions: Mapping[str, str] | None = None  # packages that trained it
    teacher_sha256: str = ""  # of its weights, as the run knows them
    teacher_files: Mapping[str, str] = field(default_factory=dict)  # name -> sha256 of those that lie here
    text: Manifest | None = None  # of the token store that the run read


def model_card(run: Run, name: str, shape: EncoderConfig, stages: Sequence[Run], published: Published) -> str:
    """The text of README.md.

    Args:
      shape: of the exported folder.
      stages: the runs that trained the student, `run` last.
    """
    own, facts = _student(run, name), teacher_facts(stages[0])
    licence = {"license": published.licence} if published.licence else licence_of(stages)
    metadata = _metadata(run, own, facts, licence, published)
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
# {published.place.rpartition("/")[2] if HUB_NAME.fullmatch(published.place) else name}

A {shape.family} encoder of {layers} x {shape.hidden_size} ({shape.num_heads} heads, feed-forward {shape.intermediate_size}), \
{parameters}, distilled with jaxdistill from {teacher_named(stages[0], facts)}.

| | |
|---|---|
{table}{scores}
## How to load it

{_loading(own, published)}
{_limits(run, own, shape)}
""")


def _student(run: Run, name: str) -> Student:
    return next(student for student in run.students if student.name == name)


def _shown(score: Score) -> str:
    return f"{score.mean:.1f}" + ("" if score.deviation is None else f" ± {score.deviation:.1f}")


def _metadata(run: Run, own: Student, facts: Mapping[str, Any], licence: Mapping[str, str], published: Published) -> str:
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
        for score in published.scores
    ]
    languages = codes_of(run, published.text)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if own.has_classifier else "feature-extraction",
        tags=["distillation", "jaxdistill"],
        language=facts.get("language") if languages is None else languages or None,
        base_model=facts.get("base_model"),
        datasets=datasets_of(run, published.text) or None,
        model_name=own.name if results else None,
        eval_results=results or None,
        **licence,
    )
    return data.to_yaml()


def _rows(
    run: Run, own: Student, stages: Sequence[Run], facts: Mapping[str, Any], licence: Mapping[str, str], published: Published
) -> list[tuple[str, str]]:
    name, config = own.name, run.config
    rows = [("teacher", f"{teacher_named(stages[0], facts)}, {stages[0].teacher.num_layers} x {stages[0].teacher.hidden_size}")]
    if published.teacher_sha256:
        rows.append(weights_row(run, published.teacher_files, published.teacher_sha256, last=len(stages) > 1))
    rows += text_rows(run, published.text)
    first = stages[0].config.students[name]
    rows.append(("start", cell(_started(describe_initialisation(first, stages[0].copied[name])))))
    for stage in stages:
        before = f", after {stages[stages.index(stage) - 1].stage}" if stage is not stages[0] else ""
        title = f"stage {stage.stage}: " if len(stages) > 1 else ""
        rows += [(title + row, text) for row, text in _training(stage, name, before, published.step if stage is run else None)]
    rows.append(("precision", f"{config.training.precision} products, float32 parameters; these weights are {published.dtype}"))
    said = licence.get("license_name") or licence.get("license")
    whose = "" if published.licence else ", as the teacher"
    rows.append(("licence", cell(f"{said}{whose}") if said else "not stated by the teacher: ask its makers before you pass this model on"))
    if published.versions:
        rows.append(("software", ", ".join(f"{package} {version}" for package, version in published.versions.items())))
    return rows


def _started(phrase: str) -> str:
    """The description of a start, of a checkpoint the name alone."""
    kind, _, place = phrase.partition(" ")
    return phrase if kind != "checkpoint" else f"the checkpoint {place if HUB_NAME.match(place) else Path(place).name}"


def _training(run: Run, name: str, before: str, step: int | None) -> list[tuple[str, str]]:
    """What one run did to a student: length, objective, optimizer, hardware, losses."""
    own, config, training = _student(run, name), run.config, run.config.training
    records = [each for each in _history(run) if step is None or each["step"] <= step]
    last = max(records, key=lambda record: record.get("tokens") or 0, default={})
    done = step or training.steps
    length = f"{done:,} steps of {training.batch_size:,} x {config.data.sequence_length} tokens"
    length += f" (of {training.steps:,} planned)" if done != training.steps else ""
    seen = f"; {last['tokens']:,} tokens seen{tokens_by_language(run, last)}" if last.get("tokens") else ""
    rate = config.optimizer_of(name)
    optimizer = (
        f"AdamW, learning rate {rate.learning_rate:g}, {rate.schedule}, warm-up {rate.warmup:g}, betas {rate.b1:g} and {rate.b2:g}, "
    )
    optimizer += f"epsilon {rate.eps:g}, weight decay {rate.weight_decay:g}, clipping at {rate.clip_norm:g}; seed {training.seed}"
    rows = [("training", f"{length}, {own.input} text{before}{seen}")]
    if before:
        rows.append(("teacher", teacher_named(run, teacher_facts(run))))
    rows.append(("objective (student layer <- teacher layer)", cell("; ".join(term.description for term in own.terms))))
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
    return ", then ".join(f"{cell(devices)} for {duration(seconds)} (h:min:s)" for devices, seconds in spent.items())


def _loading(own: Student, published: Published) -> str:
    kind = "AutoModelForSequenceClassification" if own.has_classifier else "AutoModel"
    place = f'"{published.place}"' + (f', revision="{published.revision}"' if published.revision != "main" else "")
    head = ("", "")
    if own.has_mlm_head:
        masked = f'AutoModelForMaskedLM.from_pretrained({place}, subfolder="mlm")'
        head = (", AutoModelForMaskedLM", f"masked_language_model = {masked}  # the same encoder with its MLM head\n")
    return f"""```python
from transformers import {kind}{head[0]}, AutoTokenizer

model = {kind}.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})
{head[1]}```
"""


def _limits(run: Run, own: Student, shape: EncoderConfig) -> str:
    use = "An encoder to fine-tune. The distillation did not train its pooler."
    if own.has_classifier:
        outputs = f"the labels {', '.join(shape.labels)}" if len(shape.labels) > 1 else "one number, the task's own"
        use = f"A finished model for {run.task.title}: its outputs are {outputs}."
    return f"""## Limits

{use}
It takes at most {shape.max_sequence_length} tokens and was distilled on rows of {run.config.data.sequence_length}. \
It has learnt to repeat its teacher on the text above, errors and biases included; languages and domains that the text lacks were not \
trained, and nothing beyond what this card lists was measured."""
