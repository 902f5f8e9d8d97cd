"""A student as a folder that transformers loads: safetensors, config, tokenizer and a model card."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from jaxdistill.checkpoint import Checkpoints
from jaxdistill.config import ExportConfig, MeshConfig, load_config
from jaxdistill.data import save_tokenizer
from jaxdistill.errors import InputError, nearest
from jaxdistill.models import EncoderConfig, load_pretrained, save_pretrained
from jaxdistill.resolve import Run, resolve
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state
from jaxdistill.students import export_pooler, student_key


def export_student(folder: Path, config: EncoderConfig, params: dict, *, tokenizer: Path, dtype: str, card: str) -> Path:
    """Write the folder whole or not at all; one that is there is replaced.

    The folder is the base model (AutoModel), or with a classification head one for AutoModelForSequenceClassification; a
    student with an MLM head has it in the subfolder mlm/ (AutoModelForMaskedLM).

    Args:
      params: of the encoder, with "pooler" for a base model that loads without a missing key, with "mlm" for the head.
      tokenizer: folder whose tokenizer goes along.
      card: text of README.md.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    heads = {temporary: "classifier" if "classifier" in params else None} | ({temporary / "mlm": "mlm"} if "mlm" in params else {})
    for place, head in heads.items():
        place.mkdir(parents=True)
        save_pretrained(place, config, params, head=head, dtype=dtype)
        save_tokenizer(tokenizer, place, config.max_sequence_length)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def export_run(run: Run, params: dict[str, dict], teacher_params: dict, *, keep: bool = False) -> dict[str, Path]:
    """RUN/export/<student> for every student; `keep` leaves a folder that is there as it is."""
    folders = {student.name: run.output / "export" / student.name for student in run.students}
    for name, folder in folders.items():
        if not (keep and folder.is_dir()):
            export_run_student(run, name, params[name], teacher_params, folder, dtype=run.config.export.dtype)
    return folders


def export_run_student(run: Run, name: str, params: dict, teacher_params: dict, folder: Path, *, dtype: str) -> Path:
    """The folder of one student of a run: its encoder and a pooler, or the classification head that it has; no projections and
    nothing else of the teacher."""
    config = next(student.config for student in run.students if student.name == name)
    if "classifier" not in params:  # which has, for BERT, the pooler that was trained with it
        params = params | {"pooler": export_pooler(config, student_key(run.config.training.seed, name), run.teacher, teacher_params)}
    # The dropout of the distillation is no advice for a fine-tuning: the file has the teacher's rates.
    config = dataclasses.replace(config, hidden_dropout=run.teacher.hidden_dropout, attention_dropout=run.teacher.attention_dropout)
    card = model_card(name, run, config)
    return export_student(folder, config, params, tokenizer=run.tokenizer_source, dtype=dtype, card=card)


def model_card(name: str, run: Run, student: EncoderConfig) -> str:
    """What a reader needs to know of a student, in the Hub's format."""
    config, training = run.config, run.config.training
    sources = ", ".join(Path(source.path).name if source.path else str(source.dataset) for source in config.data.sources or ())
    text = f"task | {run.task.title} ({config.data.task.name}), one example a row" if run.task else f"text | {sources}"
    own = next(student for student in run.students if student.name == name)
    objective = "; ".join(term.description for term in own.terms)
    before = "".join(f", after {stage}" for stage in [name for name in run.saved.stages if name != run.stage][-1:])
    head = ("", "")
    if own.has_mlm_head:
        masked = 'AutoModelForMaskedLM.from_pretrained("path/to/this/folder", subfolder="mlm")'
        head = (", AutoModelForMaskedLM", f"masked_language_model = {masked}\n")
    use, kind = "An encoder to fine-tune. The distillation did not train its pooler.", "AutoModel"
    if own.has_classifier:
        outputs = f"the labels {', '.join(student.labels)}" if len(student.labels) > 1 else "one number, the task's own"
        use, kind = f"A finished model for {run.task.title}: its outputs are {outputs}.", "AutoModelForSequenceClassification"
    return f"""---
library_name: transformers
tags: [distillation, jaxdistill]
---
# {name}

A {student.family} encoder of {student.num_layers} layers x {student.hidden_size} ({student.num_heads} heads, feed-forward
{student.intermediate_size}), distilled with jaxdistill from `{config.teacher_name}`.

| | |
|---|---|
| teacher | {config.teacher_name} |
| {text} |
| training | {training.steps:,} steps of {training.batch_size} x {config.data.sequence_length} tokens, {own.input} text{before} |
| objective (student layer <- teacher layer) | {objective} |

```python
from transformers import {kind}{head[0]}, AutoTokenizer

model = {kind}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
{head[1]}```

{use}
"""


def export_checkpoint(
    folder: Path, *, student: str | None, step: int | None, dtype: str, to: Path | None, overwrite: bool
) -> Iterator[Path]:
    """Export students of a run from one of its checkpoints; yields the folders as they are written.

    Raises:
      InputError: no run, no such student, step or dtype, or a folder that is there and `overwrite` is not given.
    """
    if dtype not in get_args(ExportConfig.model_fields["dtype"].annotation):
        raise InputError(f"--dtype: {dtype!r} is not one of float32, float16, bfloat16")
    run = resolve(load_config(folder, ["mesh={}"]), num_devices=1)
    names = [s.name for s in run.students]
    if student is not None and student not in names:
        raise InputError(f"--student: {folder} has no student {student!r}{nearest(student, names)}")
    wanted = [student] if student else names
    targets = {name: (to or folder / "export") / name for name in wanted}
    for target in targets.values():
        if target.exists() and not overwrite:
            raise InputError(f"{target} exists; give another folder with --to, or --overwrite")
        if target.exists() and not (target / "model.safetensors").is_file():
            raise InputError(f"{target} exists and is not a model folder; give another folder with --to")
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: no checkpoint yet; `jaxdistill distill {folder}` goes on with the run")
    _, teacher_params = load_pretrained(run.teacher_folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise InputError(f"--step: {folder} has checkpoints of steps {', '.join(map(str, steps)) or 'none'}, not {step or 'any'}")
        state = checkpoints.restore(step or steps[-1], abstract_state(run, teacher_params, create_mesh(MeshConfig(), jax.devices()[:1])))
    for name, target in targets.items():
        params = jax.tree.map(np.asarray, state.students[name].trained["params"])
        yield export_run_student(run, name, params, teacher_params, target, dtype=dtype)
