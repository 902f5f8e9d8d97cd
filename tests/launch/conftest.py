"""A tiny teacher and text, for what is really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder


@pytest.fixture(scope="session")
def teacher_and_text(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("launched")
    backend = wordpiece()
    teacher = write_folder(root / "teacher", backend, BERT_SPECIAL)
    write_model(teacher, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=4, max_position_embeddings=64), pooler=True)
    text = root / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in make_texts(120)), encoding="utf-8")
    return teacher, text
