"""A tiny teacher and text for runs of several processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder


@dataclass(frozen=True)
class SmallGround:
    teacher: Path
    text: Path

    def config(self, output: Path, **fields: Any) -> dict[str, Any]:
        """4 steps of 8 rows, dropout on, a checkpoint after each."""
        return {
            "teacher": str(self.teacher),
            "data": {"sources": [str(self.text)], "sequence_length": 16, "held_out": 0.1, "store": str(self.text.parent / "store")},
            "students": {"small": {"num_layers": 1}},
            "objective": [{"kind": "relation_kl", "relation_heads": 6}],
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "steps": 4, "batch_size": 8, "log_every": 1, "evaluate_every": 4, "evaluate_rows": 12, "checkpoint_every": 1,
                "keep_checkpoints": 9, "tensorboard": False,
            },
            "output": str(output),
        } | fields  # fmt: skip


@pytest.fixture(scope="session")
def small_ground(tmp_path_factory) -> SmallGround:
    root = tmp_path_factory.mktemp("ground")
    backend = wordpiece()
    teacher = write_folder(root / "teacher", backend, BERT_SPECIAL)
    write_model(teacher, tiny_config(vocab_size=backend.get_vocab_size(), num_layers=2, max_position_embeddings=64), pooler=True)
    text = root / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in make_texts(120)), encoding="utf-8")
    return SmallGround(teacher, text)
