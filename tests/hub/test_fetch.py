"""Models of the Hub: at one commit, only what is wanted, and one clear line where there is nothing to have."""

from __future__ import annotations

import pytest
import yaml
from hub_runs import files_of, run_config
from tiny_models import tiny_config, write_model

from jaxdistill.config import SourceConfig
from jaxdistill.data import source_fingerprint
from jaxdistill.data.sources import hub_stream
from jaxdistill.errors import InputError
from jaxdistill.models import find_model, hub_origin, load_pretrained, pinned, weights_sha256
from jaxdistill.results import describe_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tiny_config(num_layers=1))
    return files_of(folder)


def refuses(name: str, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load_pretrained(name)
    for part in (f"{name}: ", *parts):
        assert part in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_only_what_is_wanted(hub, cache, model):
    others = {"pytorch_model.bin": b"\x80", "onnx/model.onnx": b"o", "onnx/model.safetensors": b"o", "tf_model.h5": b"t", "run.py": b"x"}
    commit = hub.add("acme/full", model | others | {"README.md": b"# hello", "mlm/config.json": b"{}"})
    folder = find_model("acme/full")
    assert files_of(folder).keys() == model.keys() | {"README.md", "mlm/config.json"}
    assert hub_origin(folder) == ("acme/full", commit) and folder.is_relative_to(cache)
    assert not any("pytorch_model" in path for _, path, _ in hub.requests)
    assert describe_model("acme/full")["revision"] == commit


def test_revisions(hub, cache, model, tmp_path):
    first = hub.add("acme/moving", model)
    write_model(tmp_path / "newer", tiny_config(num_layers=1), 1)
    assert pinned("acme/moving") == f"acme/moving@{first}"
    second = hub.add("acme/moving", files_of(tmp_path / "newer"))
    assert pinned("acme/moving") == pinned("acme/moving@main") == f"acme/moving@{second}"
    assert weights_sha256(find_model(f"acme/moving@{first}")) != weights_sha256(find_model("acme/moving"))
    assert weights_sha256(find_model("acme/moving")) == weights_sha256(tmp_path / "newer")
    hub.requests.clear()
    assert pinned(f"acme/moving@{first}") == f"acme/moving@{first}" and not hub.requests  # a commit that is here needs no network
    refuses("acme/moving@v9", "the Hub has the model but no revision 'v9' of it")
    assert pinned(str(tmp_path / "newer")) == str(tmp_path / "newer")


def test_what_the_hub_does_not_give(hub, cache, model, monkeypatch):
    hub.add("secret/model", model, private=True)
    hub.add("acme/gated", model, gated=True)
    hub.add("acme/pickle", {name: content for name, content in model.items() if name == "config.json"} | {"pytorch_model.bin": b"\x80"})
    refuses("acme/nothing", "neither a folder here nor a model that the Hub shows you (a private one needs `hf auth login`)")
    refuses("secret/model", "neither a folder here nor a model that the Hub shows you")
    refuses("acme/gated", "a gated model of the Hub; accept its terms there and log in with `hf auth login`")
    with pytest.raises(InputError, match=r"acme/pickle@[0-9a-f]{40}: no model\.safetensors .* only as pickle, convert once"):
        load_pretrained("acme/pickle")
    assert not any("pytorch_model" in path for _, path, _ in hub.requests)
    monkeypatch.setenv("HF_TOKEN", "hf_expiredexpiredexpired")
    refuses("secret/model", "the Hub does not accept the token; log in again with `hf auth login`, or correct HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    refuses("secret/model", "neither a folder here nor a model")


def test_datasets_that_the_hub_does_not_give(hub, monkeypatch):
    source = SourceConfig(dataset="acme/texts", revision="v9")
    found = "/api/datasets/acme/texts"
    for status, code, said in (
        (404, "RepoNotFound", "no dataset that the Hub shows you (a private one needs `hf auth login`)"),
        (403, "GatedRepo", "a gated dataset of the Hub; accept its terms there and log in with `hf auth login`"),
        (404, "RevisionNotFound", "the Hub has the dataset but no revision 'v9' of it"),
        (401, "", "the Hub does not accept the token; log in again with `hf auth login`, or correct HF_TOKEN (with a commit's 40 digits"),
        (503, "", f"the Hub at {hub.endpoint} (HF_ENDPOINT) answered 503; try again later (with a commit's 40 digits as revision, a store"),
    ):
        hub.breaks.clear()
        hub.break_next("GET", found, status, code=code)
        with pytest.raises(InputError) as caught:
            source_fingerprint(source)
        assert str(caught.value).startswith(f"acme/texts: {said}") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"a b: the Hub has no datasets of such names; a file or folder is given as path$"):
        source_fingerprint(SourceConfig(dataset="a b"))


def test_a_dataset_that_cannot_be_opened(hub, monkeypatch):
    """What its library passes on of the Hub's errors has several lines, and an address."""
    import datasets
    from huggingface_hub import HfApi

    monkeypatch.setattr(datasets, "load_dataset", lambda place, **_: HfApi(endpoint=hub.endpoint).dataset_info(place))
    hub.break_next("GET", "/api/datasets/", 503)
    with pytest.raises(InputError) as caught:
        hub_stream(SourceConfig(dataset="acme/texts", name="en"))
    said = f"the Hub at {hub.endpoint} (HF_ENDPOINT) answered 503; try again later"
    assert str(caught.value) == f"acme/texts/en: the dataset of the Hub cannot be opened: {said}"


def test_a_hub_that_fails(hub, cache, model, monkeypatch):
    hub.add("acme/failing", model)
    hub.break_next("GET", "/api/models/acme/failing", 503)
    refuses("acme/failing", f"the Hub at {hub.endpoint} (HF_ENDPOINT) answered 503; try again later")
    hub.breaks.clear()
    hub.break_next("GET", "model.safetensors", 500)
    refuses("acme/failing", "answered 500")
    hub.breaks.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refuses("acme/failing", "could not be reached", "check the network, or give the folder of a downloaded model")


def test_a_download_that_breaks_off(hub, cache, model):
    """Nothing half-fetched is ever read; once the Hub is whole again the same command gets it."""
    hub.add("acme/broken", model)
    hub.break_next("GET", "resolve/.*/model.safetensors", keep=1000)
    refuses("acme/broken", "no such folder here, and the Hub")
    assert not list(cache.rglob("snapshots/*/model.safetensors"))
    hub.breaks.clear()
    assert load_pretrained("acme/broken")[0] == tiny_config(num_layers=1)


def test_without_a_network_what_is_here_is_used(hub, cache, model, monkeypatch):
    commit = hub.add("acme/kept", model)
    folder = find_model("acme/kept")
    hub.break_next("GET", "", 503)
    hub.break_next("HEAD", "", 503)
    assert find_model("acme/kept") == folder and pinned("acme/kept") == f"acme/kept@{commit}"


SECRET = "swordfish99"


@pytest.mark.parametrize(
    ("override", "place"),
    [
        (f"teacher=https://me:{SECRET}@hub.example/acme/teacher", "teacher"),
        (f"data.sources=[https://me:{SECRET}@host/x.jsonl]", "data.sources.0"),
        (f"data.sources=[{{path: 's3://bucket/x.jsonl?token={SECRET}'}}]", "data.sources.0.path"),
        (f"data.store=https://host/store?X-Amz-Signature={SECRET}", "data.store"),
        (f"teacher_name=hf_{3 * SECRET}", "teacher_name"),
        (f"students={{'https://a:{SECRET}@b': {{num_layers: 1}}}}", "students"),
        (f"https://a:{SECRET}@b=1", "config"),
        (f"objective=https://a:{SECRET}@b", "objective"),
        (f"training.wandb=x?api_key={SECRET}", "training.wandb"),
    ],
)
def test_a_secret_in_a_config(override, place, cli, ground, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(ground, tmp_path / "run")))
    for command in ("distill", "inspect", "prepare"):
        code, out, err = cli(command, path, override)
        assert code == 2 and err.count("\n") == 1 and SECRET not in out + err, err
        assert f"{place}: holds a password or a token, which would be written into the run" in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["evaluate"], ["latency"], ["lost"], ["finetune", "output=x"], ["export"], ["compare"], ["distill"]])
def test_a_secret_in_the_name_of_a_model(command, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", f"token-{SECRET}")
    for name in (f"https://me:{SECRET}@host/model", f"owner/token-{SECRET}"):
        code, out, err = cli(*command, name)
        assert code == 2 and err.count("\n") == 1 and SECRET not in out + err, err
    assert not list(tmp_path.iterdir())
