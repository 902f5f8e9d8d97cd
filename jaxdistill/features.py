"""What an encoder returns, and how an objective names the parts that it wants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxdistill.shapes import Array, Float

Kind = Literal["hidden", "query", "key", "value", "logits", "label_logits"]
KINDS: tuple[Kind, ...] = ("hidden", "query", "key", "value")  # of a layer


class Feature(NamedTuple):
    """One tensor of an encoder. Layer 0 is the embedding output (hidden only), 1..L are the blocks; both logits are of layer L."""

    kind: Kind
    layer: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabularyLogits:
    """Logits [*, V] over the vocabulary as the product that they are: a loss needs never hold all of them at once."""

    vectors: Any  # [*, D] in the dtype of the products: the hidden states after the head's transform and norm
    table: Any  # [V, D]: the word embeddings, or a decoder of the head's own
    bias: Any  # [V], float32
    scale: Any = None  # [V], float32: of the rows of a table in int8

    def dense(self) -> Float[Array, "*B V"]:
        """All of them, in float32."""
        logits = jnp.matmul(self.vectors, self.table.T.astype(self.vectors.dtype), preferred_element_type=jnp.float32)
        if self.scale is not None:
            logits = logits * jnp.broadcast_to(self.scale, logits.shape)
        return logits + jnp.broadcast_to(self.bias, logits.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderOutput:
    """Tensors [B, S, D] by layer number; only what was asked for. Query, key, value: native heads side by side.

    `logits` are over the vocabulary, `label_logits` [B, C] over the classes of a classification head.
    """

    hidden: dict[int, jax.Array]
    query: dict[int, jax.Array]
    key: dict[int, jax.Array]
    value: dict[int, jax.Array]
    logits: dict[int, VocabularyLogits] = field(default_factory=dict)
    label_logits: dict[int, jax.Array] = field(default_factory=dict)

    def __getitem__(self, feature: Feature) -> jax.Array | VocabularyLogits:
        return getattr(self, feature.kind)[feature.layer]


def all_features(layers: Iterable[int]) -> frozenset[Feature]:
    """Hidden state, query, key and value of each layer (layer 0: the hidden state alone)."""
    return frozenset(Feature(kind, layer) for layer in layers for kind in KINDS if layer > 0 or kind == "hidden")


def deepest_layer(features: Iterable[Feature]) -> int:
    """The last block that has to be entered: nothing above it is computed."""
    return max((feature.layer for feature in features), default=0)
