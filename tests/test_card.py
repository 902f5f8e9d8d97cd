"""What a card says of the text and of the teacher's weights, without a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, wordpiece, write_folder

from jaxdistill.card.cells import linked
from jaxdistill.card.teacher import weights_row
from jaxdistill.card.text import codes_of, datasets_of, text_rows, tokens_by_language
from jaxdistill.config import DataConfig, load_config
from jaxdistill.models import sha256_of_weights, weight_files, weights_sha256
from jaxdistill.resolve import Run, resolve


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Callable[..., Run]:
    """A resolved run of this text, of which nothing was done."""
    folder = tmp_path_factory.mktemp("card")
    backend = wordpiece()
    teacher = write_folder(folder / "teacher", backend, BERT_SPECIAL)
    write_model(teacher, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=1, max_position_embeddings=64))
    config = {"teacher": str(teacher), "students": {"small": {"num_layers": 1}}, "objective": "hidden_mse", "output": str(folder / "run")}
    run = resolve(load_config(config | {"data": {"sources": ["x"], "sequence_length": 16}}), num_devices=1)
    return lambda **data: replace(run, config=run.config.model_copy(update={"data": DataConfig.model_validate(data)}))


def manifest_of(*sources: tuple[str, str | None, int, int], deduplicate: bool = False) -> dict:
    """Of sources by name, language, documents and tokens; a tenth is held out."""

    def counts(documents: int, tokens: int) -> dict:
        both = {"documents": documents, "tokens": tokens}
        return {what: {"train": count - count // 10, "held_out": count // 10} for what, count in both.items()}

    entries = [{"source": name, "language": language} | counts(*size) for name, language, *size in sources]
    totals = counts(sum(source[2] for source in sources), sum(source[3] for source in sources))
    return {"sources": entries, "totals": totals, "deduplicate": deduplicate}


LANGUAGES = [{"path": "/corpora/en/*.*", "language": "en"}, {"path": "/corpora/de", "language": "de"}]


def test_text_in_several_languages(run_of):
    run = run_of(sources=LANGUAGES, sampling_exponent=0.3, held_out=0.05, deduplicate=True)
    manifest = manifest_of(("/corpora/en/*.*", "en", 1000, 90_000), ("/corpora/de", "de", 500, 40_000), deduplicate=True)
    assert text_rows(run, manifest) == [
        ("text", "`*.*` (en), 1,000 documents of 90,000 tokens; `de` (de), 500 documents of 40,000 tokens"),
        (
            "text, in all",
            "1,500 documents of 130,000 tokens; duplicates left out; 5 % of the documents held out, not trained on; "
            "a language is drawn by its share of the rows to the power 0.3",
        ),
    ]
    assert codes_of(run, manifest) == ["en", "de"]
    assert tokens_by_language(run, {"tokens": 30, "tokens/en": 10_000, "tokens/de": 20}) == " (en 10,000, de 20)"
    assert tokens_by_language(run_of(sources=["a", "b"]), {"tokens/source_0": 1, "tokens/source_1": 2}) == " (text 0 1, text 1 2)"


def test_languages_that_are_no_codes_stay_out_of_the_metadata(run_of):
    run = run_of(sources=[{"path": "a", "language": "English"}, {"path": "b", "language": "sw"}])
    assert codes_of(run, None) == ["sw"] and "`a` (English); `b` (sw)" in text_rows(run, None)[0][1]
    assert codes_of(run_of(sources=["a"]), None) is None  # the teacher's stand there then


def test_a_text_whose_store_is_not_at_hand(run_of):
    assert text_rows(run_of(sources=["/a/b.txt"], held_out=0), None) == [("text", "`b.txt`"), ("text, in all", "nothing held out")]
    rows = text_rows(run_of(sources=["/a/b.txt"], streaming=True), None)
    assert rows[1][1] == "1 % of the documents held out, not trained on; read as a stream"
    for broken in ({}, {"sources": 1}, {"sources": [1]}, {"sources": [{"documents": 1, "tokens": {"train": "x"}}], "totals": []}):
        assert text_rows(run_of(sources=["/a/b.txt"]), broken)[0] == ("text", "`b.txt`")


def test_datasets_of_the_hub_are_named_as_such(run_of):
    sources = [
        {"dataset": "acme/texts", "name": "en", "revision": "v1", "weight": 2},
        {"path": "hf://datasets/acme/more@abc/data/*.parquet", "weight": 1},
    ]
    run = run_of(sources=sources)
    assert text_rows(run, None)[0][1] == (
        "[acme/texts](https://huggingface.co/datasets/acme/texts), en, train, revision `v1`, weight 2; "
        "[acme/more](https://huggingface.co/datasets/acme/more), `data/*.parquet`, revision `abc`, weight 1"
    )
    assert datasets_of(run, None) == ["acme/texts", "acme/more"]


def test_a_store_at_a_url_says_what_it_was_made_from(run_of):
    """It is used as it lies: what the config calls its sources is nothing that was read."""
    run = run_of(sources=["/here/mine.txt", "/here/other.txt"], store="gs://bucket/store")
    manifest = manifest_of(("/home/somebody/books.jsonl", "en", 10, 100), ("acme/texts/2024.en", None, 20, 200))
    assert text_rows(run, manifest)[0][1] == (
        "`books.jsonl` (en), 10 documents of 100 tokens; "
        "[acme/texts](https://huggingface.co/datasets/acme/texts), 2024.en, 20 documents of 200 tokens"
    )
    assert datasets_of(run, manifest) == ["acme/texts"] and codes_of(run, manifest) == ["en"]
    assert "as the config names it: its token store was there already" in text_rows(run, None)[0][1]


def test_no_link_leads_to_a_hub_that_is_not_meant(monkeypatch):
    assert linked("a/b", "a/b") == "[a/b](https://huggingface.co/a/b)"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    assert linked("a/b", "a/b") == "`a/b`"


@pytest.mark.parametrize("names", [("model.safetensors",), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")])
def test_each_file_of_the_teacher_by_its_own_hash(names, run_of, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    own = {name: sha256(name.encode()).hexdigest() for name in names}
    files, run = weight_files(tmp_path), run_of(sources=["a"])
    assert files == own and sha256_of_weights(files) == weights_sha256(tmp_path)
    title, shown = weights_row(run, files, weights_sha256(tmp_path))
    assert all(f"`{digest}`" in shown for digest in own.values()) and all(name in title + shown for name in names)
    title, shown = weights_row(run, files, "0" * 64, last=True)
    assert title == "sha256 of the sha256 of each file of the last teacher's weights"
    assert shown == f"`{'0' * 64}`; the files here have changed since"


def test_the_identity_of_weights_is_what_it_was(tmp_path):
    """It stands in checkpoints and results."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert weights_sha256(tmp_path) == sha256(sha256(b"x").digest()).hexdigest()
