"""A tiny teacher with its tokenizer and a text, shared by the tests of whole runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder


@dataclass(frozen=True)
class Ground:
    """What a run needs, in a folder; every test makes its own output."""

    teacher: Path
    text: Path

    def config(self, output: Path, **changes: Any) -> dict[str, Any]:
        """A run of 8 steps of 8 rows, dropout on. `changes`: key with __ for the dots, training__steps=4."""
        config: dict[str, Any] = {
            "teacher": str(self.teacher),
            "data": {"sources": [str(self.text)], "sequence_length": 16, "held_out": 0.1, "store": str(self.text.parent / "store")},
            "students": {"small": {"num_layers": 2}},
            "objective": [{"kind": "relation_kl", "relation_heads": 6}],
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "steps": 8, "batch_size": 8, "log_every": 1, "evaluate_every": 4, "evaluate_rows": 12, "checkpoint_every": 2,
                "tensorboard": False,
            },
            "output": str(output),
        }  # fmt: skip
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            node = config
            for key in parents:
                node = node.setdefault(key, {})
            node[leaf] = value
        return config


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Ground:
    root = tmp_path_factory.mktemp("ground")
    backend = wordpiece()
    teacher = write_folder(root / "teacher", backend, BERT_SPECIAL)
    config = tiny_config(vocab_size=backend.get_vocab_size(), num_layers=4, max_position_embeddings=64)
    write_model(teacher, config, pooler=True)
    text = root / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in make_texts(120)), encoding="utf-8")
    return Ground(teacher, text)


@pytest.fixture(scope="session")
def ground_with_head(ground) -> Ground:
    """The same text for a teacher with an MLM head."""
    backend = wordpiece()
    teacher = write_folder(ground.teacher.with_name("teacher_with_head"), backend, BERT_SPECIAL)
    write_model(teacher, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=4, max_position_embeddings=64), mlm=True)
    return Ground(teacher, ground.text)
