"""What the tests of the Hub share beside fixtures: a token, a small config, the environment of a process of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fake_hub import FakeHub

TOKEN = "hf_ownerownerowner"
TEACHER_CARD = b"---\nlicense: cc-by-sa-4.0\nlanguage: [en, de]\ntags: [bert]\nbase_model: someone/else\n---\n# A teacher\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Ground:
    """A teacher on the Hub, `acme/teacher`, and a text here."""

    teacher: Path  # its files
    text: Path
    commit: str


def run_config(ground: Ground, output: Path, **changes) -> dict:
    return {
        "teacher": "acme/teacher",
        "data": {"sources": [str(ground.text)], "sequence_length": 16, "held_out": 0.1},
        "students": {"small": {"num_layers": 1, "initialise": "first_k"}},
        "objective": [{"kind": "output_kl"}, {"kind": "hidden_mse", "layer_map": "last"}],
        "training": {
            "steps": 2, "batch_size": 8, "log_every": 1, "evaluate_every": 2, "evaluate_rows": 8, "checkpoint_every": 1,
        },
        "mesh": {"data": -1},
        "output": str(output),
    } | changes  # fmt: skip


def environment(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    """Of a process of its own that knows the Hub by HF_ENDPOINT alone."""
    without = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    own = {name: value for name, value in os.environ.items() if name not in without}
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    return own | settings | more
