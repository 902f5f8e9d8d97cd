"""A student on the Hub: in one commit, private, with its card; fetched back it is the student that was trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import yaml
from hub_runs import TOKEN, environment, files_of, run_config
from tiny_models import random_params
from waiting import PATIENCE

from jaxdistill.card import card_of
from jaxdistill.config import load_config
from jaxdistill.errors import InputError
from jaxdistill.hub.push import Push
from jaxdistill.models import find_model, hub_origin, load_pretrained, save_pretrained, weights_sha256
from jaxdistill.resolve import resolve

# Of the client's own upload by plain LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    for part in parts:
        assert part in err, err


def write_results(folder, model, name="small") -> None:
    """Two seeds on RTE, as evaluate writes them."""
    runs = [{"seed": seed, "learning_rate": 2e-5, "batch_size": 32, "epochs": 3, "scores": {"validation": {"accuracy": value}}}
            for seed, value in ((0, 0.6), (1, 0.7))]  # fmt: skip
    scores = {"protocol": {"name": "udagawa2023"}, "tasks": {"rte": {"runs": runs, "examples": {"train": 10, "train_available": 10}}}}
    folder.mkdir(exist_ok=True)
    value = {"format": "jaxdistill results", "name": name, "model": {"weights_sha256": weights_sha256(model)}, "scores": scores}
    (folder / f"{name}.json").write_text(json.dumps(value))


def test_push_and_fetch_back(cli, hub, distilled, cache, tmp_path):
    write_results(tmp_path / "results", distilled / "export" / "small")
    code, out, err = cli("export", distilled, "--push", "owner/pushed", "--results", tmp_path / "results")
    assert code == 0, err
    repository = hub.models["owner/pushed"]
    commit, files = repository.at("main")
    assert repository.private and len(repository.commits) == 2  # the one that made it, and all files in one more
    assert f"{hub.endpoint}/owner/pushed/tree/{commit} (private; " in out
    assert hub.asked("GET", "xet-write-token") == 1 and hub.asked("PUT", "/lfs/") == 2
    assert sorted(path.name for path in (distilled / "export").iterdir()) == ["small"]
    # Its files are those of the run's own export, the card aside.
    there, here = ({path: content for path, content in each.items() if "README" not in path and path[0] != "."} for each in
                   (files, files_of(distilled / "export" / "small")))  # fmt: skip
    assert there == here and {"mlm/model.safetensors", "tokenizer.json"} <= there.keys()
    found = find_model("owner/pushed")
    assert hub_origin(found) == ("owner/pushed", commit) and found.is_relative_to(cache)
    for place in ("", "mlm"):
        (one, ours), (other, theirs) = load_pretrained(distilled / "export" / "small" / place), load_pretrained(found / place)
        assert one == other
        np.testing.assert_array_equal(ours["layers"]["01"]["query"]["kernel"], theirs["layers"]["01"]["query"]["kernel"])
    # The same again sends nothing and makes no commit.
    code, out, _ = cli("export", distilled, "--push", "owner/pushed", "--results", tmp_path / "results")
    assert code == 0 and "holds these very files already" in out and len(repository.commits) == 2


def test_the_card(cli, hub, distilled, ground, tmp_path):
    write_results(tmp_path / "results", distilled / "export" / "small")
    assert cli("export", distilled, "--push", "owner/card", "--results", tmp_path / "results")[0] == 0
    card = hub.models["owner/card"].at("main")[1]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    (entry,) = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers", "license": "cc-by-sa-4.0", "language": ["en", "de"], "base_model": "acme/teacher",
        "pipeline_tag": "feature-extraction", "tags": ["distillation", "jaxdistill"],
    }  # fmt: skip
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "RTE", "type": "nyu-mll/glue", "config": "rte", "split": "validation"}
    assert result["metrics"] == [{"type": "accuracy", "value": 65.0, "name": "accuracy, %, mean of 2 seeds"}]
    assert "| RTE validation | accuracy | 65.0 ± 7.1 | 2 |" in card and "Protocol udagawa2023" in card
    held_out = [json.loads(line)["small/held_out"] for line in (distilled / "metrics.jsonl").read_text().splitlines() if "held_out" in line]
    tokens = json.loads((distilled / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]
    totals = json.loads((distilled / "tokens" / "manifest.json").read_text())["totals"]
    text_tokens = sum(totals["tokens"].values())
    for part in (
        f"`acme/teacher` at revision `{ground.commit}`, 3 x 48",
        f"| sha256 of the teacher's model.safetensors | `{sha256((ground.teacher / 'model.safetensors').read_bytes()).hexdigest()}` |",
        f"| text | `letters.txt`, 80 documents of {text_tokens:,} tokens |",
        "| text, in all | 10 % of the documents held out, not trained on |",
        "| start | teacher layer 1 |",
        f"2 steps of 8 x 16 tokens, masked text; {tokens:,} tokens seen",
        "1 x output_kl", "1 x hidden_mse: layers 1<-3",
        "AdamW, learning rate 0.0005, linear, warm-up 0.05, betas 0.9 and 0.98",
        "float32 products, float32 parameters; these weights are float32",
        "| hardware | 8 x CPU for 0:00:", f"{held_out[0]:#.4g} before, {held_out[-1]:#.4g} after",
        "cc-by-sa-4.0, as the teacher", "jaxdistill 0.1.0, jax ",
        'AutoModel.from_pretrained("owner/card")', 'AutoModelForMaskedLM.from_pretrained("owner/card", subfolder="mlm")',
        "## Limits", "It takes at most 64 tokens and was distilled on rows of 16",
    ):  # fmt: skip
        assert part in card, part
    for private in (str(ground.text.parent), "a private place", str(distilled), TOKEN, hub.endpoint):
        assert private not in card


def test_dry_run(cli, hub, distilled, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    before = {path: path.stat().st_mtime_ns for path in distilled.rglob("*") if "checkpoints" not in path.parts}
    code, out, err = cli("export", distilled, "--push", "owner/dry", "--dry-run", "--public")
    assert code == 0, err
    assert "owner/dry" not in hub.models and not hub.asked("POST", "") and not hub.asked("PUT", "")
    assert {path: path.stat().st_mtime_ns for path in distilled.rglob("*") if "checkpoints" not in path.parts} == before
    size = (distilled / "export" / "small" / "model.safetensors").stat().st_size
    assert "to owner/dry, branch main, public; it would be created" in out
    assert f"{size:>13,}  model.safetensors  (new)" in out and "mlm/config.json  (new)" in out and "base_model: acme/teacher" in out
    code, out, _ = cli("export", distilled, "--dry-run")
    assert code == 0 and f"to {distilled / 'export' / 'small'} (which exists)" in out and f"{size:>13,}  model.safetensors\n" in out
    assert {path: path.stat().st_mtime_ns for path in distilled.rglob("*") if "checkpoints" not in path.parts} == before


def test_dry_run_of_what_is_there_and_without_a_network(cli, hub, distilled):
    assert cli("export", distilled, "--push", "owner/again")[0] == 0
    out = cli("export", distilled, "--push", "owner/again", "--dry-run")[1]
    assert "private; it exists" in out and "model.safetensors  (same)" in out and "(new)" not in out
    out = cli("export", distilled, "--push", "owner/again", "--dry-run", "--dtype", "float16")[1]
    assert "model.safetensors  (changed)" in out and "tokenizer.json  (same)" in out
    hub.break_next("GET", "/api/models/owner", 503)
    code, out, _ = cli("export", distilled, "--push", "owner/again", "--dry-run")
    assert code == 0 and f"cannot be asked: owner/again: the Hub at {hub.endpoint} (HF_ENDPOINT) answered 503" in out
    assert len(hub.models["owner/again"].commits) == 2


def test_an_upload_that_breaks_off_goes_on(cli, hub, distilled):
    hub.break_next("POST", "/commit/", 500)
    refused(cli("export", distilled, "--push", "owner/broken"), "owner/broken: the Hub", "answered 500", "the same command goes on")
    assert hub.models["owner/broken"].at("main")[1].keys() == {".gitattributes"}
    hub.breaks.clear()
    hub.requests.clear()
    assert cli("export", distilled, "--push", "owner/broken")[0] == 0
    assert not hub.asked("PUT", "/lfs/")  # the Hub has the weights already
    assert "model.safetensors" in hub.models["owner/broken"].at("main")[1]


def test_what_arrived_is_checked(cli, hub, distilled, monkeypatch):
    from fake_hub import Repository

    whole = Repository.commit
    monkeypatch.setattr(Repository, "commit", lambda self, files, *more: whole(self, files | {"config.json": b"{}"}, *more))
    refused(cli("export", distilled, "--push", "owner/damaged"), "does not hold what was sent: config.json differs")


def test_repositories_that_are_not_to_be_written(cli, hub, distilled):
    foreign = {"README.md": b"---\ntags: [bert]\n---\n", "pytorch_model.bin": b"x", "model-00001-of-00002.safetensors": b"y"}
    hub.add("owner/foreign", foreign, private=True)
    refused(cli("export", distilled, "--push", "owner/foreign"), "holds 3 files that jaxdistill did not write", "--overwrite")
    hub.add("owner/uncarded", {"notes.txt": b"x"}, private=True)
    refused(cli("export", distilled, "--push", "owner/uncarded"), "holds 1 files that jaxdistill did not write")
    hub.add("owner/open", {}, private=False)
    refused(cli("export", distilled, "--push", "owner/open"), "owner/open is public; say --public")
    assert cli("export", distilled, "--push", "owner/open", "--public")[0] == 0 and not hub.models["owner/open"].private
    assert cli("export", distilled, "--push", "owner/foreign", "--overwrite")[0] == 0
    files = hub.models["owner/foreign"].at("main")[1]
    assert "pytorch_model.bin" in files and "model-00001-of-00002.safetensors" not in files  # shards would be read beside ours
    # A repository of ours takes the next export.
    assert cli("export", distilled, "--push", "owner/foreign", "--dtype", "float16")[0] == 0


def test_public_is_for_new_repositories(cli, hub, distilled):
    hub.add("owner/closed", {}, private=True)
    still = "private as before: --public is for new repositories, this one's settings on the Hub change it"
    assert f"branch main, {still}; it exists" in cli("export", distilled, "--push", "owner/closed", "--public", "--dry-run")[1]
    assert f"({still}; " in cli("export", distilled, "--push", "owner/closed", "--public")[1] and hub.models["owner/closed"].private
    assert f"these very files already ({still})" in cli("export", distilled, "--push", "owner/closed", "--public")[1]


def test_a_branch(cli, hub, distilled):
    assert cli("export", distilled, "--push", "owner/branched", "--revision", "half", "--dtype", "float16", "--step", "1")[0] == 0
    repository = hub.models["owner/branched"]
    assert repository.at("main")[1].keys() == {".gitattributes"}
    card = repository.at("half")[1]["README.md"].decode()
    assert "these weights are float16" in card and "1 steps of 8 x 16 tokens (of 2 planned)" in card
    for kind, more in (("AutoModel", ""), ("AutoTokenizer", ""), ("AutoModelForMaskedLM", ', subfolder="mlm"')):
        assert f'{kind}.from_pretrained("owner/branched", revision="half"{more})' in card
    assert load_pretrained("owner/branched@half")[0].num_layers == 1
    refused(cli("export", distilled, "--push", "owner/branched", "--revision", "../x"), "is no name of a branch")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nobody", ["'nobody' is no repository of the Hub: owner/name"]),
        ("owner/a--b", ["no repository of the Hub"]),
        ("owner/a/b", ["no repository of the Hub"]),
        ("owner/../b", ["no repository of the Hub"]),
        ("owner/x;rm -rf", ["no repository of the Hub"]),
        ("owner/" + "x" * 97, ["at most 96"]),
        ("https://owner:secret@host/x", ["no repository of the Hub", "https://***@host"]),
        ("stranger/model", ["the Hub forbids it (403)", "stranger must be an account or an organisation that it may write to\n"]),
    ],
)
def test_names(name, parts, cli, hub, distilled):
    refused(cli("export", distilled, "--push", name), *parts)
    assert "PUT" not in {method for method, *_ in hub.requests}


def test_who_may_not(cli, hub, distilled, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_readreadread-read")
    refused(cli("export", distilled, "--push", "owner/new"), "owner/new: the Hub forbids it (403): the token lacks the permission")
    monkeypatch.setenv("HF_TOKEN", "hf_nobodynobodynobody")
    refused(cli("export", distilled, "--push", "owner/new"), "does not accept the token", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    refused(cli("export", distilled, "--push", "owner/new"), "no token of the Hub; log in with `hf auth login`")
    assert "owner/new" not in hub.models


def test_no_network(cli, hub, distilled, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(cli("export", distilled, "--push", "owner/new"), "could not be reached (HF_HUB_OFFLINE is set)")
    monkeypatch.undo()
    with monkeypatch.context() as patch:  # a server, and no Hub
        patch.setattr("huggingface_hub.constants.ENDPOINT", f"{hub.endpoint}/elsewhere")
        patch.setattr("huggingface_hub.hf_api.ENDPOINT", f"{hub.endpoint}/elsewhere", raising=False)
        refused(cli("export", distilled, "--push", "owner/new"), "answered 404 as no Hub does; correct HF_ENDPOINT\n")
    hub.break_next("POST", "/api/repos/create", 502)
    refused(cli("export", distilled, "--push", "owner/new"), f"the Hub at {hub.endpoint} (HF_ENDPOINT) answered 502")


def test_a_teacher_without_a_licence(cli, hub, distilled, ground, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(distilled, run, ignore=shutil.ignore_patterns("tokens"))
    teacher = tmp_path / "bare"
    shutil.copytree(ground.teacher, teacher)
    (teacher / "README.md").write_text("no metadata, so no licence")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"teacher": str(teacher), "teacher_name": "bare"}
    text = (run / "config.yaml").read_text().splitlines()[0] + "\n" + yaml.safe_dump(config)
    (run / "config.yaml").write_text(text)
    refused(cli("export", run, "--push", "owner/bare"), "--license: the teacher's own card names no licence")
    refused(cli("export", run, "--push", "owner/bare", "--license", "MIT; rm"), "is no identifier of the Hub")
    refused(cli("export", run, "--push", "owner/bare", "--license", "MIT"), "'MIT' is no identifier of the Hub", "other; mit?")
    code, out, _ = cli("export", run, "--push", "owner/bare", "--dry-run")
    assert code == 0 and out.startswith("to push it, give a licence") and "not stated by the teacher" in out
    assert cli("export", run, "--push", "owner/bare", "--license", "mit")[0] == 0
    card = hub.models["owner/bare"].at("main")[1]["README.md"].decode()
    assert "license: mit\n" in card and "| licence | mit |" in card and "base_model" not in card and "`bare`" in card


def test_a_run_keeps_the_commit_that_it_began_with(hub, distilled, ground, tmp_path):
    """Its teacher's main branch is another model by the time that it goes on."""
    from jaxdistill.distill import distill

    begun = load_config(distilled)
    assert (begun.teacher, begun.teacher_name) == (f"acme/teacher@{ground.commit}", "acme/teacher")
    shape = load_pretrained(ground.teacher)[0]
    save_pretrained(tmp_path / "other", shape, random_params(shape, 7, mlm=True), head="mlm")
    config = run_config(ground, distilled)
    try:
        moved = hub.add("acme/teacher", files_of(ground.teacher) | files_of(tmp_path / "other"))
        distill(config)  # asks for main: that of the beginning is meant
        assert load_config(distilled).teacher == f"acme/teacher@{ground.commit}"
        with pytest.raises(InputError, match="teacher: its weights changed since the run"):
            distill(config | {"teacher": f"acme/teacher@{moved}"})
        start = {"students": {"small": {"num_layers": 3, "initialise": {"checkpoint": "acme/teacher"}}}}
        new = resolve(load_config(config | start | {"output": str(tmp_path / "new")}))
        assert (new.config.teacher, new.config.students["small"].initialise.checkpoint) == (f"acme/teacher@{moved}",) * 2
        assert new.checkpoints["small"].name == moved
    finally:
        hub.models["acme/teacher"].branches["main"] = ground.commit


def test_no_token_is_written(hub, distilled):
    """The run was made with a token in the environment, which the Hub was sent."""
    written = [path for path in distilled.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if TOKEN.encode() in path.read_bytes()]
    find_model("acme/teacher")
    assert f"Bearer {TOKEN}" in {value for *_, headers in hub.requests for value in headers.values()}


def test_options_that_would_mean_nothing(cli, hub, distilled):
    refused(cli("export", distilled, "--public"), "--public: means nothing without --push")
    refused(cli("export", distilled, "--revision", "x"), "--revision: means nothing without --push")


def test_several_students_have_a_repository_each():
    assert Push("me/x").names(["a"]) == {"a": "me/x"}
    assert Push("me/x").names(["a", "b"]) == {"a": "me/x-a", "b": "me/x-b"}


@pytest.mark.torch
def test_pytorch_loads_what_was_pushed(hub, distilled, tmp_path):
    """Processes of their own that know the Hub by HF_ENDPOINT: the command line pushes, transformers fetches."""
    command = [sys.executable, "-m", "jaxdistill.cli", "export", str(distilled), "--push", "owner/loaded"]
    own = environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    pushed = subprocess.run(command, env=own, capture_output=True, text=True, timeout=PATIENCE)
    assert pushed.returncode == 0, pushed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr
    code = """
import json, sys, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
found = {}
for name, kind, options in (("base", AutoModel, {}), ("mlm", AutoModelForMaskedLM, {"subfolder": "mlm"})):
    model, info = kind.from_pretrained("owner/loaded", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    found[name] = {name: float(value.double().abs().sum()) for name, value in model.state_dict().items()}
found["tokens"] = AutoTokenizer.from_pretrained("owner/loaded")("the river").input_ids
print(json.dumps(found))
"""
    loaded = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=PATIENCE)
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout.splitlines()[-1])
    from safetensors.numpy import load_file

    for name, place in (("base", "."), ("mlm", "mlm")):
        ours = load_file(distilled / "export" / "small" / place / "model.safetensors")
        sums = {key: float(np.abs(value.astype(np.float64)).sum()) for key, value in ours.items()}
        assert {key: found[name][key] for key in sums} == pytest.approx(sums, rel=1e-12)
    assert len(found["tokens"]) > 2


def test_card_of_a_folder_that_has_none(tmp_path):
    assert card_of(tmp_path) == {}
    for text in ("no front matter", "---\n[\n---\n", "---\n- a list\n---\n", "---\n" + "[" * 5000 + "\n---\n", "\xff"):
        (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
        assert card_of(tmp_path) == {}
