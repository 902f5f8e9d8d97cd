"""The command line; what a command needs is imported inside it."""

from __future__ import annotations

import functools
import inspect as reflection
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxdistill.errors import InputError
from jaxdistill.faults.ending import ended

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML config, or the folder of a run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="fields to change, as in training.steps=1000")]
Only = Annotated[list[str] | None, typer.Option("--student", help="distil these alone: a name or a pattern, may be given again")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="start anew in an output folder that holds a run")]

Coordinator = Annotated[str | None, typer.Option(envvar="JAX_COORDINATOR_ADDRESS", help="HOST:PORT of process 0, where no cluster says it")]
Processes = Annotated[int | None, typer.Option(envvar="JAX_NUM_PROCESSES", help="how many processes take part")]
Process = Annotated[int | None, typer.Option(envvar="JAX_PROCESS_ID", help="number of this one, from 0")]
Heartbeat = Annotated[float, typer.Option(envvar="JAXDISTILL_HEARTBEAT", help="seconds after which a silent process is lost")]
JoinTimeout = Annotated[float, typer.Option(envvar="JAXDISTILL_JOIN_TIMEOUT", help="seconds to wait for the other processes")]


def _joins(*, main_alone: bool = False) -> Callable[[Callable], Callable]:
    """A command that several processes may run together (flags, or Cloud TPU, GKE, SLURM, Open MPI); with `main_alone` one does it."""

    def join(coordinator: Coordinator = None, processes: Processes = None, process: Process = None,
             heartbeat: Heartbeat = 60.0, join_timeout: JoinTimeout = 300.0) -> dict:  # fmt: skip
        return {"coordinator": coordinator, "processes": processes, "process": process, "heartbeat": heartbeat, "timeout": join_timeout}

    flags = [each.replace(kind=each.KEYWORD_ONLY) for each in reflection.signature(join, eval_str=True).parameters.values()]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def together(*args, **options) -> None:
            from jaxdistill import processes

            with processes.joined(**join(**{flag.name: options.pop(flag.name) for flag in flags})):
                work = functools.partial(command, *args, **options)
                processes.only_on_main(work) if main_alone else work()

        signature = reflection.signature(command, eval_str=True)
        together.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *flags])
        together.__annotations__ = {name: each.annotation for name, each in together.__signature__.parameters.items()}
        return together

    return decorate


def _folder(option: Any, value: str | None) -> str | None:
    """Of an option that names a folder to write."""
    from jaxdistill.urls import written_folder

    try:
        return value if value is None else written_folder(value)
    except ValueError as error:
        raise InputError(f"--{option.name}: {error}") from None


def _config(config: str, overrides: list[str] | None):
    from jaxdistill.config import load_config

    return load_config(config, overrides or [])


@app.command()
@_joins()
def quickstart(
    teacher: Annotated[str | None, typer.Option(help="model folder or Hub id; default: all-MiniLM-L6-v2")] = None,
    text: Annotated[str | None, typer.Option(help="text, jsonl, parquet: file, folder or glob; default: the sample that ships")] = None,
    layers: Annotated[int, typer.Option(min=1, help="depth of the student")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="training steps of 32 rows")] = 120,
    length: Annotated[int, typer.Option(min=8, help="tokens of a row")] = 128,
    relation_heads: Annotated[int, typer.Option(min=1, help="relation heads of MiniLMv2; they divide the hidden size")] = 48,
    output: Annotated[str, typer.Option(help="folder of the run")] = "runs/quickstart",
    overwrite: Overwrite = False,
) -> None:
    """Distil a small student in a few minutes, and show what it keeps."""
    from jaxdistill.quickstart import quickstart_config, run_quickstart

    config = quickstart_config(
        teacher=teacher, text=text, layers=layers, steps=steps, length=length, relation_heads=relation_heads, output=output
    )
    run_quickstart(config, overwrite=overwrite)


@app.command()
@_joins()
def distill(config: ConfigPath, overrides: Overrides = None, overwrite: Overwrite = False, student: Only = None) -> None:
    """Distil the students of a config; goes on with a run that was interrupted."""
    from jaxdistill.distill import distill as run

    run(_config(config, overrides), overwrite=overwrite, only=student or [])


@app.command()
@_joins()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="check a store that is there by its hashes; make what is damaged again")] = False,
) -> None:
    """Make the token store of a config, or find that it is there already."""
    from jaxdistill import processes
    from jaxdistill.hosts import check_same
    from jaxdistill.inspect import language_table
    from jaxdistill.report import print_table, summary_table
    from jaxdistill.resolve import resolve
    from jaxdistill.text import prepare_text

    with processes.together():
        run = resolve(_config(config, [*(overrides or []), "mesh={}"]), num_devices=1)
    check_same([run])
    if run.task:
        raise InputError("data.task: a task is read when the run starts, there is nothing to prepare")
    if run.config.data.streaming:
        raise InputError("data.streaming: the text is read while the run goes on, there is nothing to prepare")
    store = prepare_text(run, None, verify=verify)
    if not processes.is_main():
        return
    left_out = {"skipped": "skipped", "invalid_utf8": "invalid UTF-8", "duplicates": "duplicates"}
    columns = ("source", "documents", "held out", "tokens", "rows", *left_out.values())
    rows = []
    for source in store.manifest["sources"]:
        counts = [f"{sum(source[what].values()):,}" for what in ("tokens", "rows")]
        documents = (f"{sum(source['documents'].values()):,}", f"{source['documents']['held_out']:,}")
        name = f"{source['source']} ({source['language']})" if source["language"] else source["source"]
        rows.append((name, *documents, *counts, *(f"{source[what]:,}" for what in left_out)))
    print_table(summary_table(rows, columns, f"Token store {store.folder}"))
    if run.settings.languages:
        print_table(language_table(run, store))


@app.command()
@_joins(main_alone=True)
def inspect(
    config: ConfigPath,
    overrides: Overrides = None,
    student: Only = None,
    devices: Annotated[int | None, typer.Option(min=1, help="plan for this many devices; default: those here")] = None,
) -> None:
    """The dry run: the resolved config, parameters, layers, shardings and cost. Reads no text (epochs count rows), writes nothing."""
    from rich.console import Console
    from rich.syntax import Syntax

    from jaxdistill.config import select_students
    from jaxdistill.inspect import inspection
    from jaxdistill.resolve import resolve_stages

    runs = resolve_stages(select_students(_config(config, overrides), student or []), num_devices=devices)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(Syntax(runs[-1].saved.to_yaml(), "yaml", background_color="default"))
    for run in runs:
        console.print(inspection(run))


@app.command()
def plan(
    config: ConfigPath,
    topology: Annotated[str, typer.Option(help="v5e:4x4, v6e:16x16, v5p:4x4x4, tpu7x:2x2x1, h200x8, h100, a100x8, l4, ...")],
    overrides: Overrides = None,
    student: Only = None,
    stage: Annotated[str | None, typer.Option(help="of a config with stages; default: every stage")] = None,
    compile_step: Annotated[bool, typer.Option("--compile/--no-compile", help="compile the real step; else by formula alone")] = True,
    search_batch: Annotated[bool, typer.Option("--largest-batch/--no-largest-batch", help="2 or more compilations in addition")] = True,
) -> None:
    """What a run needs and takes on devices that are not here: memory, collectives, time. Compiles the real step, writes nothing."""
    from jaxdistill.plan.command import plan_command

    config = _config(config, overrides)
    plan_command(config, topology, students=student or [], stage=stage, compile_step=compile_step, search_batch=search_batch)


Words = Annotated[list[str], typer.Argument(metavar="MODEL... [KEY=VALUE]...", help="folders, Hub ids, NAME=PATH, runs; or a YAML config")]


@app.command()
@_joins(main_alone=True)
def finetune(words: Words, overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a model that is there")] = False) -> None:
    """Fine-tune one model on one task and write it for AutoModelForSequenceClassification.

    tasks=rte output=FOLDER data=FOLDER protocol=wang2023 protocol.learning_rates=[3e-5]
    """
    from jaxdistill.config import load_evaluation
    from jaxdistill.finetune import finetune as run
    from jaxdistill.runtime import configure

    configure()
    run(load_evaluation(words), overwrite=overwrite)


@app.command()
@_joins(main_alone=True)
def evaluate(
    words: Words, overwrite: Annotated[bool, typer.Option("--overwrite", help="forget the scores that are there")] = False
) -> None:
    """Score models on tasks (GLUE, XNLI, SNLI): fine-tune each with several seeds. Goes on with what is not done yet.

    tasks=rte,mrpc data=FOLDER protocol=udagawa2023 protocol.epochs=3 results=results train=false
    """
    from jaxdistill.config import load_evaluation
    from jaxdistill.evaluate import evaluate as run
    from jaxdistill.runtime import configure

    configure()
    run(load_evaluation(words), overwrite=overwrite)


@app.command()
@_joins()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run")],
    student: Annotated[str | None, typer.Option(help="its name; default: every student")] = None,
    step: Annotated[int | None, typer.Option(help="checkpoint to take; default: the newest")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    to: Annotated[str | None, typer.Option(callback=_folder, help="folder to write <student>/ into; default: RUN/export")] = None,
    push: Annotated[str | None, typer.Option(help="user/name on the Hub; of several students user/name-<student>")] = None,
    public: Annotated[bool, typer.Option("--public", help="a repository that all can see; default: a private one")] = False,
    revision: Annotated[str, typer.Option(help="branch to push to")] = "main",
    licence: Annotated[str | None, typer.Option("--license", help="as apache-2.0; default: the teacher's")] = None,
    results: Annotated[str, typer.Option(help="folder where the scores of the card are looked up")] = "results",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the files and the card; write and upload nothing")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder or a foreign repository that is there")] = False,
) -> None:
    """Write students of a run as folders that transformers loads, with a model card; --push puts them on the Hub."""
    from jaxdistill.hub.publish import Push, export_command

    if push is None and (public or revision != "main"):
        raise InputError(f"{'--public' if public else '--revision'}: means nothing without --push user/name")
    to_hub = None if push is None else Push(push, public=public, revision=revision)
    more = {"licence": licence, "results": Path(results), "dry_run": dry_run, "overwrite": overwrite}
    export_command(Path(run), student=student, step=step, dtype=dtype, to=to and Path(to), push=to_hub, **more)


@app.command()
@_joins(main_alone=True)
def compare(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="results (folder or file), a run, a model folder, udagawa2023[:3L], wang2023")
    ],
    output: Annotated[str, typer.Option(callback=_folder, help="folder for comparison.md, comparison.csv and index.html")] = "comparison",
    results: Annotated[str, typer.Option(help="folder where the scores of runs and model folders are looked up")] = "results",
    reference: Annotated[str | None, typer.Option(help="model to test against; default: the one with the most parameters")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a comparison that is there")] = False,
) -> None:
    """Models side by side and beside published tables: scores with significance, speed, size, as a page to look at."""
    from jaxdistill.compare import compare as run
    from jaxdistill.compare import main_table
    from jaxdistill.report import print_table, summary_table

    folder = Path(output)
    board = run(inputs, output=folder, results=Path(results), reference=reference, overwrite=overwrite)
    table = main_table(board)
    print_table(summary_table(table.rows, table.columns, table.title))
    print(f"to look at: {folder / 'index.html'}")


@app.command()
@_joins(main_alone=True)
def latency(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="folder, Hub id, NAME=either, or a run: all its students")],
    batch_size: Annotated[list[int] | None, typer.Option(help="may be given again; default: 1 and 32")] = None,
    length: Annotated[int, typer.Option(help="tokens of an example")] = 128,
    repeats: Annotated[int, typer.Option(help="runs of at least 0.2 s each")] = 5,
    framework: Annotated[list[str] | None, typer.Option(help="jax or pytorch; default: both, where PyTorch is installed")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    results: Annotated[str, typer.Option(callback=_folder, help="folder of the models' results")] = "results",
) -> None:
    """Time the forward pass of models, one example and batches; speed is relative to the first one."""
    from jaxdistill.latency import latency as measure

    sizes = {"batch_sizes": batch_size or [1, 32], "length": length, "repeats": repeats}
    measure(models, **sizes, frameworks=framework or [], dtype=dtype, results=results)


@app.command()
@_joins(main_alone=True)
def lost(
    student: Annotated[str, typer.Argument(metavar="STUDENT|RUN", help="folder, Hub id, NAME=either, or a run: all its students")],
    teacher: Annotated[str | None, typer.Option(help="model folder or Hub id; default: the run's")] = None,
    text: Annotated[str | None, typer.Option(help="file, folder or glob; default: held-out text of the run, or the sample")] = None,
    column: Annotated[str | None, typer.Option(help="of --text, where it is parquet or jsonl; default: text")] = None,
    language_column: Annotated[str | None, typer.Option(help="names the language of a text: numbers for each")] = None,
    rows: Annotated[int, typer.Option(help="paragraphs to compare on, at most")] = 256,
    length: Annotated[int, typer.Option(help="tokens of a paragraph, at most")] = 128,
    results: Annotated[str, typer.Option(callback=_folder, help="folder of the models' results")] = "results",
    output: Annotated[str | None, typer.Option(callback=_folder, help="folder for the heat maps; default: RESULTS/lost")] = None,
) -> None:
    """Show what a student lost: layers, relations, attention heads and words, by length and language."""
    from jaxdistill.lost import lost as compare

    source = {"text": text, "column": column, "language_column": language_column, "rows": rows, "length": length}
    compare(student, teacher=teacher, **source, results=results, output=output)


def _version(value: bool | None) -> None:
    if value:
        from importlib.metadata import version

        print(f"jaxdistill {version('jaxdistill')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="show the version")] = None,
) -> None:
    """Make encoders small: distil BERT, RoBERTa or XLM-R into students that load in PyTorch."""


def main() -> None:
    """The command line; see `faults/ending.py` for its exit codes."""
    ended(app)


if __name__ == "__main__":
    main()
