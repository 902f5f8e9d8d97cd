"""Which paragraphs are compared on."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder

from jaxdistill.config import SourceConfig
from jaxdistill.data import is_held_out, load_tokenizer
from jaxdistill.errors import InputError
from jaxdistill.lost.text import ALL, paragraphs, sample, text_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_folder(tmp_path_factory.mktemp("text") / "tokenizer", wordpiece(), BERT_SPECIAL))


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceConfig(path=str(path))


def test_paragraphs_are_lines(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": "a heading\n  a line that is long enough \n\nand another line as long"}, {"text": " "}])
    found = list(paragraphs(source, held_out=None, language_column=None))
    assert found == [(ALL, "a line that is long enough"), (ALL, "and another line as long")]


def test_held_out_documents_alone(tmp_path):
    texts = [text for text in make_texts(200) if len(text) >= 20]
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = [text for _, text in paragraphs(source, held_out=0.2, language_column=None)]
    assert found == [text for text in texts if is_held_out(text.encode(), 0.2)]
    assert 20 < len(found) < 60


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_languages_stay_with_their_texts(tmp_path, kind):
    records = [
        {"text": "the first text, long enough", "lang": "en"}, {"text": None, "lang": "fr"}, {"text": "", "lang": "de"},
        {"text": "le deuxième, assez long aussi", "lang": "fr"}, {"text": "nobody knows this one's language", "lang": None},
    ]  # fmt: skip
    source = jsonl(tmp_path / "a.jsonl", records)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
        source = SourceConfig(path=str(tmp_path / "a.parquet"))
    found = list(paragraphs(source, held_out=None, language_column="lang"))
    assert found == [("en", records[0]["text"]), ("fr", records[3]["text"]), ("-", records[4]["text"])]


def test_a_sample_does_not_depend_on_the_order():
    found = [(language, f"{language} {i}") for language in "ab" for i in range(40)] + [("c", "c 0"), ("a", "a 1"), ("a", "a 1")]
    first = sample(found, 21)
    assert sorted(first) == sorted(sample(found[::-1], 21))
    assert [sum(own == language for own, _ in first) for language in "abc"] == [10, 10, 1]
    assert len(set(first)) == 21
    assert {text for own, text in first if own == "a"} != {f"a {i}" for i in range(10)}  # not just the beginning
    assert len(sample([("", "x"), ("", "x"), ("", "y")], 5)) == 2


def test_rows(tmp_path, tokenizer):
    texts = [text for text in make_texts(30) if len(text) >= 20]
    source = jsonl(tmp_path / "a.jsonl", [{"text": text, "lang": "xy"[i % 2]} for i, text in enumerate(texts)])
    rows = text_rows([source], tokenizer, language_column="lang", limit=12, length=24)
    assert rows.languages == ("x",) * 6 + ("y",) * 6
    assert rows.input_ids.shape == (12, 24)
    assert rows.lengths[:6].tolist() == sorted(rows.lengths[:6])
    assert rows.lengths.max() == 24  # cut
    for ids, mask, length in zip(rows.input_ids, rows.attention_mask, rows.lengths, strict=True):
        assert (ids[0], ids[length - 1]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert (mask == (np.arange(24) < length)).all() and (ids[length:] == tokenizer.pad_id).all()
    whole = {tuple(ids[1 : length - 1]) for ids, length in zip(rows.input_ids, rows.lengths, strict=True) if length < 24}
    assert whole and whole <= {tuple(tokenizer.encode([text])[0].tolist()) for text in texts}


def test_what_cannot_be_read(tmp_path, tokenizer):
    records = [{"text": f"a text that is long enough {i}", "lang": f"l{i % 5}"} for i in range(20)]
    source = jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError, match="--rows: 4 rows are fewer than the 5 languages"):
        text_rows([source], tokenizer, language_column="lang", limit=4)
    with pytest.raises(InputError, match=r"a\.jsonl:1: no field 'language'; its fields are text, lang"):
        text_rows([source], tokenizer, language_column="language")
    (tmp_path / "b.txt").write_text("a text that is long enough\n")
    plain = SourceConfig(path=str(tmp_path / "b.txt"))
    with pytest.raises(InputError, match=r"b\.txt: a text file has no column 'lang'"):
        text_rows([plain], tokenizer, language_column="lang")
    with pytest.raises(InputError, match=r"b\.txt: 1 paragraphs of at least 20 characters; at least 3"):
        text_rows([plain], tokenizer)
    with pytest.raises(InputError, match=r"0 paragraphs .* in the held-out part \(0\.0001 of the documents\)"):
        text_rows([source], tokenizer, held_out=0.0001)
