"""A student as a folder that transformers loads: safetensors, config, tokenizer and a model card."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from jaxdistill import processes
from jaxdistill.card import Published, model_card
from jaxdistill.checkpoint import Checkpoints, package_versions
from jaxdistill.config import ExportConfig, MeshConfig
from jaxdistill.data import RowSource, TokenStore, save_tokenizer
from jaxdistill.errors import InputError, nearest
from jaxdistill.faults.checksums import DamagedError
from jaxdistill.faults.disk import writing
from jaxdistill.models import EncoderConfig, load_pretrained, save_pretrained, sha256_of_weights, weight_files
from jaxdistill.resolve import Run, resolve_stages
from jaxdistill.sharding import create_mesh, on_host
from jaxdistill.state import abstract_state
from jaxdistill.students import export_pooler, student_key
from jaxdistill.update import TrainState


def export_student(
    folder: Path, config: EncoderConfig, params: dict, *, tokenizer: Path, dtype: str, card: str | Callable[[Path], str]
) -> Path:
    """Write the folder whole or not at all; one that is there is replaced.

    The folder is the base model (AutoModel), or with a classification head one for AutoModelForSequenceClassification; a
    student with an MLM head has it in the subfolder mlm/ (AutoModelForMaskedLM).

    Args:
      params: of the encoder, with "pooler" for a base model that loads without a missing key, with "mlm" for the head.
      tokenizer: folder whose tokenizer goes along.
      card: text of README.md, or what makes it of the folder with all other files in it.
    """
    with writing("export", folder.parent):
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        heads = {temporary: "classifier" if "classifier" in params else None} | ({temporary / "mlm": "mlm"} if "mlm" in params else {})
        for place, head in heads.items():
            place.mkdir(parents=True)
            save_pretrained(place, config, params, head=head, dtype=dtype)
            save_tokenizer(tokenizer, place, config.max_sequence_length)
        (temporary / "README.md").write_text(card if isinstance(card, str) else card(temporary), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return folder


def export_run(run: Run, rows: RowSource, params: dict[str, dict], teacher_params: dict, *, keep: bool = False) -> dict[str, Path]:
    """RUN/export/<student> for every student; `keep` leaves a folder that is there as it is. `rows`: what the run has read."""
    folders = {student.name: run.output / "export" / student.name for student in run.students}
    wanted = {name: folder for name, folder in folders.items() if not (keep and folder.is_dir())}
    if wanted:
        stages = resolve_stages(run.saved.model_copy(update={"mesh": MeshConfig()}), num_devices=1)[:-1] if run.saved.stages else ()
        files, text = weight_files(run.teacher_folder), rows.manifest if isinstance(rows, TokenStore) else None
        known = {"teacher_sha256": sha256_of_weights(files), "teacher_files": files, "text": text}
        published = Published(versions=package_versions(), **known)
        more = {"dtype": run.config.export.dtype, "stages": stages, "published": lambda _: published}
        for name, folder in wanted.items():
            export_run_student(run, name, params[name], teacher_params, folder, **more)
    return folders


def export_run_student(
    run: Run,
    name: str,
    params: dict,
    teacher_params: dict,
    folder: Path,
    *,
    dtype: str,
    stages: Sequence[Run],
    published: Callable[[Path], Published],
) -> Path:
    """The folder of one student of a run: its encoder and a pooler, or the classification head that it has; no projections and
    nothing else of the teacher.

    Args:
      stages: the runs before this one.
      published: what the card says besides, of a folder that holds all but the card.
    """
    config = next(student.config for student in run.students if student.name == name)
    if "classifier" not in params:  # which has, for BERT, the pooler that was trained with it
        params = params | {"pooler": export_pooler(config, student_key(run.config.training.seed, name), run.teacher, teacher_params)}
    # The dropout of the distillation is no advice for a fine-tuning: the file has the teacher's rates.
    config = dataclasses.replace(config, hidden_dropout=run.teacher.hidden_dropout, attention_dropout=run.teacher.attention_dropout)
    own = [stage for stage in stages if any(student.name == name for student in stage.students)]

    def card(written: Path) -> str:
        return model_card(run, name, config, [*own, run], dataclasses.replace(published(written), dtype=dtype))

    return export_student(folder, config, params, tokenizer=run.tokenizer_source, dtype=dtype, card=card)


def text_of(run: Run, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of the token store that a run has read, if that is still the one with this fingerprint; says so where it is not."""
    if run.task or run.config.data.streaming:
        return None
    try:
        store = TokenStore(run.store)
    except InputError as error:
        print(f"the card says nothing of the text's size: {error}", file=sys.stderr)
        return None
    if store.fingerprint != fingerprint:
        print(f"the card says nothing of the text's size: {store.folder} holds another text by now", file=sys.stderr)
        return None
    return store.manifest


def students_of(run: Run, student: str | None, folder: Path) -> list[str]:
    """The students to export. Raises InputError for one that the run does not have."""
    names = [s.name for s in run.students]
    if student is not None and student not in names:
        raise InputError(f"--student: {folder} has no student {student!r}{nearest(student, names)}")
    return [student] if student else names


def _restored(folder: Path, like: TrainState, step: int | None) -> tuple[int, TrainState, dict[str, Any]]:
    """The step, the state and the record of a checkpoint; without a step of the newest whole one."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise InputError(f"--step: {folder} has checkpoints of steps {', '.join(map(str, steps)) or 'none'}, not {step or 'any'}")
        if step is None:
            taken, state = checkpoints.newest_whole(lambda number: checkpoints.restore(number, like))
            if taken != steps[-1]:
                print(f"checkpoint {steps[-1]} is damaged; exporting step {taken}", file=sys.stderr)
        else:
            taken = step
            try:
                state = checkpoints.restore(step, like)
            except DamagedError as error:
                raise InputError(f"--step: checkpoint {step} is damaged ({error}); there are {', '.join(map(str, steps))}") from None
        return taken, state, checkpoints.record(taken)


def export_checkpoint(
    folder: Path,
    runs: Sequence[Run],
    targets: Mapping[str, Path],
    *,
    step: int | None,
    dtype: str,
    overwrite: bool,
    publish: Callable[[str, int | None, Path], Published],
) -> Iterator[Path]:
    """Export students of a run from one of its checkpoints; yields the folders as they are written.

    Args:
      runs: the run in the folder, resolved for one device, with its stages.
      targets: student -> folder to write.
      publish: what a student's card says besides: its name, the step if it is not the last, its folder without a card.

    Raises:
      InputError: no checkpoint, no such step or dtype, or a folder that is there and `overwrite` is not given.
    """
    if dtype not in get_args(ExportConfig.model_fields["dtype"].annotation):
        raise InputError(f"--dtype: {dtype!r} is not one of float32, float16, bfloat16")
    for target in targets.values():
        if target.exists() and not overwrite:
            raise InputError(f"{target} exists; give another folder with --to, or --overwrite")
        if target.exists() and not (target / "model.safetensors").is_file():
            raise InputError(f"{target} exists and is not a model folder; give another folder with --to")
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: no checkpoint yet; `jaxdistill distill {folder}` goes on with the run")
    run = runs[-1]
    _, teacher_params = load_pretrained(run.teacher_folder)
    # Several processes read a checkpoint onto the devices of all, or not at all.
    mesh = create_mesh(MeshConfig(), jax.devices()[: None if processes.count() > 1 else 1])
    taken, state, record = _restored(folder, abstract_state(run, teacher_params, mesh), step)
    processes.barrier()  # all have seen that the targets may be written
    known: dict[str, Any] = {"versions": record["versions"], "teacher_sha256": record["identity"]["teacher"]}
    if processes.is_main():
        known |= {"teacher_files": weight_files(run.teacher_folder), "text": text_of(run, record["identity"]["data"])}
    shown = None if taken == run.config.training.steps else taken
    for name, target in targets.items():
        params = on_host(state.students[name].trained["params"], mesh)

        def published(written: Path, name: str = name) -> Published:
            return dataclasses.replace(publish(name, shown, written), step=shown, **known)

        if processes.is_main():
            yield export_run_student(run, name, params, teacher_params, target, dtype=dtype, stages=runs[:-1], published=published)
