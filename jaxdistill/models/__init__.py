"""Encoders: parameters are plain nested dicts of arrays, and these functions are all that the other rooms see.

The parameters of a model are {"embeddings": ..., "layers": {"01": ...}} and, where it has them, "pooler", "mlm" and "classifier".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import lru_cache
from types import EllipsisType

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.features import EncoderOutput, Feature, VocabularyLogits, all_features, deepest_layer
from jaxdistill.kernels import ON_CPU, Kernels
from jaxdistill.models.attention import attention_kernel, not_fused
from jaxdistill.models.config import EncoderConfig, label_order
from jaxdistill.models.encoder import Encoder, Keys, layer_name
from jaxdistill.models.heads import Classifier, MLMHead, Pooler
from jaxdistill.models.hub import (
    find_model,
    hub_origin,
    may_pass,
    network_errors,
    no_such_dataset,
    pinned,
    refusal,
    sha256_of_weights,
    split_revision,
    status_of,
    weight_files,
    weights_sha256,
)
from jaxdistill.models.huggingface import load_config, load_pretrained, save_pretrained, with_mlm_head
from jaxdistill.models.int8 import in_int8, is_int8
from jaxdistill.row_keys import RowKeys
from jaxdistill.shapes import Array, Float, Int, Key, Num

__all__ = [
    "EncoderConfig",
    "attention_kernel",
    "encode",
    "find_model",
    "forward",
    "hub_origin",
    "in_int8",
    "init_params",
    "is_read",
    "label_logits",
    "label_order",
    "layer_name",
    "load_config",
    "load_pretrained",
    "may_pass",
    "mlm_logits",
    "network_errors",
    "no_such_dataset",
    "not_fused",
    "num_parameters",
    "pinned",
    "refusal",
    "save_pretrained",
    "sha256_of_weights",
    "split_revision",
    "status_of",
    "weight_files",
    "weights_sha256",
    "with_mlm_head",
]

Params = dict


@lru_cache(maxsize=64)
def _definition(kind: type[nnx.Module], config: EncoderConfig, dtype: str, **options) -> nnx.GraphDef:
    """The module without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, jnp.dtype(dtype), rngs=Keys(jax.random.key(0)), **options)))[0]


def _module(kind: type[nnx.Module], config: EncoderConfig, dtype, params: Params, **options):
    # jnp.asarray: NNX indexes its arrays in traced code, which host arrays cannot do.
    arrays = jax.tree.map(jnp.asarray, params)
    return nnx.merge(_definition(kind, config, jnp.dtype(dtype).name, **options), nnx.State(arrays))


def init_params(config: EncoderConfig, key: Key[Array, ""], *, pooler: bool = False, mlm: bool = False, classifier: bool = False) -> Params:
    """Random float32 parameters (kernels and embeddings truncated normal, biases zero). Pure: call it under `jax.jit`.

    `classifier`: for the labels of the config, with the pooler that BERT's reads.
    """
    pooler = pooler or (classifier and config.family == "bert")
    heads = {"pooler": (Pooler, pooler), "mlm": (MLMHead, mlm), "classifier": (Classifier, classifier)}
    wanted = {name: _initial(kind, config)(jax.random.fold_in(key, i)) for i, (name, (kind, own)) in enumerate(heads.items(), 1) if own}
    return _initial(Encoder, config)(jax.random.fold_in(key, 0)) | wanted


@lru_cache(maxsize=64)
def _initial(kind: type[nnx.Module], config: EncoderConfig):
    """Key -> parameters; one trace for all students of a shape."""

    def build(key):
        module = kind(config, jnp.dtype("float32"), rngs=Keys(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    return jax.jit(build)


def num_parameters(config: EncoderConfig) -> int:
    """Parameters of the encoder, as the papers count them: embeddings and blocks, without pooler and heads."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0)))))


def forward(
    config: EncoderConfig,
    params: Params,
    input_ids: Int[Array, "B S"],
    attention_mask: Num[Array, "B S"],
    token_type_ids: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    *,
    features: frozenset[Feature],
    dropout: RowKeys | None = None,
    dtype=jnp.float32,
    kernels: Kernels = ON_CPU,
    rematerialise: str = "none",
) -> EncoderOutput:
    """The features asked for, and no computation above the deepest of them. Without `dropout` it is deterministic.

    Label logits are of each row's first token: of rows that hold one text.

    Args:
      attention_mask: 1 = real token.
      segment_ids: numbers of the texts packed in a row, 0 = padding; None: a row is one text.
      dtype: of the matrix products; softmax and norms are float32.
      kernels: of the attention.
      rematerialise: what a gradient computes again instead of keeping it: none; attention (its weights); elementwise (all but
        the products with weights: attention, norms, activations, dropout); blocks (all but each block's input).

    Raises:
      ValueError: a layer that the model does not have, logits without their head or below the last layer, or a sequence
        longer than its position table.
    """
    logits, labels = (Feature(kind, config.num_layers) for kind in ("logits", "label_logits"))
    last = Feature("hidden", config.num_layers)
    if {logits, labels} & features:
        output = forward(
            config, params, input_ids, attention_mask, token_type_ids, segment_ids,
            features=features - {logits, labels} | {last}, dropout=dropout, dtype=dtype, kernels=kernels, rematerialise=rematerialise,
        )  # fmt: skip
        if logits in features:
            output.logits[config.num_layers] = _mlm_head(config, params, output[last], dtype)
        if labels in features:
            output.label_logits[config.num_layers] = label_logits(config, params, output[last][:, 0], dropout=dropout, dtype=dtype)
        return output
    for feature in features:
        if feature.kind.endswith("logits"):
            raise ValueError(f"{feature.kind} are of the last layer, {config.num_layers}, not of layer {feature.layer}")
        if not (0 if feature.kind == "hidden" else 1) <= feature.layer <= config.num_layers:
            raise ValueError(f"no {feature.kind} of layer {feature.layer}: the encoder has layers 1..{config.num_layers} (hidden also 0)")
    if input_ids.shape[1] > config.max_sequence_length:
        raise ValueError(f"sequence length {input_ids.shape[1]} is over the encoder's {config.max_sequence_length} positions")
    # No deeper than it is read: the blocks above need not even be there.
    config = dataclasses.replace(config, num_layers=deepest_layer(features))
    layers = {name: params["layers"][name] for name in map(layer_name, range(1, config.num_layers + 1))}
    encoder = _module(Encoder, config, dtype, {"embeddings": params["embeddings"], "layers": layers}, int8=is_int8(params))
    return encoder(
        input_ids, attention_mask, token_type_ids, segment_ids,
        features=features, dropout=dropout, kernels=kernels, rematerialise=rematerialise,
    )  # fmt: skip


def is_read(path: tuple[str, ...], features: Iterable[Feature]) -> bool:
    """Whether `forward` to these features uses the parameter at this path, as ("layers", "06", "query", "kernel")."""
    features = frozenset(features)
    if path[0] != "layers":
        return True
    layer, deepest = int(path[1]), deepest_layer(features)
    if layer != deepest or {Feature(kind, layer) for kind in ("hidden", "logits", "label_logits")} & features:
        return layer <= deepest
    return any(Feature(kind, layer) in features and path[2] == kind for kind in ("query", "key", "value"))


def encode(
    config: EncoderConfig,
    params: Params,
    input_ids,
    attention_mask,
    token_type_ids=None,
    *,
    layers: Iterable[int] | EllipsisType = ...,
) -> EncoderOutput:
    """Hidden states, queries, keys and values [B, S, D] of the layers asked for (`...`: all), in float32, without dropout.

    Layer 0 is the embedding output and has a hidden state only.
    """
    wanted = range(config.num_layers + 1) if layers is ... else layers
    arrays = (None if x is None else jnp.asarray(x) for x in (input_ids, attention_mask, token_type_ids))
    return forward(config, params, *arrays, features=all_features(wanted))


def mlm_logits(config: EncoderConfig, params: Params, hidden: Float[Array, "*B S D"], *, dtype=jnp.float32) -> Float[Array, "*B S V"]:
    """Logits over the vocabulary from the last hidden state, in float32.

    Raises:
      ValueError: the model has no MLM head.
    """
    return _mlm_head(config, params, hidden, dtype).dense()


def _mlm_head(config: EncoderConfig, params: Params, hidden: jax.Array, dtype) -> VocabularyLogits:
    if "mlm" not in params:
        raise ValueError("the model has no MLM head: load one from an MLM checkpoint (BertForMaskedLM, RobertaForMaskedLM)")
    head = _module(MLMHead, config, dtype, params["mlm"], tied="decoder" not in params["mlm"])
    word = {name: jnp.asarray(value) for name, value in params["embeddings"]["word"].items()}
    return head(hidden, word["embedding"], word.get("embedding_scale"))


def label_logits(
    config: EncoderConfig, params: Params, first: Float[Array, "B D"], *, dropout: RowKeys | None = None, dtype=jnp.float32
) -> Float[Array, "B C"]:
    """Logits of the classification head from the last hidden state of each text's first token, in float32.

    Raises:
      ValueError: the model has no classification head.
    """
    if "classifier" not in params:
        raise ValueError("the model has no classification head: fine-tune it, or load a ...ForSequenceClassification")
    if config.family == "bert":
        first = _module(Pooler, config, dtype, params["pooler"])(first)
    return _module(Classifier, config, dtype, params["classifier"])(first, dropout)
