"""Tiny texts, and tiny tokenizers of the three kinds as folders of Hugging Face files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ["river", "stone", "light", "winter", "cloud", "harbour", "seven", "green", "walking", "letters", "quiet", "mountain"]
ROBERTA_SPECIAL = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "<unk>"}
BERT_SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}


def make_texts(count: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words, each different."""
    words = random.Random(seed)
    return [" ".join(words.choice(WORDS) for _ in range(words.randint(1, longest))) + f" {seed} {i}" for i in range(count)]


def write_folder(folder: Path, backend: Tokenizer, special: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=220, special_tokens=names, show_progress=False)
    backend.train_from_iterator([*make_texts(50), "[SEP] [MASK] </s> abcdefghijklmnopqrstuvwxyz 0123456789"], trainer)
    pair = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=pair)
    return backend


def byte_level_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(make_texts(50), trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.enable_truncation(16)
    backend.enable_padding(pad_id=1, pad_token="<pad>", length=16)
    return backend


def unigram() -> Tokenizer:
    """As XLM-R's: the special tokens are pieces of the model, with the best score of all."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -5.0) for word in WORDS] + [(char, -9.0) for char in "▁<>/[]sabcdefghijklmnopqrtuvwxyzSEP0123456789"]
    backend = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return backend
