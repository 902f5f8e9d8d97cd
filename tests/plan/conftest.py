"""A tiny teacher with its tokenizer; runs of it resolved for as many devices as a test says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, wordpiece, write_folder

from jaxdistill.config import load_config


@pytest.fixture(scope="session")
def plan_fields(tmp_path_factory) -> dict:
    """A config's fields; sides are powers of two so that every mesh of 8 divides them."""
    root = tmp_path_factory.mktemp("planned")
    backend = wordpiece()
    folder: Path = write_folder(root / "teacher", backend, BERT_SPECIAL)
    sizes = {"num_layers": 3, "hidden_size": 64, "intermediate_size": 256, "num_heads": 4, "max_position_embeddings": 128}
    write_model(folder, tiny_config(vocab_size=backend.get_vocab_size(), **sizes))
    return {
        "teacher": str(folder),
        "data": {"sources": [str(root / "no_text_is_read.txt")], "sequence_length": 64},
        "students": {"small": {"num_layers": 2}},
        "objective": [{"kind": "relation_kl", "relation_heads": 8}],
        "training": {"steps": 100, "batch_size": 64, "dropout": 0.0},
        "output": str(root / "run"),
    }


@pytest.fixture
def planned(plan_fields):
    """planned("key=value", ..., devices=8, platform="cpu") -> Run."""
    from jaxdistill.resolve import resolve

    def run(*overrides: str, devices: int = 8, platform: str = "cpu"):
        return resolve(load_config(plan_fields, list(overrides)), num_devices=devices, platform=platform)

    return run
