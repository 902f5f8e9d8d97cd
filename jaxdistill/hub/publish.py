"""`export`: students of a run as folders, or as repositories of the Hub, each with a card that holds its scores."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jaxdistill.card import Published, Score, licence_of
from jaxdistill.compare.cells import read_cells
from jaxdistill.config import load_config
from jaxdistill.errors import InputError
from jaxdistill.export import export_checkpoint, students_of
from jaxdistill.hub.push import Push, look, push_folder, show
from jaxdistill.models import weights_sha256
from jaxdistill.processes import is_main
from jaxdistill.redaction import redacted
from jaxdistill.resolve import resolve_stages
from jaxdistill.results import is_result, read_result
from jaxdistill.tasks import TASKS
from jaxdistill.tasks.read import HUB

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def export_command(
    folder: Path,
    *,
    student: str | None,
    step: int | None,
    dtype: str,
    to: Path | None,
    push: Push | None,
    licence: str | None,
    results: Path,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Write the folders, or push them to the Hub, or with `dry_run` show what either would do.

    Raises:
      InputError: as `export_checkpoint` and `push_folder`; a licence that is not known and not given; one name for two students.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        meant = f"; {licence.lower()}?" if _LICENCE.fullmatch(licence.lower()) else ""
        raise InputError(f"--license: {licence!r} is no identifier of the Hub, as apache-2.0, mit, cc-by-sa-4.0, other{meant}")
    runs = resolve_stages(load_config(folder, ["mesh={}"]), num_devices=1)
    names = students_of(runs[-1], student, folder)
    repositories = push.names(names) if push else {}
    if push and not licence:
        check_licences(runs, names, dry_run)
    remotes = {name: look(push, repository, dry_run=dry_run, overwrite=overwrite) for name, repository in repositories.items()}
    with ExitStack() as stack:
        # What is only shown or uploaded leaves no folder behind.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) if dry_run or (push and not to) else None
        targets = {name: (scratch or to or folder / "export") / name for name in names}
        there = {"repositories": repositories, "revision": push.revision if push else "main"}
        publish = partial(published, folder=folder, licence=licence, results=results, **there)
        written = export_checkpoint(folder, runs, targets, step=step, dtype=dtype, overwrite=overwrite, publish=publish)
        for name, place in zip(names, written, strict=is_main()):  # the others have nothing written
            if dry_run:
                show(place, push, remotes.get(name), (to or folder / "export") / name)
            elif push:
                print(redacted(push_folder(place, push, remotes[name])))
            else:
                print(place)


def check_licences(runs, names: list[str], dry_run: bool) -> None:
    """Refuses to publish under a licence that nobody named; a dry run says so alone."""
    for name in names:
        if not licence_of([run for run in runs if any(each.name == name for each in run.students)]):
            message = (
                "--license: the teacher's own card names no licence; say under which the student is to stand (apache-2.0, ..., unknown)"
            )
            if not dry_run:
                raise InputError(message)
            print(f"to push it, give a licence: {message}")


def published(
    name: str,
    step: int | None,
    written: Path,
    *,
    folder: Path,
    licence: str | None,
    results: Path,
    repositories: dict[str, str],
    revision: str,
) -> Published:
    """What the card says that only the command knows: where the student will lie, and the scores of these very weights."""
    hashes = {weights_sha256(written): ""}
    exported = folder / "export" / name
    if step is None and (exported / "config.json").is_file():
        hashes.setdefault(weights_sha256(exported), "Scores of the same weights in the type in which the run exported them")
    scores, notes = find_scores(hashes, results)
    place = repositories.get(name) or "path/to/this/folder"
    return Published(place=place, revision=revision, licence=licence, scores=scores, notes=notes)


def find_scores(hashes: dict[str, str], results: Path) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """The main and other metrics of the model with one of these weights, and notes: hash -> what to note of it."""
    for path in filter(is_result, sorted(results.glob("*.json")) if results.is_dir() else ()):
        value = read_result(path)
        sha256 = value["model"].get("weights_sha256")
        if sha256 not in hashes or not value.get("scores"):
            continue
        cells, notes = read_cells(value["scores"], str(path))
        protocol = value["scores"].get("protocol", {}).get("name")
        scores = []
        for (task, test, metric), cell in cells.items():
            split = TASKS[task].tests[test]
            place = (TASKS[task].title, HUB[split.suite], split.name, test, metric)
            scores.append(Score(*place, cell.mean, cell.deviation, len(cell.values)))
        said = [f"Protocol {protocol} of `jaxdistill evaluate`, mean ± standard deviation over seeds"] if protocol else []
        return tuple(scores), tuple(note for note in [hashes[sha256], *said, *notes] if note)
    return (), ()
