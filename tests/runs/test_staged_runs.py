"""Runs of several stages: what one leaves for the next, assistants, and going on wherever a run was stopped."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import pytest
import yaml
from commands import command, finish
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder
from waiting import wait_for

import jaxdistill
from jaxdistill.checkpoint import Checkpoints, Position
from jaxdistill.config import load_config
from jaxdistill.distill import begin
from jaxdistill.errors import DivergedError, InputError
from jaxdistill.models import load_pretrained
from jaxdistill.resolve import resolve_stages
from jaxdistill.sharding import create_mesh
from jaxdistill.state import abstract_state

pytestmark = [pytest.mark.usefixtures("compiled_once"), pytest.mark.long]

FIRST_STEPS, LAST_STEPS = 6, 24


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """With an MLM head."""
    backend = wordpiece()
    folder = write_folder(tmp_path_factory.mktemp("headed") / "teacher", backend, BERT_SPECIAL)
    write_model(folder, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=4, max_position_embeddings=64), mlm=True)
    return folder


@pytest.fixture(scope="module")
def staged(ground, teacher):
    """A config of HS for two students, then OD for one of them; the store lies in the run."""

    def config(output: Path, **changes) -> dict:
        students = {
            "small": {"num_layers": 2, "objective": [{"kind": "hidden_mse", "layer_map": "uniform"}]},
            "narrow": {"num_layers": 2, "hidden_size": 24, "num_heads": 2, "objective": ["hidden_mse"]},
        }
        od = {"students": ["small"], "objective": ["output_kl"], "optimizer": {"learning_rate": 2e-3}, "training": {"steps": LAST_STEPS}}
        fields = {"teacher": str(teacher), "mesh": {"data": 8}, "students": students, "data__store": None}
        fields |= {"training__steps": FIRST_STEPS, "training__checkpoint_every": 3, "training__keep_checkpoints": 20}
        fields |= {"training__evaluate_every": 100, "stages": {"hs": {}, "od": od}}
        return ground.config(output, **fields | changes)

    return config


@pytest.fixture(scope="module")
def done(staged, tmp_path_factory):
    """The run, left alone."""
    return jaxdistill.distill(staged(tmp_path_factory.mktemp("done") / "run"))


@pytest.fixture
def copy(done, tmp_path):
    """The finished run in a folder of its own, to damage."""
    return Path(shutil.copytree(done.output, tmp_path / "run"))


def leaves(params) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def assert_equal(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def first_params(run) -> dict:
    """Every student's parameters before the first step, as the run itself makes them."""
    _, teacher_params = load_pretrained(run.teacher_folder)
    mesh = create_mesh(run.config.mesh)
    with jax.set_mesh(mesh), TemporaryDirectory() as folder, Checkpoints(Path(folder)) as none:
        state, at = begin(run, none, mesh, teacher_params, print)
    assert at == Position()
    return {name: student.trained["params"] for name, student in state.students.items()}


def last_params(run, step: int, student: str) -> dict:
    """From the checkpoint of a step."""
    _, teacher_params = load_pretrained(run.teacher_folder)
    with Checkpoints(run.output / "checkpoints") as checkpoints:
        state = checkpoints.restore(step, abstract_state(run, teacher_params, create_mesh(run.config.mesh)))
    return state.students[student].trained["params"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    return {record["step"]: record["loss"] for record in records if "loss" in record}


# What a stage leaves for the next


def test_the_folders_of_a_staged_run(done):
    run, first = done.output, done.output / "stages" / "hs"
    assert names(run / "stages") == {"hs"} and {"tokens", "config.yaml", "checkpoints", "metrics.jsonl", "export"} <= names(run)
    assert "tokens" not in names(first) and {"config.yaml", "checkpoints", "metrics.jsonl", "export"} <= names(first)
    assert list(losses(first)) == list(range(1, FIRST_STEPS + 1)) and list(losses(run)) == list(range(1, LAST_STEPS + 1))
    # The run's folder has the whole config, a stage's only its own.
    assert list(load_config(run).stages) == ["hs", "od"] and load_config(first).stages == {}


def test_exports_of_both_stages(done):
    first, last = done.output / "stages" / "hs" / "export", done.output / "export"
    assert names(first) == {"small", "narrow"} and names(last) == {"small"}  # the student left out stays where it was trained
    assert done.exports == {"small": last / "small"} and done.students.keys() == {"small"}
    assert (last / "small" / "mlm" / "model.safetensors").is_file() and "mlm" not in names(first / "small")
    assert load_pretrained(last / "small" / "mlm")[1].keys() == {"embeddings", "layers", "mlm"}
    assert load_pretrained(first / "narrow")[0].hidden_size == 24
    card = (last / "small" / "README.md").read_text()
    assert "masked text, after hs" in card and "1 x output_kl" in card
    for stage, term in (("hs", "hidden_mse"), ("od", "output_kl")):  # the card tells the whole way
        assert f"| stage {stage}: training | " in card and f"| stage {stage}: hardware | " in card
        assert term in next(line for line in card.splitlines() if line.startswith(f"| stage {stage}: objective"))


def test_the_second_stage_starts_where_the_first_ended(done, teacher):
    runs = resolve_stages(load_config(done.output))
    first = first_params(runs[1])["small"]
    ended = last_params(runs[0], FIRST_STEPS, "small")
    encoder = {name: first[name] for name in ("embeddings", "layers")}
    assert_equal(encoder, ended)
    exported = load_pretrained(runs[0].output / "export" / "small")[1]
    assert_equal(encoder, {name: exported[name] for name in encoder})
    # HS trained no head: the student's is new, not the teacher's. And it is trained from here on.
    head, taught, trained = first["mlm"], load_pretrained(teacher)[1]["mlm"], done.students["small"][1]["mlm"]
    for other in (taught, trained):
        assert not np.allclose(head["dense"]["kernel"], other["dense"]["kernel"], atol=1e-4)
    began = first_params(runs[0])["small"]
    assert not np.array_equal(began["layers"]["01"]["query"]["kernel"], ended["layers"]["01"]["query"]["kernel"])


def test_each_stage_has_its_own_objective_rate_and_text(done):
    hs, od = resolve_stages(load_config(done.output))
    assert {s.name: [term.kind for term in s.terms] for s in hs.students} == {"small": ["hidden_mse"], "narrow": ["hidden_mse"]}
    assert hs.layer_map == {"small": {"hidden_mse": [[1, 2], [2, 4]]}, "narrow": {"hidden_mse": [[2, 4]]}}
    assert [(s.name, s.input, s.has_mlm_head) for s in od.students] == [("small", "masked", True)]
    assert [s.input for s in hs.students] == ["clean", "clean"]
    assert (hs.settings.seed, od.settings.seed) == (0, 1)
    record = [json.loads(line) for line in (done.output / "metrics.jsonl").read_text().splitlines()][2]
    assert record["learning_rate"] == pytest.approx(2e-3, rel=0.1) and "small/output_kl" in record


# Assistants


@pytest.fixture(scope="module")
def assisted(staged, tmp_path_factory):
    """OD into an assistant, OD from it into a smaller one, and from the encoder of that one HS into a third."""
    stages = {
        "assistant": {"students": ["assistant"]},
        "smaller": {"teacher": {"student": "assistant"}, "students": ["smaller"]},
        "last": {"teacher": {"student": "smaller"}, "students": ["last"], "objective": ["hidden_mse"]},
    }
    students = {"assistant": {"num_layers": 3}, "smaller": {"num_layers": 2}, "last": {"num_layers": 1}}
    output = tmp_path_factory.mktemp("assisted") / "run"
    config = staged(output, students=students, objective=["output_kl"], stages=stages, training__steps=2)
    return config, jaxdistill.distill(config)


def test_an_assistants_folder(assisted):
    """With its head where logits are read, else the encoder; planned before it is there, and the same afterwards."""
    config, done = assisted
    stages = done.output / "stages"
    expected = [Path(config["teacher"]), stages / "assistant" / "export" / "assistant" / "mlm", stages / "smaller" / "export" / "smaller"]
    for output in (done.output, done.output.parent / "another"):
        folders = [run.teacher_folder for run in resolve_stages(load_config(config | {"output": str(output)}))]
        assert folders == [Path(str(folder).replace(str(done.output), str(output))) for folder in expected]
    assert [run.teacher.num_layers for run in resolve_stages(load_config(config))] == [4, 3, 2]
    assert resolve_stages(load_config(config))[1].config.teacher_name == "assistant (stage assistant)"


@pytest.mark.parametrize(("stage", "student"), [("smaller", "smaller"), ("last", "last")])
def test_the_teacher_is_the_assistant_as_it_was_exported(assisted, staged, tmp_path, stage, student):
    """A plain run with that folder as its teacher has the same losses to the last bit; one with the first teacher has others."""
    config, _ = assisted
    run = next(run for run in resolve_stages(load_config(config)) if run.stage == stage)
    alone = {"students": {student: config["students"][student]}, "training__steps": 2, "training__seed": run.config.training.seed}
    alone |= {"objective": config["stages"][stage].get("objective", ["output_kl"]), "data__store": str(run.store)}
    plain = jaxdistill.distill(staged(tmp_path / "plain", teacher=str(run.teacher_folder), stages={}, **alone))
    assert losses(plain.output) == losses(run.output)
    other = jaxdistill.distill(staged(tmp_path / "other", stages={}, **alone))
    held_out = [folder_held_out(folder, student) for folder in (plain.output, run.output, other.output)]
    assert held_out[0] == held_out[1] and abs(held_out[2] - held_out[0]) > 1e-3 * held_out[0]


def folder_held_out(folder: Path, student: str, *, first: bool = True) -> float:
    """Loss before the first step, or after the last."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 0
    return records[0 if first else -1][f"{student}/held_out"]


# Going on


def assert_goes_on(config, done) -> None:
    """To the bit where the run ends that was left alone; both stages' records are whole."""
    again = jaxdistill.distill(config)
    assert_equal(again.students["small"][1], done.students["small"][1])
    assert losses(again.output) == losses(done.output)
    stage = Path("stages") / "hs"
    assert losses(again.output / stage) == losses(done.output / stage)
    for student in ("small", "narrow"):
        folders = [folder / stage / "export" / student for folder in (again.output, done.output)]
        assert_equal(*(load_pretrained(folder)[1] for folder in folders))


def remove(folder: Path, *paths: str) -> None:
    for path in (folder / path for path in paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def stop_before_the_last_stage(run: Path) -> None:
    """What the last stage writes into the run's folder, all of it: the boundary is that none of it is there."""
    remove(run, "checkpoints", "metrics.jsonl", "loss.png", "summary.md", "export")
    assert names(run) == {"config.yaml", "stages", "tokens", ".lock"}


def stop_stage(stage: Path, step: int) -> None:
    """As kill -9 leaves a stage: the checkpoints so far, records beyond them and half a line, nothing of its end."""
    remove(stage, "loss.png", "summary.md", "export")
    for path in (stage / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    lines = (stage / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (stage / "metrics.jsonl").write_bytes(b"".join(lines[: step + 3]) + lines[-1][:20])


def test_stopped_in_the_first_stage(copy, staged, done, capsys):
    stop_before_the_last_stage(copy)
    stop_stage(copy / "stages" / "hs", 3)
    assert names(copy / "stages" / "hs" / "checkpoints") == {"3"}
    assert_goes_on(staged(copy), done)
    said = capsys.readouterr().err
    assert said.count("going on from step") == 1 and "going on from step 3" in said


@pytest.mark.parametrize("exported", ["nothing", "half", "all"])
def test_stopped_at_the_boundary(copy, staged, done, capsys, exported):
    """After the first stage's last checkpoint, before the second's first: nothing of the export, one student of two, all of it.

    A student's folder is written beside its place and renamed, so that half an export is whole folders and a hidden one.
    """
    stop_before_the_last_stage(copy)
    export = copy / "stages" / "hs" / "export"
    if exported == "nothing":
        shutil.rmtree(export)
    elif exported == "half":
        (export / "narrow").rename(export / ".narrow.tmp")
        (export / ".narrow.tmp" / "model.safetensors").write_bytes(b"half")
    before = (export / "small" / "model.safetensors").stat().st_mtime_ns if exported != "nothing" else None
    assert_goes_on(staged(copy), done)
    said = capsys.readouterr().err
    assert f"the run is complete: step {FIRST_STEPS}" in said and "going on from step" not in said
    assert names(export) == {"small", "narrow"}
    assert before in (None, (export / "small" / "model.safetensors").stat().st_mtime_ns)


def test_killed_in_the_second_stage(staged, done, tmp_path):
    """A real kill -9 of the command, on as many devices; the run's folder is enough to go on with."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(staged(tmp_path / "run")))
    process, run = command("distill", config, num_devices=8), tmp_path / "run"
    wait_for(lambda: (run / "checkpoints").is_dir() and any(name.isdigit() for name in names(run / "checkpoints")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "export").exists() and str(LAST_STEPS) not in names(run / "checkpoints")
    code, _, err = finish(command("distill", run, num_devices=8))
    assert code == 0, err
    assert f"the run is complete: step {FIRST_STEPS}" in err and err.count("going on from step") == 1
    assert losses(run) == losses(done.output)
    assert_equal(load_pretrained(run / "export" / "small" / "mlm")[1], load_pretrained(done.exports["small"] / "mlm")[1])


def test_a_finished_run_is_left_alone(copy, staged, done, capsys):
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    before = content()
    times = {path: path.stat().st_mtime_ns for path in before if path.suffix in (".safetensors", ".jsonl") or "checkpoints" in path.parts}
    assert_goes_on(staged(copy), done)
    said = capsys.readouterr().err
    assert f"the run is complete: step {FIRST_STEPS}" in said and f"the run is complete: step {LAST_STEPS}" in said
    # Configs and summaries name the folder that they are in; all else is as it was.
    places = [str(folder).encode() for folder in (done.output, copy)]
    after = content()
    assert after.keys() == before.keys()
    for path, old in before.items():
        old = old.replace(*places) if path.name in ("config.yaml", "summary.md") else old
        assert after[path] == old, path
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_run_that_was_moved(copy, done):
    """Its configs name a place that is no more; the folder alone goes on, with its own text."""
    stop_stage(copy, 9)
    for path in copy.rglob("config.yaml"):
        assert str(done.output) in path.read_text()
        path.write_text(path.read_text().replace(str(done.output), "/no/such/place"))
    assert_goes_on(copy, done)
    assert load_config(copy).output == str(copy)


def test_overwrite_begins_anew(copy, staged, done, tmp_path):
    """With another text in another store: nothing of the earlier run is asked."""
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in make_texts(60, seed=5)))
    config = staged(copy, data__sources=[str(text)], data__store=str(tmp_path / "store"))
    config["stages"] = {"hs": {}, "again": config["stages"]["od"]}
    (copy / "stages" / "old").mkdir()
    with pytest.raises(InputError, match=r"^stages\.od\.\w+: the run in "):
        jaxdistill.distill(config)
    again = jaxdistill.distill(config, overwrite=True)
    assert names(copy / "stages") == {"hs"} and again.students.keys() == {"small"}
    for stage in ("", "stages/hs"):
        ours, theirs = (losses(folder / stage) for folder in (copy, done.output))
        assert ours.keys() == theirs.keys() and ours.items().isdisjoint(theirs.items())
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["sources"][0]["source"] == str(text)


@pytest.mark.parametrize(
    ("field", "stages"),
    [
        ("stages.od.training.steps", {"od": {"training": {"steps": LAST_STEPS + 1}}}),
        ("stages.od.optimizer.learning_rate", {"od": {"optimizer": {"learning_rate": 3e-3}}}),
        ("stages.od.objective.0.temperature", {"od": {"objective": [{"kind": "output_kl", "temperature": 2}]}}),
        ("stages.od.students", {"od": {"students": None}}),
        ("stages.hs.training.seed", {"hs": {"training": {"seed": 5}}}),
        ("stages", {"third": {}}),
        ("training.steps", None),
    ],
)
def test_refused_continuations_name_the_stages_field(staged, done, field, stages):
    config = staged(done.output)
    if stages is None:
        config["training"]["steps"] += 1
    for name, said in (stages or {}).items():
        config["stages"][name] = config["stages"].get(name, {}) | said
    before = {path: path.stat().st_mtime_ns for path in done.output.rglob("*")}
    with pytest.raises(InputError, match=rf"^{field}(\.[a-z_]+)?: the run in {done.output} has "):
        jaxdistill.distill(config)
    assert {path: path.stat().st_mtime_ns for path in done.output.rglob("*")} == before


def test_the_order_of_the_stages_is_theirs(staged, done):
    config = staged(done.output)
    config["stages"] = dict(reversed(config["stages"].items()))
    with pytest.raises(InputError, match=r"^stages: the run in .* has \['hs', 'od'\], this config \['od', 'hs'\]; "):
        jaxdistill.distill(config)


def test_what_changes_no_number_may_change_in_a_stage_as_well(copy, staged, done):
    config = staged(copy)
    config["stages"]["od"]["training"] |= {"micro_batches": 1, "log_every": 5, "keep_checkpoints": 3}
    config["stages"]["hs"]["training"] = {"evaluate_every": 2}
    config["stages"]["hs"]["teacher"] = shutil.copytree(config["teacher"], copy.parent / "moved teacher")
    assert_goes_on(config, done)


# The other commands


def test_commands_on_a_staged_run(cli, done, staged, tmp_path):
    code, _, err = cli("distill", done.output)
    assert code == 0 and err.count("the run is complete") == 2, err
    code, out, err = cli("inspect", done.output)
    assert code == 0 and err == "", err
    for part in ("Stage hs", "Stage od", "hidden_mse", "1<-2 2<-4", "output_kl", "stages:"):
        assert part in out, part
    code, out, err = cli("export", done.output, "--to", tmp_path / "out", "--step", 9)
    assert (code, out) == (0, f"{tmp_path / 'out' / 'small'}\n"), err
    exported, ended = (
        load_pretrained(tmp_path / "out" / "small" / "mlm")[1],
        last_params(resolve_stages(load_config(done.output))[1], 9, "small"),
    )
    assert_equal(exported, ended)
    # A stage is a run: its students, also the one that went no further, are exported like any.
    code, out, err = cli("export", done.output / "stages" / "hs", "--to", tmp_path / "first", "--student", "narrow")
    assert (code, out) == (0, f"{tmp_path / 'first' / 'narrow'}\n"), err
    code, _, err = cli("export", done.output, "--student", "narrow", "--to", tmp_path / "out")
    assert code == 2 and "has no student 'narrow'" in err


def test_prepare_makes_the_store_that_every_stage_reads(cli, staged, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(staged(tmp_path / "run")))
    code, out, err = cli("prepare", config)
    assert code == 0 and str(tmp_path / "run" / "tokens") in out, err
    assert {str(run.store) for run in resolve_stages(load_config(config))} == {str(tmp_path / "run" / "tokens")}
    assert (tmp_path / "run" / "tokens" / "manifest.json").is_file()


def test_the_head_crosses_a_boundary(staged, tmp_path):
    """OD in both stages: the second begins at the held-out value with which the first ended, from a run folder as well."""
    fields = {"students": {"small": {"num_layers": 2, "hidden_size": 24}}, "objective": ["output_kl"], "training__evaluate_every": 3}
    stages = {"one": {}, "two": {"training": {"seed": 0, "steps": 3}}}
    run = jaxdistill.distill(staged(tmp_path / "run", **fields, stages=stages))
    ended, began = folder_held_out(run.output / "stages/one", "small", first=False), folder_held_out(run.output, "small")
    assert began == pytest.approx(ended, rel=1e-5)
    start = {"num_layers": 2, "hidden_size": 24, "initialise": {"checkpoint": str(run.output)}}
    ended = folder_held_out(run.output, "small", first=False)
    fields |= {"students": {"other": start}, "training__steps": 1}
    jaxdistill.distill(staged(tmp_path / "other", **fields, stages={}))
    assert folder_held_out(tmp_path / "other", "other") == pytest.approx(ended, rel=1e-5)


def test_a_student_that_diverged_is_left_out_of_the_next_stage(staged, tmp_path, capsys):
    students = {"well": {"num_layers": 1}, "wild": {"num_layers": 1, "optimizer": {"learning_rate": 1e30}}}
    fields = {"students": students, "objective": ["hidden_mse"], "training__freeze_after": 2}
    run = jaxdistill.distill(staged(tmp_path / "run", **fields, stages={"one": {}, "two": {"training": {"steps": 2}}}))
    assert (list(run.students), run.frozen) == (["well"], {})
    assert "warning: wild has diverged in an earlier stage and is left out of this one" in capsys.readouterr().err
    assert names(run.output / "export") == {"well"} and names(run.output / "stages/one/export") == {"well", "wild"}
    taught = {"students": {"new": {"num_layers": 1}}, "teacher": {"student": "wild"}}
    with pytest.raises(DivergedError, match=r"^stage two: its teacher wild \(stage one\) has diverged"):
        jaxdistill.distill(staged(tmp_path / "taught", **fields, stages={"one": {}, "two": taught}))
