"""The command line as a careless user meets it: exit code 2, one line that says what, where and what would be right."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import command, finish
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, ROBERTA_SPECIAL, byte_level_bpe, wordpiece, write_folder

pytestmark = pytest.mark.long


@pytest.fixture
def config(ground, tmp_path):
    """Writes a config; its output is `tmp_path/run`, its store its own."""

    def write(**changes) -> Path:
        path = tmp_path / "config.yaml"
        fields = ground.config(tmp_path / "run", mesh={"data": 8}, data__store=None, **changes)
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith(("Preparing text", "warning:"))]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.step=3", ["training.step: unknown field", "did you mean 'steps'"]),
        ("data.sequence_lenght=3", ["data.sequence_lenght: unknown field", "'sequence_length'"]),
        ("teachr=x", ["teachr: unknown field", "'teacher'"]),
        ("objective.0.relation_head=6", ["objective.0.relation_head: unknown field", "'relation_heads'"]),
        ("training.steps=many", ["training.steps:", "integer", "'many'"]),
        ("training.steps=0", ["training.steps:", "greater than or equal to 1"]),
        ("training.precision=half", ["training.precision:", "'bfloat16'"]),
        ("students={}", ["students:", "at least 1"]),
        ("students.small.initialise=sometimes", ["students.small.initialise:", "'random'"]),
        ("objective.0.layer_map=lastlayer", ["objective.0.layer_map.strategy:", "did you mean 'last_layer'"]),
        ("no_equals_sign", ["override 'no_equals_sign'", "key=value"]),
        ("data.sources.7.path=x", ["data.sources is a list of 1"]),
        # What only the teacher's shape shows:
        ("objective.0.relation_heads=5", ["objective.0.relation_heads: 5 does not divide", "student 48 and teacher 48", "4, 6"]),
        ("objective.0.layer_map={strategy: teacher_layer, teacher_layer: 9}", ["objective.0.layer_map:", "9 is out of range", "1..4"]),
        ("students.small.num_heads=5", ["students.small: 5 heads do not divide the hidden size 48", "would"]),
        ("students.small.num_layers=null", ["students.small: how deep?"]),
        ("students.small.shape=7L", ["students.small.shape: unknown shape '7L'"]),
        ("students.small.initialise=[1, 9]", ["students.small.initialise: teacher layer 9", "1..4"]),
        ("students.small.initialise=[1]", ["students.small.initialise: names 1 teacher layers for a student of 2"]),
        ("data.sequence_length=65", ["data.sequence_length: 65", "64 positions"]),
        ("training.batch_size=9", ["training.batch_size: 9 rows", "8 would"]),
        ("mesh={data: 3}", ["mesh:", "8 devices"]),
        ("teacher=/no/such/folder", ["/no/such/folder: no such model folder"]),
        ("teacher=nobody/nothing", ["nobody/nothing: no such folder here", "the Hub could not be reached", "HF_HUB_OFFLINE"]),
        ("training.wandb=project", ["training.wandb:", "pip install 'jaxdistill[wandb]'"]),
        ("data.sources.0.path=/no/such/text.jsonl", ["/no/such/text.jsonl: no such file"]),
        ("data.sources.0.column=body", ["body", "text.jsonl"]),
        ("data.sources.0.split=test", ["data.sources.0: split means nothing for a path"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate: ", "finite"]),
        ("output=/dev/null/run", ["/dev/null/run"]),
        ("data.sources=[{path: /dev/null, colum: body}]", ["data.sources.0.colum: unknown field", "'column'"]),
        ("data.sources.0={dataset: nobody/nothing}", ["nobody/nothing"]),
    ],
)
def test_a_wrong_field(cli, config, tmp_path, override, parts):
    path = config()
    assert_refused(cli("distill", path, override), *parts)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["config.yaml"]


NARROW = "{small: {num_layers: 2, hidden_size: 24, num_heads: %s, initialise: %s}}"
LATE = "{schedule: linear, values: [1, 0], steps: [0, 9]}"  # of a run of 8 steps
TO_BE_TAUGHT = "{first: {objective: [hidden_mse]}, second: {%s}}"


@pytest.mark.parametrize("verb", ["distill", "inspect"])
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # Maps and terms
        (
            ["objective=[{kind: hidden_mse, layer_map: unifrom}]"],
            ["objective.0.layer_map.strategy: unknown layer map 'unifrom'", "'uniform'"],
        ),
        (["objective=[relation_kll]"], ["objective.0.kind: unknown term 'relation_kll'", "did you mean 'relation_kl'"]),
        (["students.small.objective=[hidden_mce]"], ["students.small.objective.0.kind: unknown term 'hidden_mce'", "'hidden_mse'"]),
        (
            ["objective=[{kind: hidden_mse, layer_map: {strategy: explicit, pairs: [[2, 5]]}}]"],
            ["objective.0.layer_map:", "5 is out of range"],
        ),
        (["objective=[{kind: direct_mse, layer_map: learned}]"], ["objective.0.layer_map: learned", "not for direct_mse"]),
        # A side that lacks the feature
        (["objective=[output_kl]"], ["objective.0: output_kl reads the teacher's logits", "no MLM head", "BertForMaskedLM"]),
        (["students.small.objective=[hidden_mse, output_kl]"], ["students.small.objective.1: output_kl"]),
        (["objective=[mlm_cross_entropy]", "students.small.input=clean"], ["students.small.input: ", "take masked"]),
        # Equal widths and heads
        (
            [f"students={NARROW % (4, 'random')}", "objective=[{kind: hidden_mse, projection: never}]"],
            ["objective.0.projection: never needs equal hidden sizes", "24", "48"],
        ),
        ([f"students={NARROW % (4, 'every_k')}"], ["students.small.initialise", "24", "48"]),
        (
            [f"students={NARROW % (3, 'random')}", "objective=[attention_kl]"],
            ["objective.0: attention_kl", "has 3, the teacher 4", "num_heads 4"],
        ),
        ([f"students={NARROW % (3, 'random')}", "objective=[direct_mse]"], ["objective.0.relation_heads: native heads", "num_heads 4"]),
        # Two texts
        (
            ["students={od: {num_layers: 2, objective: [mlm_cross_entropy]}, hs: {num_layers: 2, objective: [hidden_mse]}}"],
            ["students: od needs masked text and hs clean text", "training.both_inputs"],
        ),
        # Stages
        (
            ["objective=[hidden_contrastive]", "training.batch_size=1", "mesh={data: 1, tensor: 8}"],
            ["objective: hidden_contrastive compares the rows of a batch", "training.batch_size is 1"],
        ),
        (["students.small.initialise={checkpoint: /no/such}"], ["students.small.initialise.checkpoint: /no/such: no such model folder"]),
        (["students.small.initialise={student: small}"], ["students.small.initialise: a student of the stage before", "no stages"]),
        (["stages={first: {teacher: {student: small}}}"], ["stages.first.teacher: a student of the stage before", "first stage"]),
        (
            [f"stages={TO_BE_TAUGHT % 'teacher: {student: smal}'}"],
            ["stages.second.teacher: the stage before, first, has no student 'smal'", "did you mean 'small'"],
        ),
        (
            [f"stages={TO_BE_TAUGHT % 'students: {new: {num_layers: 2, initialise: {student: large}}}'}"],
            ["stages.second.students.new.initialise: the stage before, first, has no student 'large'"],
        ),
        ([f"stages={TO_BE_TAUGHT % 'students: [tiny]'}"], ["stages.second.students: no student matches 'tiny'"]),
        ([f"stages={TO_BE_TAUGHT % 'objective: [output_kl]'}"], ["stages.second.objective.0: output_kl reads the teacher's logits"]),
        # Schedules
        (["objective.0.weight=" + LATE], ["objective.0.weight.steps: step 9 is out of range, training takes 8 steps there"]),
        (
            [f"objective=[{{kind: hidden_contrastive, temperature: {LATE.replace('0],', '1],')}}}]"],
            ["objective.0.temperature.steps: step 9"],
        ),
        # Grids and selections
        (["grid=[{small: {num_layers: 1}}]"], ["grid: there are two students 'small'"]),
        (["grid=[{a: {num_layers: 2}, a.b: {num_layers: 2}}, {c: {}, b.c: {}}]"], ["grid: there are two students 'a.b.c'"]),
        (["--student", "large"], ["--student: no student matches 'large'"]),
        (["--student", "smal"], ["--student: no student matches 'smal'", "did you mean 'small'"]),
    ],
)
def test_a_wrong_method(cli, config, tmp_path, verb, overrides, parts):
    path = config()
    assert_refused(cli(verb, path, *overrides), *parts)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["config.yaml"]


def test_a_wrong_method_in_a_process_of_its_own(config):
    code, out, err = finish(command("distill", config(), "objective=[output_kl]", num_devices=8))
    assert (code, out) == (2, "")
    assert err.startswith("error: objective.0: output_kl reads the teacher's logits") and err.count("\n") == 1


def test_config_files(cli, tmp_path):
    assert_refused(cli("distill", tmp_path / "none.yaml"), "none.yaml: no such config file")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert_refused(cli("inspect", tmp_path / "list.yaml"), "list.yaml: a config is a mapping")
    (tmp_path / "broken.yaml").write_text("teacher: [1\n")
    assert_refused(cli("inspect", tmp_path / "broken.yaml"), "broken.yaml: not valid YAML", "line")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert_refused(cli("inspect", tmp_path / "binary.yaml"), "binary.yaml: not a text file")
    (tmp_path / "folder").mkdir()
    assert_refused(cli("distill", tmp_path / "folder"), "a folder without config.yaml")
    (tmp_path / "twice.yaml").write_text("students:\n  small: {num_layers: 1}\n  small: {num_layers: 2}\n")
    assert_refused(cli("inspect", tmp_path / "twice.yaml"), "'small' is there twice", "line 3")
    (tmp_path / "date.yaml").write_text("teacher: 2023-13-45\n")
    assert_refused(cli("inspect", tmp_path / "date.yaml"), "date.yaml: not valid YAML")
    (tmp_path / "short.yaml").write_text("teacher: x\n")
    assert_refused(cli("distill", tmp_path / "short.yaml"), "short.yaml: data: missing", "(and 2 more)")


@pytest.fixture
def teacher(ground, tmp_path) -> Path:
    """A copy of the teacher to damage."""
    return Path(shutil.copytree(ground.teacher, tmp_path / "teacher"))


def test_a_damaged_teacher(cli, config, teacher):
    path = config(teacher=str(teacher))
    weights = teacher / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert_refused(cli("distill", path), "model.safetensors: damaged or truncated safetensors file")
    weights.rename(teacher / "pytorch_model.bin")
    assert_refused(cli("distill", path), "pytorch_model.bin", "save_pretrained")
    (teacher / "pytorch_model.bin").unlink()
    assert_refused(cli("distill", path), "no model.safetensors")
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    assert_refused(cli("distill", path), "unsupported architecture 'gpt2'", "bert, roberta, xlm-roberta")
    (teacher / "config.json").unlink()
    assert_refused(cli("distill", path), "not a model folder")
    assert not (path.parent / "run").exists()  # all of it was seen before the run began


def test_a_tokenizer_of_another_model(cli, config, tmp_path):
    larger = write_folder(tmp_path / "larger", byte_level_bpe(), ROBERTA_SPECIAL)
    assert_refused(cli("distill", config(data__tokenizer=str(larger))), "data.tokenizer")
    roberta = tiny_config("roberta", vocab_size=wordpiece().get_vocab_size(), max_position_embeddings=64)
    folder = write_folder(tmp_path / "mixed", wordpiece(), BERT_SPECIAL)
    write_model(folder, roberta)
    assert_refused(cli("distill", config(teacher=str(folder))), "teacher", "pad")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert_refused(cli("distill", config(teacher=str(folder))), "tokenizer")


def test_an_output_that_is_not_a_run(cli, config, tmp_path):
    path, output = config(), tmp_path / "run"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for arguments in ((), ("--overwrite",)):
        assert_refused(cli("distill", path, *arguments), "exists and is not the folder of a run", "thesis.tex")
    assert (output / "thesis.tex").read_text() == "years of work"
    assert_refused(cli("distill", path, f"output={path}"), "is a file; give a folder")


def test_a_config_of_ones_own_in_the_output_is_not_a_run(cli, config, tmp_path):
    path = config()
    (tmp_path / "run").mkdir()
    own = tmp_path / "run" / "config.yaml"
    own.write_text(path.read_text())
    assert_refused(cli("distill", own, "--overwrite"), "holds a config.yaml that no run wrote")
    assert own.read_text() == path.read_text()


def test_texts(cli, config, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert_refused(cli("prepare", config(data__sources=[str(empty)])), "empty.txt", "no text")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a river"}\n' * 500)[:-20])
    assert_refused(cli("prepare", config(data__sources=[str(tmp_path / "cut.jsonl.gz")])), "cut.jsonl.gz")
    assert_refused(cli("prepare", config(data__sources=[str(tmp_path / "*.parquet")])), "*.parquet")
    assert not list(tmp_path.rglob("manifest.json"))


def test_invalid_utf8_is_counted_and_not_fatal(cli, config, tmp_path):
    text = tmp_path / "latin.txt"
    text.write_bytes(b"\n\n".join([b"quiet river", b"caf\xe9 light", b"winter \xff\xfe stone", b"green mountain " * 20]))
    code, out, _ = cli("prepare", config(data__sources=[str(text)], data__held_out=0.0))
    assert code == 0
    row = next(line.split() for line in out.splitlines() if "latin.txt" in line)
    assert row[1] == "4" and row[-2:] == ["2", "0"]


def test_inspect_reads_no_text_and_writes_nothing(cli, config, tmp_path):
    path = config(data__sources=["/no/such/text.txt"], training__steps=1000)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli("inspect", path)
    assert code == 0 and err == ""
    assert sorted(tmp_path.rglob("*")) == before
    shown = "precision: float32", "2<-4", "on clean text to layer 4", "embeddings/word/embedding", "128 tokens a step", "128,000 in 1,000"
    for part in shown:
        assert part in out, part


def test_export_of_a_checkpoint(cli, config, tmp_path):
    from safetensors.numpy import load_file

    assert cli("distill", config(training__steps=4))[0] == 0
    run, to = tmp_path / "run", tmp_path / "elsewhere"
    assert_refused(cli("export", run), "export/small exists", "--overwrite")
    assert_refused(cli("export", run, "--student", "smal"), "did you mean 'small'")
    assert_refused(cli("export", run, "--step", "3", "--to", to), "checkpoints of steps 2, 4")
    assert_refused(cli("export", run, "--dtype", "int8"), "'int8' is not one of")
    code, out, _ = cli("export", run, "--to", to, "--dtype", "float16")
    assert (code, out) == (0, f"{to / 'small'}\n")
    half, full = load_file(to / "small" / "model.safetensors"), load_file(run / "export" / "small" / "model.safetensors")
    assert full.keys() == half.keys()
    assert all((full[name].astype("float16") == half[name]).all() for name in full)
    assert cli("export", run, "--to", to, "--step", "2", "--overwrite")[0] == 0


def test_quickstart_on_another_teacher_and_text(cli, ground, tmp_path):
    text = tmp_path / "prose.txt"
    sentences = [f"The quiet river by the green mountain had {i} letters and seven walking stones." for i in range(120)]
    text.write_text("\n\n".join(" ".join(sentences[i : i + 3]) for i in range(0, 120, 3)))
    output = tmp_path / "run"
    sizes = ("--layers", 2, "--steps", 2, "--length", 32, "--relation-heads", 6)
    code, out, err = cli("quickstart", "--teacher", ground.teacher, "--text", text, "--output", output, *sizes)
    assert code == 0, err
    for part in ("held-out relation KL", "Spearman", f'AutoModel.from_pretrained("{output}/export/2L")'):
        assert part in out, part
