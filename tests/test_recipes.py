"""The configs that ship: each is inspected at the sizes of its real teacher, and takes steps on a tiny one."""

from __future__ import annotations

import functools
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from task_folders import write_task
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, ROBERTA_SPECIAL, byte_level_bpe, make_texts, unigram, wordpiece, write_folder

import jaxdistill
from jaxdistill.config import LayerMapConfig, SourceConfig, load_config, select_students
from jaxdistill.config.terms import ONE
from jaxdistill.inspect import inspection
from jaxdistill.metrics import read_history
from jaxdistill.models import load_pretrained
from jaxdistill.resolve import in_steps, resolve_stages
from jaxdistill.sharding import create_mesh
from jaxdistill.students import SHAPES
from jaxdistill.tasks import TASKS

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# family, layers, heads, hidden size, feed-forward, what head its weights on the Hub have: for words, or fine-tuned for a task
TEACHERS = {
    "google-bert/bert-base-uncased": ("bert", 12, 12, 768, 3072, "mlm"),
    "google-bert/bert-large-uncased": ("bert", 24, 16, 1024, 4096, "mlm"),
    "FacebookAI/roberta-large": ("roberta", 24, 16, 1024, 4096, "mlm"),
    "FacebookAI/xlm-roberta-base": ("xlm-roberta", 12, 12, 768, 3072, "mlm"),
    "BAAI/bge-small-en-v1.5": ("bert", 12, 12, 384, 1536, ""),
    "runs/teachers/rte": ("roberta", 12, 12, 768, 3072, "rte"),
}
ROWS = {"rte": 2490}  # of the task's training split
STEPS = 3
# What takes steps: every term and map of the grids once, over the files, at the smallest shape. None: all of a file's students.
STEPPING: dict[str, list[str]] = {
    "comparison_3x384": ["distilbert", "3L.attention_kl"],
    "udagawa2023_monolingual": ["3L.hs-last", "3L.hs-uniform", "3L.minilmv2-last", "3L.minilmv2-minus_1", "3L.direct-last"],
    "udagawa2023_multilingual": ["3L.hs-uniform_consecutive", "3L.minilmv2-minus_2", "3L.direct-minus_[12]"],
    "wang2023_task_specific": ["hid-cls-contrast.1-2-3"],
    "whatslost2023": ["516D"],
    "wang2023_task_agnostic": ["vanilla-kd.random", "hid-cls.first-6", "att-mse_hid-seq.random", "att-kl_val-kl.random"],
}
DEEP = ("distilbert", "minilmv2_bert_large", "minilmv2_roberta_large")  # they name a teacher's layers; the others do with 4
# A schedule lies within its run.
SHORTER = {
    "annealed_od": [f"objective.{field}.steps=[0, {STEPS}]" for field in ("0.weight", "1.weight", "1.temperature")],
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def recipe(request) -> Path:
    return request.param


def header(path: Path) -> dict[str, str]:
    """First word of a line -> the rest of it; what goes on over several lines has its first."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if match := re.fullmatch(r"# ([a-z]+)(?! cost) +(\S.*)", line):
            found.setdefault(match[1], match[2])
    return found


def test_there_are_recipes():
    assert len(CONFIGS) >= 13


def test_headers(recipe):
    said = header(recipe)
    assert {"command", "published", "tokens", "hardware", "hours", "score"} <= said.keys()
    assert said["command"].split()[:3] == ["jaxdistill", "distill", f"configs/{recipe.name}"]


def tokens_of(config) -> list[int]:
    stages = [stage.training for stage in config.stages.values()] or [None]
    steps = [training.steps if training and training.steps else config.training.steps for training in stages]
    sizes = [training.batch_size if training and training.batch_size else config.training.batch_size for training in stages]
    return [count * size * config.data.sequence_length for count, size in zip(steps, sizes, strict=True)]


def on_task(config, data: Path):
    """The config on local rows of its task, if it has one; its epochs as steps."""
    if not config.data.task:
        return config
    task = config.data.task.model_copy(update={"data": str(data)})
    return in_steps(config.model_copy(update={"data": config.data.model_copy(update={"task": task})}))


@pytest.fixture(scope="module")
def as_many(tmp_path_factory) -> Path:
    """As many training rows as the tasks have."""
    folder = tmp_path_factory.mktemp("as_many")
    for task, count in ROWS.items():
        write_task(folder, task, train=count, test=1, longest=1)
    return folder


def test_the_tokens_that_a_header_says(recipe, as_many):
    said = re.findall(r"(\d+\.\d) ([GM])\b", header(recipe)["tokens"])
    counted = tokens_of(on_task(load_config(recipe), as_many))
    if "a stage" in header(recipe)["tokens"]:
        said *= len(counted)
    elif len(said) == 1:  # of them all
        counted = [sum(counted)]
    assert said == [(f"{count / {'G': 1e9, 'M': 1e6}[unit]:.1f}", unit) for count, (_, unit) in zip(counted, said, strict=True)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    """Family -> folder with a tokenizer of its kind, and the number of its tokens."""
    kinds = {"bert": (wordpiece, BERT_SPECIAL), "roberta": (byte_level_bpe, ROBERTA_SPECIAL), "xlm-roberta": (unigram, ROBERTA_SPECIAL)}
    found = {}
    for family, (make, special) in kinds.items():
        backend = make()
        found[family] = (write_folder(tmp_path_factory.mktemp("tokenizers") / family, backend, special), backend.get_vocab_size())
    return found


@pytest.fixture(scope="module")
def real_sized(tokenizers, tmp_path_factory) -> dict[str, Path]:
    """Every teacher with the config.json of its size; of its weights only what says whether there is a head. The words are few."""
    found = {}
    for name, (family, layers, heads, hidden, inner, head) in TEACHERS.items():
        tokenizer, vocab_size = tokenizers[family]
        folder = Path(shutil.copytree(tokenizer, tmp_path_factory.mktemp("real") / name.split("/")[-1]))
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, "intermediate_size": inner}
        sizes |= {"vocab_size": vocab_size, "max_position_embeddings": 512 if family == "bert" else 514}
        if head in TASKS:
            sizes |= {"architectures": ["RobertaForSequenceClassification"], "id2label": dict(enumerate(TASKS[head].labels))}
        (folder / "config.json").write_text(json.dumps({"model_type": family} | sizes))
        of_words = "cls.predictions.bias" if family == "bert" else "lm_head.bias"
        save_file({of_words if head == "mlm" else "embeddings.LayerNorm.bias": np.zeros(1, np.float32)}, folder / "model.safetensors")
        found[name] = folder
    return found


def test_every_recipe_is_inspected(recipe, real_sized, as_many):
    """With every check of the config against the teacher's sizes, and without a warning."""
    config = on_task(load_config(recipe), as_many)
    config = config.model_copy(update={"teacher": str(real_sized[config.teacher]), "teacher_name": config.teacher})
    runs = resolve_stages(config, num_devices=1)
    console = Console(width=160, file=io.StringIO())
    for run in runs:
        console.print(inspection(run))
    shown = " ".join(console.file.getvalue().split())
    assert [run.warnings for run in runs] == [()] * len(runs)
    assert {student.name for run in runs for student in run.students} == set(config.students)
    for student in config.students:
        assert f" {student} " in shown, student
    for tokens in tokens_of(config):
        assert f", {tokens:,} in " in shown
    assert [run.stage for run in runs] == (list(config.stages) or [""])


@pytest.fixture(scope="module")
def tiny(tokenizers, tmp_path_factory):
    """A teacher with its family and heads, twice as wide as the relation heads that the recipes ask for."""

    @functools.cache
    def make(name: str, deep: bool) -> Path:
        family, layers, heads, *_, head = TEACHERS[name]
        tokenizer, vocab_size = tokenizers[family]
        folder = Path(shutil.copytree(tokenizer, tmp_path_factory.mktemp("tiny") / name.split("/")[-1]))
        sizes = {"num_layers": layers if deep else 4, "num_heads": heads, "hidden_size": 8 * heads, "intermediate_size": 8 * heads}
        labels = TASKS[head].labels if head in TASKS else ()
        write_model(folder, tiny_config(family, vocab_size=vocab_size, labels=labels, **sizes), mlm=head == "mlm")
        return folder

    return make


def shrunk(config, teacher: Path, source: SourceConfig, output: Path):
    """The recipe on a tiny teacher: objectives, maps, starts and stages are the file's, sizes and steps are not.

    A student as wide as its teacher stays so, a narrower one has half of it; 2 layers, or as many as are copied by name.
    """
    _, _, heads, hidden, *_ = TEACHERS[config.teacher]
    students = {}
    for name, student in config.students.items():
        wide = (student.hidden_size or (SHAPES[student.shape][2] if student.shape else hidden)) == hidden
        named = len(student.initialise) if isinstance(student.initialise, tuple) else 2
        sizes = {"num_layers": 6 if student.initialise == "distilbert" else named, "num_heads": heads}
        sizes |= {"hidden_size": 8 * heads if wide else 4 * heads, "intermediate_size": 8 * heads, "shape": None}
        students[name] = student.model_copy(update=sizes)
    shorter = {"steps": STEPS, "epochs": None, "batch_size": 8, "log_every": 1, "evaluate_every": 10, "checkpoint_every": 10}
    shorter["tensorboard"] = False
    stages = {}
    for name, stage in config.stages.items():
        training = stage.training and stage.training.model_copy(update={"steps": STEPS, "epochs": None})
        stages[name] = stage.model_copy(update={"training": training})
    update = {"teacher": str(teacher), "students": students, "stages": stages, "output": str(output)}
    data = {"sources": (source,), "held_out": 0.0} if config.data.sources else {}
    update["data"] = config.data.model_copy(update=data | {"sequence_length": 16})
    update["training"] = config.training.model_copy(update=shorter)
    return config.model_copy(update=update)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SourceConfig:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in make_texts(60)))
    return SourceConfig(path=str(text))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for task in ROWS:
        write_task(folder, task, train=30, test=6)
    return folder


@pytest.fixture
def one_device(monkeypatch):
    """Programs that are not split among devices compile in less time; tests/runs has meshes."""
    monkeypatch.setattr(
        importlib.import_module("jaxdistill.distill"), "create_mesh", functools.partial(create_mesh, devices=jax.devices()[:1])
    )


@pytest.mark.long
def test_every_recipe_takes_steps(recipe, tiny, source, rows, tmp_path, one_device):
    name = recipe.stem
    real = select_students(on_task(load_config(recipe, SHORTER.get(name, [])), rows), STEPPING.get(name, []))
    config = shrunk(real, tiny(real.teacher, name in DEEP), source, tmp_path / "run")
    jaxdistill.distill(config)
    for run in resolve_stages(config):
        history = [record for record in read_history(run.output) if "loss" in record]
        assert [record["step"] for record in history] == list(range(1, STEPS + 1))
        for record in history:
            losses = {key: value for key, value in record.items() if key.endswith("loss") or "/" in key}
            assert losses.keys() >= {f"{student.name}/{term.name}" for student in run.students for term in student.terms}
            assert all(np.isfinite(value) for value in losses.values()), losses
            assert all(record[f"{student.name}/skipped"] == 0 for student in run.students)
        for student in run.students:
            shape, params = load_pretrained(run.output / "export" / student.name)
            assert (shape.num_layers, shape.hidden_size) == (student.config.num_layers, student.config.hidden_size)
            head = "classifier" if student.has_classifier else "pooler"  # of RoBERTa, whose classifier has no pooler
            assert params.keys() == {"embeddings", "layers", head}  # no projection, nothing of the teacher
            assert (run.output / "export" / student.name / "mlm").is_dir() == student.has_mlm_head


def test_the_steps_cover_every_method():
    """Each term with each of its maps and options is among the students that take steps, in one file or another."""

    def methods(config) -> set[str]:
        objectives = [student.objective or config.objective for student in config.students.values()]
        objectives += [stage.objective for stage in config.stages.values() if stage.objective]
        # Layers that a file writes out are fixed pairs like those of the default.
        fixed = {"layer_map": LayerMapConfig()}
        changes = [(term, fixed if getattr(term, "layer_map", LayerMapConfig()).pairs else {}) for terms in objectives for term in terms]
        return {str(term.model_copy(update={"weight": ONE} | change)) for term, change in changes}

    whole = [methods(load_config(path)) for path in CONFIGS]
    taken = [methods(select_students(load_config(path), STEPPING.get(path.stem, []))) for path in CONFIGS]
    assert set().union(*taken) == set().union(*whole)
