"""A Hub of one's own, the client pointed at it, and a run that was distilled from a teacher that lies there."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import FakeHub
from hub_runs import TEACHER_CARD, TOKEN, Ground, files_of, run_config
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder


def point_client_at(patch: pytest.MonkeyPatch, hub: FakeHub, cache: Path) -> None:
    """The Hub's client reads its environment when it is imported: in this process its constants are set instead."""
    from huggingface_hub import constants

    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}.items():
        patch.setenv(name, value)
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture(scope="module")
def served():
    with FakeHub().serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def ways(served, tmp_path_factory):
    """The client of the whole module goes to the Hub of its own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        point_client_at(patch, served, cache)
        disable_progress_bars()
        yield cache
        enable_progress_bars()


@pytest.fixture
def hub(served, ways, monkeypatch):
    """The Hub, whole again; the client waits for nothing between two attempts."""
    served.breaks.clear()
    served.requests.clear()
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield served
    served.breaks.clear()


@pytest.fixture
def cache(ways, hub, monkeypatch, tmp_path) -> Path:
    """A cache of the test's own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def ground(served, tmp_path_factory) -> Ground:
    root = tmp_path_factory.mktemp("ground")
    backend = wordpiece()
    teacher = write_folder(root / "teacher", backend, BERT_SPECIAL)
    write_model(teacher, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=3, max_position_embeddings=64), mlm=True)
    (teacher / "README.md").write_bytes(TEACHER_CARD)
    text = root / "a private place" / "letters.txt"
    text.parent.mkdir()
    text.write_text("\n\n".join(make_texts(80)), encoding="utf-8")
    return Ground(teacher, text, served.add("acme/teacher", files_of(teacher) | {"pytorch_model.bin": b"\x80pickle"}))


@pytest.fixture(scope="module")
def distilled(ways, ground, compiled_once, tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    from jaxdistill.distill import distill

    output = tmp_path_factory.mktemp("runs") / "first"
    distill(run_config(ground, output))
    return output
