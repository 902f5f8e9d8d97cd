"""Masked language modelling: which tokens a student has to predict, and what it sees in their place.

Drawn on the device and afresh in every step: a token store holds the text as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import InputError
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Bool, Int, UInt32

NOT_PREDICTED = -100  # as PyTorch's cross-entropy has it


@dataclass(frozen=True)
class Masking:
    """`rate` of the tokens are predicted; of these, the share `mask` becomes `mask_id`, `random` another token, the rest stays.

    Raises:
      InputError: a rate or share out of range, or an id outside the vocabulary.
    """

    rate: float
    mask: float
    random: float
    mask_id: int
    special_ids: tuple[int, ...]  # never predicted
    vocab_size: int  # of the tokenizer: an embedding table may hold more rows, which are no tokens

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise InputError(f"masking: rate is above 0 and at most 1, got {self.rate}")
        # 0.7 + 0.2 + 0.1 is more than 1 in floating point.
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1 + 1e-9:
            raise InputError(f"masking: mask and random are shares, together at most 1, got {self.mask} and {self.random}")
        for token in (self.mask_id, *self.special_ids):
            if not 0 <= token < self.vocab_size:
                raise InputError(f"masking: id {token} is outside the vocabulary of {self.vocab_size} tokens")


def mask_tokens(
    keys: RowKeys, input_ids: Int[Array, "B S"], segment_ids: Int[Array, "B S"], masking: Masking
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """(masked ids, labels) by BERT's scheme (Devlin et al. 2019, section 3.1); labels are -100 where nothing is predicted.

    Every real token that is not special is predicted with probability `rate`, independently. A random token is any of the
    vocabulary, as in BERT: a special one, or the very token itself, now and then. What a row draws depends on its key and
    on the place of a token alone, not on the row's length, its neighbours, micro-batches or devices.

    Args:
      segment_ids: 0 = padding.
    """
    predicted = _below(keys.bits(input_ids.shape), masking.rate) & (segment_ids > 0)
    for token in masking.special_ids:
        predicted &= input_ids != token
    choice = keys.bits(input_ids.shape)
    # 2^32 is no multiple of the vocabulary: one id is likelier than another by vocab_size / 2^32, 6e-5 for XLM-R's.
    drawn = (keys.bits(input_ids.shape) % np.uint32(masking.vocab_size)).astype(jnp.int32)
    other = jnp.where(_below(choice, masking.mask + masking.random), drawn, input_ids)
    other = jnp.where(_below(choice, masking.mask), jnp.int32(masking.mask_id), other)
    return jnp.where(predicted, other, input_ids), jnp.where(predicted, input_ids, jnp.int32(NOT_PREDICTED))


def _below(bits: UInt32[Array, "B S"], share: float) -> Bool[Array, "B S"]:
    """True for this share of the uniform words."""
    words = min(round(share * 2**32), 2**32)
    return bits <= np.uint32(words - 1) if words else jnp.zeros(bits.shape, bool)
