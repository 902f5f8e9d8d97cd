"""Manifests that nobody wrote: only one clean line may come of them."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill.data import TokenStore, layout
from jaxdistill.errors import InputError

ROWS = {"train": 2, "held_out": 1}
GOOD = {
    "format": layout.FORMAT, "version": layout.VERSION, "fingerprint": "f", "tokenizer": {"fingerprint": "t"}, "dtype": "<u2",
    "sequence_length": 8, "held_out": 0.1, "sources": [{"source": "a.txt", "rows": ROWS}],
    "parts": [{"source": 0, "shard": 0, "part": 0, "rows": ROWS}],
}  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["../../x", "/etc/passwd", "\0"])
)
RUBBISH = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8
)


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed(path, value):
    manifest = copy.deepcopy(GOOD)
    if not path:
        return value
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store whose files have the right sizes."""
    folder = tmp_path_factory.mktemp("store")
    for split, rows in ROWS.items():
        for kind, size in (("tokens", 16), ("segments", 16), ("crc", 4)):
            (folder / layout.row_file(GOOD["parts"][0], split, kind)).write_bytes(b"\0" * rows * size)
    return folder


def opened(folder, data: bytes) -> TokenStore | None:
    (folder / "manifest.json").write_bytes(data)
    try:
        return TokenStore(folder)
    except InputError as error:
        assert "\n" not in str(error)
        return None


FREE = (("fingerprint",), ("tokenizer", "fingerprint"), ("held_out",), ("sources", 0, "source"))  # any value of the type will do


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(list(places(GOOD))), value=RUBBISH)
def test_one_wrong_value(folder, path, value):
    store = opened(folder, json.dumps(changed(path, value)).encode())
    if store is not None:
        assert path in FREE or changed(path, value) == GOOD or path[-1] == "sources"


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200) | RUBBISH.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(folder, data):
    assert opened(folder, data) is None


@pytest.mark.parametrize("path", [path for path in places(GOOD) if path])
def test_one_value_missing(folder, path):
    manifest = changed(path, None)
    node = manifest
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    assert opened(folder, json.dumps(manifest).encode()) is None


def test_what_must_agree(folder):
    assert opened(folder, json.dumps(GOOD).encode()).num_rows("train") == 2
    part = GOOD["parts"][0]
    others = {
        "twice": changed(("parts",), [part, part]),
        "of no source": changed(("parts", 0, "source"), 1),
        "other rows": changed(("parts", 0, "rows", "train"), 3),
        "other length": changed(("sequence_length",), 9),
        "other type": changed(("dtype",), "<u4"),
        "nowhere": changed(("parts", 0, "shard"), "../0"),
        "negative": changed(("parts", 0, "part"), -1),
        "without end": changed(("parts", 0, "rows", "train"), 10**30),
    }
    for name, manifest in others.items():
        assert opened(folder, json.dumps(manifest).encode()) is None, name
    assert opened(folder, b"[" * 200_000) is None
