"""What a student lost of its teacher: layers, relations, attention heads and words, by the length and the language of the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxdistill.config import Config, SourceConfig, load_config
from jaxdistill.data import Masking, TextTokenizer, load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.lost.answers import answers
from jaxdistill.lost.comparison import Model, masked_rows, measure, measure_mlm
from jaxdistill.lost.pictures import draw_all
from jaxdistill.lost.summary import BREAKDOWN, Summary, length_buckets
from jaxdistill.lost.text import ALL, FEWEST_ROWS, Rows, text_rows
from jaxdistill.models import find_model, load_pretrained, weights_sha256, with_mlm_head
from jaxdistill.models import load_config as load_model_config
from jaxdistill.progress import preparing
from jaxdistill.report import print_table, summary_table
from jaxdistill.results import check_same_model, describe_model, find_models, model_name, read_result, result_file, write_section
from jaxdistill.runtime import configure

SHIPPED = Path(__file__).parent.parent / "corpus" / "wikipedia.jsonl"
RATE, MASK, RANDOM = 0.15, 0.8, 0.1  # of the masked places, as BERT was trained

__all__ = ["lost"]


@dataclass(frozen=True)
class Subject:
    """One student to compare, everything checked."""

    name: str
    folder: Path
    description: dict[str, Any]
    teacher: Path
    teacher_name: str
    tokenizer: TextTokenizer
    rows: Rows
    source: str  # of the text, as results name it


def lost(
    student: str,
    *,
    teacher: str | None = None,
    text: str | None = None,
    column: str | None = None,
    language_column: str | None = None,
    rows: int = 256,
    length: int = 128,
    results: str | Path = "results",
    output: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare a student, or all of a run, with the teacher; write the section "lost" and the pictures; return it by student.

    Args:
      student: what `results.find_models` reads.
      teacher: a folder or Hub id; None: the one that the student's run names.
      text: a file, folder or glob; None: what the run held out of its own text, else the sample that ships.
      column: of `text`; None: "text".
      language_column: names the language of each document, for numbers by language.
      rows, length: at most so many paragraphs, of at most so many tokens.
      output: folder of the pictures, <student>/ each; None: RESULTS/lost.

    Raises:
      InputError: models, tokenizers or a text that cannot be compared; before anything is.
    """
    configure()
    if rows < FEWEST_ROWS:
        raise InputError(f"--rows: at least {FEWEST_ROWS}, got {rows}")
    if column is not None and text is None:
        raise InputError("--column: the column of a --text, and none is given (a run's own text has its columns in the run's config)")
    read: dict[tuple, Rows] = {}
    asked = {"text": text, "column": column, "language_column": language_column, "limit": rows, "length": length}
    subjects = [_subject(name, source, teacher, Path(results), asked, read) for name, source in find_models([student]).items()]
    output, sections = Path(results) / "lost" if output is None else Path(output), {}
    for subject in subjects:
        summary = _measured(subject)
        pictures = output / result_file(output, subject.name).stem
        sections[subject.name] = _section(subject, summary)
        draw_all(sections[subject.name]["heatmaps"], pictures, f"{subject.name} against {subject.teacher_name}")
        file = write_section(Path(results), subject.name, subject.description, "lost", sections[subject.name])
        _print(subject, summary, sections[subject.name]["answers"])
        print(f"Heat maps: {pictures}\nNumbers: {file}\n")
    return sections


def _run_of(folder: Path) -> Config | None:
    """The config of the run that a student was exported by, if it lies in one."""
    folder = folder.absolute()
    run = folder.parent.parent
    return load_config(run) if folder.parent.name == "export" and (run / "config.yaml").is_file() else None


def _subject(name: str, source: str, teacher: str | None, results: Path, asked: dict[str, Any], read: dict[tuple, Rows]) -> Subject:
    folder = find_model(source)
    run = _run_of(folder)
    if teacher is None and run is None:
        raise InputError(f"--teacher: {source} lies in no run (RUN/export/NAME) that would name its teacher; give it")
    teacher_source = teacher or run.teacher
    teacher_folder = find_model(teacher_source)
    for model in (teacher_folder, folder):
        config = load_model_config(model)
        if not 8 <= asked["length"] <= config.max_sequence_length:
            raise InputError(f"--length: {asked['length']} is not within 8 and the {config.max_sequence_length} positions of {model}")
    tokenizer = load_tokenizer(teacher_folder)
    _check_tokenizers(tokenizer, load_tokenizer(folder), teacher_folder, folder)
    description, file = describe_model(source), result_file(results, name)
    if file.exists():
        check_same_model(read_result(file), description, file)
    sources, held_out = _sources(run, asked)
    key = (teacher_folder, held_out, tuple(source.model_dump_json() for source in sources))
    if key not in read:
        limits = {name: asked[name] for name in ("language_column", "limit", "length")}
        read[key] = text_rows(sources, tokenizer, held_out=held_out, **limits)
    teacher_name = (run.teacher_name if run and not teacher else None) or model_name(teacher_source)
    where = ", ".join(Path(str(source.path or source.dataset)).name for source in sources)
    return Subject(name, folder, description, teacher_folder, teacher_name, tokenizer, read[key], where)


def _check_tokenizers(teacher: TextTokenizer, student: TextTokenizer, teacher_folder: Path, folder: Path) -> None:
    """The same number must mean the same token to both: how a text is cut up is the teacher's affair here."""
    special = [(each.cls_id, each.sep_id, each.pad_id, each.mask_id) for each in (teacher, student)]
    if special[0] != special[1] or teacher.backend.get_vocab() != student.backend.get_vocab():
        raise InputError(
            f"{folder}: its tokenizer ({student.vocab_size} tokens) is not that of the teacher {teacher_folder} ({teacher.vocab_size} "
            f"tokens); only models that read the same tokens can be compared token by token"
        )
    for model in (teacher_folder, folder):
        if teacher.vocab_size > load_model_config(model).vocab_size:
            raise InputError(f"{model}: its tokenizer has {teacher.vocab_size} tokens, more than the model's vocab_size")


def _sources(run: Config | None, asked: dict[str, Any]) -> tuple[list[SourceConfig], float | None]:
    """What to read, and the held-out share of its documents that alone counts."""
    if asked["text"] is not None:
        return [SourceConfig(path=asked["text"], column=asked["column"] or "text")], None
    if run is not None and run.data.sources and run.data.held_out > 0:
        return list(run.data.sources), run.data.held_out
    return [SourceConfig(path=str(SHIPPED))], None


def _measured(subject: Subject) -> Summary:
    """Both models on the device, at full precision: on some accelerators float32 products are not, by default."""
    rows = subject.rows
    buckets = length_buckets(rows.lengths.tolist())
    groups = [list(dict.fromkeys((ALL, *names))) for names in zip(buckets, rows.languages, strict=True)]
    models = [Model(*load_pretrained(folder)) for folder in (subject.folder, subject.teacher)]
    with jax.default_matmul_precision("highest"), preparing(f"Comparing {subject.name}") as progress:
        found = measure(*models, rows.input_ids, rows.attention_mask, groups, progress=progress)
        heads = [with_mlm_head(folder) for folder in (subject.folder, subject.teacher)]
        tokenizer = subject.tokenizer
        if all(heads) and tokenizer.mask_id is not None:
            special = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
            masking = Masking(RATE, MASK, RANDOM, tokenizer.mask_id, special, tokenizer.vocab_size)
            masked, labels = masked_rows(rows.input_ids, rows.attention_mask, masking)
            with_heads = [Model(*load_pretrained(folder)) for folder in heads]
            found = replace(found, mlm=measure_mlm(*with_heads, masked, rows.attention_mask, labels, tokenizer.vocab_size))
    return Summary(found, rows.lengths, buckets, rows.languages)


def _section(subject: Subject, summary: Summary) -> dict[str, Any]:
    return {
        "teacher": subject.teacher_name,
        "teacher_sha256": weights_sha256(subject.teacher),
        "text": {"source": subject.source, "rows": len(subject.rows.input_ids), "tokens": int(subject.rows.lengths.sum())},
        "numbers": summary.numbers(),
        "answers": answers(summary),
        "heatmaps": summary.heatmaps(),
        "tables": summary.tables(),
    }


def _print(subject: Subject, summary: Summary, sentences: list[str]) -> None:
    print(f"\nWhat {subject.name} lost of {subject.teacher_name} ({len(subject.rows.input_ids)} rows of {subject.source})\n")
    for sentence in sentences:
        print(f"- {sentence}")
    groups = summary.by_length | summary.by_language | {"all rows": summary.everything}
    rows = [(name, *(_cell(value) for value in values.values())) for name, values in groups.items()]
    print()
    print_table(summary_table(rows, ("rows of", *BREAKDOWN), "By length and language"))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
