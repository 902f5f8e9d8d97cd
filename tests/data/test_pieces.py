"""Long documents are read as several, from whatever they are read, and text files in constant memory."""

import json
import random
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.config import DataConfig, SourceConfig
from jaxdistill.data import DocumentCounts, pieces, prepare, read_documents, read_labelled

LONGEST = 40


@pytest.fixture
def short(monkeypatch) -> None:
    monkeypatch.setattr(pieces, "LONGEST", LONGEST)


def random_text(draw: random.Random, length: int) -> str:
    """White space of all kinds, wide characters, and stretches without any of it."""
    return "".join(draw.choice(["a", "b" * 30, "\u00e9", "\U0001f600", " ", "\n", "\u2003"]) for _ in range(length))


def test_nothing_is_lost_but_the_white_space_of_the_cuts(short):
    draw = random.Random(0)
    for _ in range(300):
        text = random_text(draw, draw.randint(0, 60))
        found = pieces.pieces(text)
        assert all(0 < len(piece) <= LONGEST for piece in found) or not text
        assert "".join("".join(found).split()) == "".join(text.split())
        assert 0 <= len(text) - len("".join(found)) <= len(found)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x" * LONGEST, ["x" * LONGEST]),
        ("x" * (LONGEST + 1), ["x" * LONGEST, "x"]),
        ("x" * LONGEST + " ", ["x" * LONGEST]),
        ("x" * LONGEST + "\n" + "y" * LONGEST, ["x" * LONGEST, "y" * LONGEST]),
        ("one two\nthree " + "x" * 30, ["one two", "three " + "x" * 30]),
        ("one two three " + "x" * 30, ["one two three", "x" * 30]),
        ("\n" + "x" * (LONGEST + 5), ["\n" + "x" * (LONGEST - 1), "x" * 6]),
    ],
)
def test_a_cut_is_at_a_line_end_else_at_white_space_else_where_it_must(short, text, expected):
    assert pieces.pieces(text) == expected


def test_a_text_file_is_cut_while_it_is_read_as_it_would_be_whole(short):
    draw = random.Random(1)
    for _ in range(300):
        documents = [re.sub(r"\s*\n\s*", "\n", random_text(draw, draw.randint(1, 80)).strip()) for _ in range(4)]
        documents = [document for document in documents if document]
        data = "\n\n".join(documents).encode()
        read = [piece for text, _ in pieces.text_documents(data.splitlines(keepends=True)) for piece in pieces.pieces(text)]
        assert read == [piece for document in documents for piece in pieces.pieces(document)]


def test_bytes_that_are_no_text_count_where_they_are(tmp_path, short):
    (tmp_path / "a.txt").write_bytes(b"fine words\n" * 6 + b"bad \xff\n" + b"fine words\n" * 6)
    counts = DocumentCounts()
    documents = list(read_documents(SourceConfig(path=str(tmp_path / "a.txt")), counts))
    assert (len(documents), counts.documents, counts.invalid_utf8) == (4, 4, 1)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "dataset"])
def test_every_kind_of_source_is_cut_alike(tmp_path, short, monkeypatch, kind):
    texts = ["\n".join(f"line {i} of {j}" for i in range(20)) for j in range(3)] + ["short"]
    if kind == "txt":
        (tmp_path / "a.txt").write_text("\n\n".join(texts))
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    else:
        datasets = pytest.importorskip("datasets")
        stream = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    counts = DocumentCounts()
    source = SourceConfig(dataset="a/b") if kind == "dataset" else SourceConfig(path=str(tmp_path))
    found = list(read_documents(source, counts))
    assert found == [piece for text in texts for piece in pieces.pieces(text)]
    assert counts.documents == len(found) > 15 and max(map(len, found)) <= LONGEST


def test_labels_go_with_every_piece(tmp_path, short):
    lines = [{"text": "word " * 20, "language": "en"}, {"text": "neno", "language": "sw"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    labelled = list(read_labelled(source, "language"))
    assert [label for label, _ in labelled] == ["en"] * 3 + ["sw"]
    assert [text for _, text in labelled] == list(read_documents(source, DocumentCounts()))


def test_memory_does_not_grow_with_a_text_without_blank_lines(monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST", 10_000)
    lines = (b"a line of a long text, number %d\n" % i for i in range(60_000))  # 2.2 MB
    tracemalloc.start()
    try:
        assert sum(len(text) for text, _ in pieces.text_documents(lines)) > 2_000_000
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def test_a_book_without_blank_lines_makes_a_store_with_its_share_held_out(tmp_path, tokenizer, short):
    (tmp_path / "book.txt").write_text("\n".join(f"seven green letters {i}" for i in range(200)))
    data = DataConfig(sources=[str(tmp_path / "book.txt")], sequence_length=32, held_out=0.2)
    totals = prepare(data, tokenizer=tokenizer, store=tmp_path / "store").manifest["totals"]
    assert totals["documents"]["held_out"] > 5 and sum(totals["documents"].values()) == 200
