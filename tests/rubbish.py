"""Rubbish for what reads files that anybody may have written (hypothesis)."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64, 10**12, 10**30, -(10**30), 10**400]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")]),
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\0", "..", "../..", "/", "~", "~nobody/x", "x" * 300, "a/" * 200, "%s", "{}", "${HOME}", "null", "auto", "1L", "6L",
         "-1", "\ud800", "a@b", "name@", "owner/name@../..", "s3://b/k", "[", "*", "**", "first_k", "relation_kl", "sst2", "\u2028", "a\nb"]
    ),
)  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
RUBBISH = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)), max_leaves=6
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a nested one."""
    found = [path]
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def changed(value: Any, path: tuple, new: Any, how: str) -> Any:
    """A copy with the value at a path replaced, removed, or with a neighbour of any name."""
    value = copy.deepcopy(value)
    if not path:
        return new
    node = value
    for key in path[:-1]:
        node = node[key]
    if how == "remove":
        del node[path[-1]]
    elif how == "beside" and isinstance(node, dict):
        node[str(new)[:20]] = new
    else:
        node[path[-1]] = new
    return value


WHOLE = st.one_of(st.integers(0, 40), st.sampled_from([64, 128, 200, 1000, 2**20, 2**24, 2**31 - 1]))


def _alike(value: Any, path: tuple) -> st.SearchStrategy:
    """Another value of the kind that stands at a path, which gets further than rubbish does."""
    for key in path:
        value = value[key]
    kinds = {bool: st.booleans(), int: WHOLE, float: st.floats(0, 3), str: WORDS}
    return kinds.get(type(value), RUBBISH)


@st.composite
def mutated(draw, value: Any, *, most: int = 3) -> Any:
    """The value with one to `most` of its parts changed."""
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(value)))
        new = draw(st.one_of(_alike(value, path), RUBBISH))
        value = changed(value, path, new, draw(st.sampled_from(["replace", "replace", "remove", "beside"])))
        if not isinstance(value, (dict, list)):
            break
    return value


@st.composite
def bytes_changed(draw, content: bytes) -> bytes:
    """The bytes with some replaced, taken away or put in between; near the beginning more often."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.one_of(st.integers(0, min(len(content), 120)), st.integers(0, len(content))))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"{", b'"', b"9" * 20, b"-1"])))
        kind = draw(st.sampled_from(["over", "in", "out", "end"]))
        if kind == "over":
            content[where : where + len(piece)] = piece
        elif kind == "in":
            content[where:where] = piece
        elif kind == "out":
            del content[where : where + len(piece)]
        else:
            del content[where:]
    return bytes(content)
