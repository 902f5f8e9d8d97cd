"""The teacher's tokenizer, from a folder or the Hub, as the token store and the export need it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxdistill.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
# Embedding tables are padded to a multiple of at most this many rows; a larger gap means another tokenizer.
LARGEST_VOCABULARY_PADDING = 128
# A Unicode noncharacter: no text holds it, so that no text spells a token whose name begins with it.
UNSPELLABLE = "\U0010ffff"
# Of tokenizer_config.json: code that a reader who trusts the export would run, and how this process happened to load the tokenizer.
_NOT_PASSED_ON = ("auto_map", "is_local", "local_files_only")


@dataclass(frozen=True)
class TextTokenizer:
    """`backend` turns text into the ids of ordinary tokens only: it adds no special token and reads none in the text."""

    backend: Tokenizer
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int | None
    vocab_size: int  # with the added tokens
    fingerprint: str  # sha256 of the tokenizer's serialised form

    @property
    def dtype(self) -> np.dtype:
        """The narrowest type of the store that holds every id; little-endian on every machine."""
        return np.dtype("<u2") if self.vocab_size <= 2**16 else np.dtype("<u4")

    def encode(self, documents: list[str]) -> list[np.ndarray]:
        """The ids of each document, whole and without special tokens, in `dtype`; documents run in parallel."""
        encodings = self.backend.encode_batch_fast(documents, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]


def _load(path_or_hub_id: str | Path) -> Any:
    """The Hugging Face tokenizer; raises InputError when there is none that this toolkit can use."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no PyTorch: none is needed
    from transformers import AutoTokenizer

    folder = Path(path_or_hub_id)
    # Without these files transformers makes a tokenizer of five special tokens from config.json alone.
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: no tokenizer files there; it should hold {TOKENIZER_FILES[0]} (or {', '.join(TOKENIZER_FILES[1:])})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_hub_id), trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the Hub's client raise unrelated types, among them plain Exception
        if folder.is_dir():
            raise InputError(f"{folder}: the tokenizer there cannot be loaded: {_first_line(error)}") from error
        raise InputError(
            f"{path_or_hub_id}: no such folder, and no tokenizer of the Hub under this name can be reached: {_first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{path_or_hub_id}: only a slow tokenizer; save it once with a fast one (tokenizer.json)")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_special_tokens(serialised: str) -> Tokenizer:
    """The same tokenizer with the same ids, in which no text spells a special token.

    `Tokenizer.encode_special_tokens` is not enough: the vocabulary of a Unigram model (XLM-R) holds "</s>" as a piece, and the
    model itself would choose it for the text "</s>". So every special token gets a name that no text holds.
    """
    state = json.loads(serialised)
    special = {token["content"] for token in state["added_tokens"] if token["special"]}

    def renamed(token: str) -> str:
        return UNSPELLABLE + token if token in special else token

    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    for token in state["added_tokens"]:
        token["content"] = renamed(token["content"])
    state["post_processor"] = None  # it names special tokens, and adds them
    return Tokenizer.from_str(json.dumps(state))


def load_tokenizer(path_or_hub_id: str | Path) -> TextTokenizer:
    """The fast tokenizer in a folder or of a model of the Hub.

    Raises:
      InputError: no tokenizer there, not a fast one, no network, or no cls, sep or pad token.
    """
    tokenizer = _load(path_or_hub_id)
    for name in ("cls", "sep", "pad"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise InputError(f"{path_or_hub_id}: the tokenizer has no {name} token; an encoder's tokenizer has cls, sep and pad tokens")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    serialised = backend.to_str()
    return TextTokenizer(
        backend=_without_special_tokens(serialised),
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        fingerprint=hashlib.sha256(serialised.encode()).hexdigest(),
    )


def save_tokenizer(path_or_hub_id: str | Path, folder: str | Path, model_max_length: int) -> None:
    """Writes the tokenizer's Hugging Face files into `folder`, with `model_max_length` tokens as its limit and no code to run."""
    tokenizer = _load(path_or_hub_id)
    tokenizer.model_max_length = model_max_length
    tokenizer.save_pretrained(str(folder))
    settings_file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in _NOT_PASSED_ON}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # transformers 4 does not know this name and refuses the folder; both know the older one.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(tokenizer: TextTokenizer, *, vocab_size: int, pad_token_id: int | None, where: str) -> None:
    """Raises InputError when the tokenizer cannot be that of a model with these numbers; `where` names it; pad_token_id None: any."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the teacher's vocab_size is only {vocab_size}")
    if tokenizer.vocab_size < vocab_size - LARGEST_VOCABULARY_PADDING:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the teacher's vocab_size is {vocab_size}; "
            "use the tokenizer the teacher was trained with"
        )
    if pad_token_id is not None and tokenizer.pad_id != pad_token_id:
        raise InputError(f"{where}: the tokenizer pads with id {tokenizer.pad_id}, the teacher's pad_token_id is {pad_token_id}")
