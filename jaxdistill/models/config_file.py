"""config.json of the Hub: checked field by field, since anybody may have written it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError
from jaxdistill.models.config import EncoderConfig

# config.json -> EncoderConfig, and the value that transformers assumes where a file says nothing (None: it must say).
CONFIG_FIELDS = {
    "vocab_size": ("vocab_size", None),
    "num_hidden_layers": ("num_layers", None),
    "num_attention_heads": ("num_heads", None),
    "hidden_size": ("hidden_size", None),
    "intermediate_size": ("intermediate_size", None),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "type_vocab_size": ("type_vocab_size", 2),
    "hidden_act": ("activation", "gelu"),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "initializer_range": ("initializer_range", 0.02),
    "hidden_dropout_prob": ("hidden_dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "pad_token_id": ("pad_token_id", {"bert": 0, "roberta": 1, "xlm-roberta": 1}),
    "bos_token_id": ("bos_token_id", {"bert": None, "roberta": 0, "xlm-roberta": 0}),
    "eos_token_id": ("eos_token_id", {"bert": None, "roberta": 2, "xlm-roberta": 2}),
    "classifier_dropout": ("classifier_dropout", {"bert": None, "roberta": None, "xlm-roberta": None}),
}
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
CLASSIFICATION = "ForSequenceClassification"
LARGEST_FILE = 1 << 26  # bytes of JSON: an index of a million weights
# Far beyond any encoder: a size is multiplied and looped over before a weight is read.
_LARGEST = {"num_hidden_layers": 200, "num_attention_heads": 10_000}
_LARGEST_SIZE = 1 << 24
_LARGEST_LABELS = 100_000


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
      ValueError: not JSON, not UTF-8, nested without end or of more than `LARGEST_FILE` bytes; the text says which.
    """
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{file.stat().st_size:,} bytes are too many")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_config(folder: Path) -> EncoderConfig:
    """The shape of the model in a folder.

    Raises:
      InputError: no readable config.json, a value that is none, or an architecture other than BERT, RoBERTa and XLM-R.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: not a model folder, it has no config.json")
    try:
        values = read_json(file)
        family = values.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a JSON object: {error}") from None
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{file}: unsupported architecture {family!r} (model_type); supported: {', '.join(FAMILIES)}")
    fields = {}
    for name, (field, default) in CONFIG_FIELDS.items():
        default = default[family] if isinstance(default, dict) else default
        if name not in values and default is None and not name.endswith(("_token_id", "_dropout")):
            raise InputError(f"{file}: missing {name!r}")
        fields[field] = _checked(values.get(name, default), name, file)
    if fields["activation"] not in ("gelu", "gelu_new", "relu"):
        raise InputError(f"{file}: hidden_act {fields['activation']!r} is not supported; supported: gelu, gelu_new, relu")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{file}: position_embedding_type {values['position_embedding_type']!r} is not supported; only absolute is")
    if values.get("is_decoder"):
        raise InputError(f"{file}: is_decoder is set; only encoders are supported")
    if fields["hidden_size"] % fields["num_heads"]:
        raise InputError(f"{file}: hidden_size {fields['hidden_size']} does not divide into {fields['num_heads']} heads")
    config = EncoderConfig(family=family, labels=_label_names(values, file), **fields)
    if config.max_sequence_length < 1:
        raise InputError(f"{file}: max_position_embeddings {config.max_position_embeddings} leaves no position after the padding's")
    return config


def _label_names(values: dict, file: Path) -> tuple[str, ...]:
    """Of a model for sequence classification, by their numbers; a config.json of another model may name labels that it does not use."""
    architectures = values.get("architectures")
    if not any(str(name).endswith(CLASSIFICATION) for name in (architectures if isinstance(architectures, list) else ())):
        return ()
    names = values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(names, dict) or len(names) > _LARGEST_LABELS or sorted(names) != sorted(str(i) for i in range(len(names))):
        raise InputError(f"{file}: id2label is not a name for each of the numbers 0, 1, ...")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _checked(value: Any, name: str, file: Path) -> Any:
    """The value of a field of config.json if it is of the field's kind."""
    if name == "hidden_act":  # its names are checked where they are known
        return value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_whole or (isinstance(value, float) and math.isfinite(value))
    largest = _LARGEST.get(name, _LARGEST_SIZE)
    if name == "classifier_dropout":
        good, kind = value is None or (is_number and 0 <= value < 1), "a rate or null"
    elif name.endswith("_token_id"):
        good, kind = (value is None and name != "pad_token_id") or (is_whole and 0 <= value <= largest), "a token's number"
    elif name.endswith("_prob"):
        good, kind = is_number and 0 <= value < 1, "a number from 0 to below 1"
    elif name.endswith(("_eps", "_range")):
        good, kind = is_number and 0 <= value <= 1e6, "a number"
    else:
        good, kind = is_whole and 1 <= value <= largest, f"a whole number of at least 1 and at most {largest:,}"
    if not good:
        shown = repr(value)
        raise InputError(f"{file}: {name} is {shown if len(shown) <= 100 else f'{shown[:100]}...'}, not {kind}")
    return value
