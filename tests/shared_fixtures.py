"""Fixtures of several rooms: the tiny tokenizers, loaded once; the command line in this process; no network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_texts import BERT_SPECIAL, ROBERTA_SPECIAL, byte_level_bpe, unigram, wordpiece, write_folder

from jaxdistill.cli import main
from jaxdistill.data import TextTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "wordpiece": write_folder(root / "wordpiece", wordpiece(), BERT_SPECIAL),
        "bpe": write_folder(root / "bpe", byte_level_bpe(), ROBERTA_SPECIAL),
        "unigram": write_folder(root / "unigram", unigram(), ROBERTA_SPECIAL),
    }


@pytest.fixture(scope="session")
def tokenizers_by_kind(tokenizer_folders) -> dict[str, TextTokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in tokenizer_folders.items()}


@pytest.fixture(params=["wordpiece", "bpe", "unigram"])
def any_tokenizer(request, tokenizers_by_kind) -> TextTokenizer:
    return tokenizers_by_kind[request.param]


@pytest.fixture
def tokenizer(tokenizers_by_kind) -> TextTokenizer:
    return tokenizers_by_kind["wordpiece"]


@pytest.fixture
def no_network(monkeypatch):
    """The Hub's clients refuse at once instead of trying for half a minute."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxdistill", *map(str, arguments)])
        monkeypatch.setattr("jaxdistill.faults.ending._leave", sys.exit)  # the process is the test's
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run
