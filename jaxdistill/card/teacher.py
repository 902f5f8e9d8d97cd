"""What a student's card says of its teacher: which model it is, under which licence, with which weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.card.cells import HUB_NAME, cell, linked
from jaxdistill.config import parse_yaml
from jaxdistill.errors import InputError
from jaxdistill.models import hub_origin, sha256_of_weights, split_revision
from jaxdistill.resolve import Run

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_CARRIED = ("license", "license_name", "license_link", "language", "base_model")


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
    if origin or HUB_NAME.fullmatch(name):
        facts["base_model"] = origin[0] if origin else name
    return facts


def teacher_named(run: Run, facts: Mapping[str, Any]) -> str:
    """By its name, with a link and its commit where it is of the Hub."""
    name, revision = cell(run.config.teacher_name), split_revision(run.config.teacher)[1]
    origin = hub_origin(run.teacher_folder.parent if run.teacher_folder.name == "mlm" else run.teacher_folder)
    link = origin[0] if origin else name if HUB_NAME.fullmatch(name) else ""
    revision = origin[1] if origin else revision
    if not link:
        made = facts.get("base_model")
        return f"`{name}`" + (f", made from {made}" if isinstance(made, str) and HUB_NAME.fullmatch(made) else "")
    return linked(name, link) + (f" at revision `{revision}`" if revision else "")


def weights_row(run: Run, files: Mapping[str, str], sha256: str, *, last: bool = False) -> tuple[str, str]:
    """What the weights that the run learnt from can be told by.

    Args:
      files: name -> sha256 of each file of the teacher as it lies here now.
      sha256: of the weights as the run knows them, `sha256_of_weights`.
      last: there were other teachers before.
    """
    whose = "the last teacher's" if last else "the teacher's"
    if sha256 != sha256_of_weights(files):
        return f"sha256 of the sha256 of each file of {whose} weights", f"`{sha256}`; the files here have changed since"
    place = "mlm/" if run.teacher_folder.name == "mlm" else ""
    if len(files) == 1:
        return f"sha256 of {whose} {place}{next(iter(files))}", f"`{next(iter(files.values()))}`"
    return f"sha256 of {whose} weights", ", ".join(f"`{place}{name}` `{digest}`" for name, digest in files.items())
