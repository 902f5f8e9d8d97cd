"""Which models the arguments of a command mean."""

import pytest
from tiny_models import tiny_config, write_model

from jaxdistill.errors import InputError
from jaxdistill.results import find_models


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run of two students, and a model beside it whose folder has an equals sign in its name."""
    root = tmp_path_factory.mktemp("models")
    (root / "run" / "export").mkdir(parents=True)
    (root / "run" / "config.yaml").write_text("teacher: x\n")
    for folder in ("run/export/b", "run/export/a", "rate=1", "other/a"):
        write_model(root / folder, tiny_config(num_layers=1))
    (root / "run" / "export" / ".half").mkdir()
    (root / "empty").mkdir()
    (root / "empty" / "config.yaml").write_text("teacher: x\n")
    return root


def test_folders_names_and_runs(places, monkeypatch):
    run, export = str(places / "run"), places / "run" / "export"
    assert find_models([run]) == {"a": str(export / "a"), "b": str(export / "b")}
    assert list(find_models([run])) == ["a", "b"]
    assert find_models([str(places / "rate=1")]) == {"rate=1": str(places / "rate=1")}
    assert find_models([f"mine={export / 'a'}", str(export / "b") + "/"]) == {"mine": str(export / "a"), "b": str(export / "b") + "/"}
    monkeypatch.chdir(export / "a")
    assert find_models(["."]) == {"a": "."}


def test_one_name_for_two_models(places):
    with pytest.raises(InputError, match=r"a model 'a' already \(.*run/export/a\); name one by NAME=.*other/a"):
        find_models([str(places / "run"), str(places / "other" / "a")])
    assert set(find_models([str(places / "run"), f"c={places / 'other' / 'a'}"])) == {"a", "b", "c"}


def test_what_is_no_model(places):
    with pytest.raises(InputError, match="no such model folder"):
        find_models([f"x={places / 'nothing'}"])
    with pytest.raises(InputError, match="a run without exported students; jaxdistill export"):
        find_models([str(places / "empty")])
    with pytest.raises(InputError, match="a run of 2 students; name one of them"):
        find_models([f"x={places / 'run'}"])
