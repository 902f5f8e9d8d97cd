import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.config import SourceConfig
from jaxdistill.data import DocumentCounts, read_documents, source_fingerprint
from jaxdistill.data.sources import _rows_at_once
from jaxdistill.errors import InputError


def read(path, **fields) -> tuple[list[str], DocumentCounts]:
    counts = DocumentCounts()
    return list(read_documents(SourceConfig(path=str(path), **fields), counts)), counts


def write_parquet(path, texts, column="text", kind=None, **options):
    pq.write_table(pa.table({column: pa.array(texts, kind or pa.string()), "id": pa.array(range(len(texts)))}), path, **options)
    return path


def fails(path, message, **fields):
    with pytest.raises(InputError, match=message) as caught:
        read(path, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet(tmp_path, kind):
    texts = [f"text {i}" for i in range(3000)]
    path = write_parquet(tmp_path / "a.parquet", [None, "", " \n", *texts], kind=kind, row_group_size=700)
    documents, counts = read(path)
    assert documents == texts
    assert (counts.documents, counts.skipped, counts.invalid_utf8, counts.bytes_read) == (3000, 3, 0, path.stat().st_size)


def test_parquet_errors(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"])
    fails(path, r"a\.parquet: no column 'body'; its columns are text, id", column="body")
    fails(path, r"a\.parquet: column 'id' holds int64, not text", column="id")
    path.write_bytes(path.read_bytes()[:-5])
    fails(path, r"a\.parquet: cannot be read as parquet")


def test_parquet_invalid_utf8_is_replaced_and_counted(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"bad \xff byte"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    documents, counts = read(tmp_path / "a.parquet")
    assert documents == ["good", "bad \ufffd byte"]
    assert counts.invalid_utf8 == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    lines = ['\ufeff{"text": "one\\ntwo", "n": 1}', "", '{"text": null}', '{"text": "  "}', '{"text": "d\u00e9j\u00e0 \ufffd \u2028 x"}']
    data = "\r\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents, counts = read(tmp_path / name)
    assert documents == ["one\ntwo", "d\u00e9j\u00e0 \ufffd \u2028 x"]
    assert (counts.skipped, counts.invalid_utf8, counts.bytes_read) == (2, 0, (tmp_path / name).stat().st_size)


def test_jsonl_invalid_utf8_and_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "bad \xff"}\n{"text": "lone \\ud800 half"}\n{"text": "pair \\ud83d\\ude00"}\n')
    documents, counts = read(tmp_path / "a.jsonl")
    assert documents == ["bad \ufffd", "lone \ufffd half", "pair \U0001f600"]
    assert counts.invalid_utf8 == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a\.jsonl:2: not JSON"),
        ('["x"]', r"a\.jsonl:2: a list, not an object; one object per line is needed"),
        ('{"body": "x", "id": 1}', r"a\.jsonl:2: no field 'text'; its fields are body, id"),
        ('{"text": 3}', r"a\.jsonl:2: 'text' holds int, not text"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    fails(tmp_path / "a.jsonl", message)


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.txt.gz"])
def test_text_documents_lie_between_blank_lines(tmp_path, name):
    data = b"\xef\xbb\xbf\n\none\r\ntwo\r\n \t\r\n\nthree \xff\n\n\xc2\xa0\n\nfour\x0cpage"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    documents, counts = read(tmp_path / name)
    assert documents == ["one\ntwo", "three \ufffd", "four\x0cpage"]
    assert (counts.documents, counts.skipped, counts.invalid_utf8) == (3, 1, 1)


def test_a_value_that_is_too_long_is_refused(tmp_path, monkeypatch, hub):
    monkeypatch.setattr("jaxdistill.data.sources.LARGEST_DOCUMENT", 1 << 20)
    long = "\u00fc" * (1 << 19)  # two bytes each: just not too long
    write_parquet(tmp_path / "a.parquet", ["x"] * 2000 + [long, long + "x"])
    fails(tmp_path / "a.parquet", r"a\.parquet, row 2001: a document of more than 1 MiB")
    hub({"text": ["x", long + "x"]})
    with pytest.raises(InputError, match="someone/texts/en, train, row 1: a document of more than 1 MiB"):
        list(read_documents(HUB, DocumentCounts()))


def test_few_rows_of_parquet_are_read_at_once_where_they_are_long(tmp_path):
    texts = ["x"] * 3000 + [f"{i} " * 20_000 for i in range(100, 400)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=3000, use_dictionary=False)
    assert _rows_at_once(pq.ParquetFile(path).metadata, "text") == (8 << 20) // 80_004
    assert read(path)[0] == texts
    assert _rows_at_once(pq.ParquetFile(write_parquet(tmp_path / "b.parquet", texts[:5])).metadata, "text") == 1024


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(np.random.default_rng(0).bytes(100_000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    fails(tmp_path / "a.txt.gz", r"a\.txt\.gz: cannot be read to its end")
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip at all")
    fails(tmp_path / "a.txt.gz", r"a\.txt\.gz: cannot be read to its end: Not a gzipped file")


def test_folder_reads_known_files_below_it_in_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", "z.md", ".cache/x.txt", "b/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    write_parquet(tmp_path / "c.parquet", ["c.parquet"])
    assert read(tmp_path)[0] == ["a.jsonl", "b/10.txt", "b/2.txt", "c.parquet"]
    assert read(tmp_path, format="text")[0] == ["b/10.txt", "b/2.txt"]
    assert read(tmp_path / "b" / "*.txt")[0] == ["b/10.txt", "b/2.txt"]
    assert read(tmp_path / "**" / "[1-9]*.txt")[0] == ["b/10.txt", "b/2.txt"]
    assert read(tmp_path / "z.md", format="text")[0] == ["z.md"]


def test_a_file_with_brackets_in_its_name_is_no_glob(tmp_path):
    (tmp_path / "part[1].txt").write_text("x")
    assert read(tmp_path / "part[1].txt")[0] == ["x"]


def test_places_that_hold_nothing(tmp_path):
    fails(tmp_path / "none.txt", r"none\.txt: no such file or folder")
    fails(tmp_path / "*.txt", r"\*\.txt: no file matches this glob")
    (tmp_path / "read.me").write_text("x")
    fails(tmp_path, "no text files in this folder; known are .parquet, .jsonl")
    fails(tmp_path / "read.me", r"read\.me: unknown kind of file; say format")


def test_fingerprint_changes_with_content_and_not_with_place(tmp_path):
    for folder, text in (("one", "x"), ("two", "x"), ("three", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    one, two, three = (source_fingerprint(SourceConfig(path=str(tmp_path / folder))) for folder in ("one", "two", "three"))
    assert one == two != three
    assert one["files"][0]["name"] == "a.txt" and one["files"][0]["size"] == 1
    assert one == source_fingerprint(SourceConfig(path=str(tmp_path / "one" / "a.txt")))


HUB = SourceConfig(dataset="someone/texts", name="en", revision="0123456789" * 4)


@pytest.fixture
def hub(monkeypatch):
    """A dataset of the Hub out of `rows`; the arguments that it was asked with."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def serve(rows, *, with_columns=True):
        stream = datasets.Dataset.from_dict(rows).to_iterable_dataset()
        if not with_columns:
            examples = list(stream)
            stream = datasets.IterableDataset.from_generator(lambda: iter(examples))

        def load_dataset(*args, **options):
            asked.append((args, options))
            return stream

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    serve.asked = asked
    return serve


@pytest.mark.parametrize("with_columns", [True, False])
def test_hub(hub, with_columns):
    hub({"text": ["one", None, " ", "two"], "n": [1, 2, 3, 4]}, with_columns=with_columns)
    counts = DocumentCounts()
    assert list(read_documents(HUB, counts)) == ["one", "two"]
    assert (counts.documents, counts.skipped) == (2, 2)
    assert hub.asked == [(("someone/texts",), {"name": "en", "split": "train", "revision": "0123456789" * 4, "streaming": True})]
    with pytest.raises(InputError, match="someone/texts/en, train, row 0: no field 'body'; its fields are text, n"):
        list(read_documents(HUB.model_copy(update={"column": "body"}), counts))
    with pytest.raises(InputError, match="'n' holds int, not text"):
        list(read_documents(HUB.model_copy(update={"column": "n"}), counts))


def test_hub_out_of_reach(monkeypatch, no_network):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="someone/texts/en: the dataset of the Hub cannot be opened: ") as caught:
        list(read_documents(HUB, DocumentCounts()))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"someone/texts: the Hub could not be reached.* already prepared needs no network"):
        source_fingerprint(HUB.model_copy(update={"revision": "main"}))


def test_hub_fingerprint_is_the_commit(monkeypatch):
    import huggingface_hub

    class Info:
        sha = "ab" * 20

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, dataset, revision: Info())
    found = source_fingerprint(HUB.model_copy(update={"revision": None}))
    assert found == {"dataset": "someone/texts", "name": "en", "split": "train", "revision": "ab" * 20}
    assert source_fingerprint(HUB)["revision"] == HUB.revision  # a commit is not asked for
