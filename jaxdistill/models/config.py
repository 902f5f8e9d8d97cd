"""The shape of an encoder: one dataclass for BERT, RoBERTa and XLM-R; what differs between them is a field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Family = Literal["bert", "roberta", "xlm-roberta"]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of an encoder, under the project's names (`huggingface.py` holds the Hub's)."""

    family: Family
    vocab_size: int
    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    labels: tuple[str, ...] = ()  # outputs of the classification head by name; one: a regression; none: no such head
    classifier_dropout: float | None = None  # None: as hidden_dropout

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def positions_from_padding(self) -> bool:
        """RoBERTa and XLM-R count positions over real tokens and start after the padding index; BERT counts slots from 0."""
        return self.family != "bert"

    @property
    def max_sequence_length(self) -> int:
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.positions_from_padding else 0)


def label_order(wanted: Sequence[str], there: Sequence[str]) -> list[int] | None:
    """For each label that is wanted, which output of a classification head with the labels `there` it is.

    None: it is a head for others. Outputs that are only numbered (LABEL_0), and the single one of a regression, count as they stand.
    """
    wanted, there = ([name.lower() for name in names] for names in (wanted, there))
    if len(wanted) != len(there):
        return None
    if len(there) == 1 or all(re.fullmatch(r"label_\d+", name) for name in there):
        return list(range(len(wanted)))
    return [there.index(name) for name in wanted] if sorted(wanted) == sorted(there) else None
