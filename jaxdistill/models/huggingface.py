"""Model folders of the Hub, read and written without torch: config.json, and safetensors through one table of names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxdistill.errors import InputError
from jaxdistill.models.config import EncoderConfig
from jaxdistill.models.config_file import CLASSIFICATION, CONFIG_FIELDS, FAMILIES, read_config, read_json
from jaxdistill.models.hub import find_model, hub_origin

_PREFIX = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

_LINEAR = (("weight", "kernel"), ("bias", "bias"))
_NORM = (("weight", "scale"), ("bias", "bias"))
_EMBED = (("weight", "embedding"),)
# Hub module -> path of ours, kind of module. Blocks count from 0 there, from 1 here.
_EMBEDDINGS = {
    "embeddings.word_embeddings": ("embeddings/word", _EMBED),
    "embeddings.position_embeddings": ("embeddings/position", _EMBED),
    "embeddings.token_type_embeddings": ("embeddings/token_type", _EMBED),
    "embeddings.LayerNorm": ("embeddings/norm", _NORM),
}
_BLOCK = {
    "attention.self.query": ("query", _LINEAR),
    "attention.self.key": ("key", _LINEAR),
    "attention.self.value": ("value", _LINEAR),
    "attention.output.dense": ("attention_output", _LINEAR),
    "attention.output.LayerNorm": ("attention_norm", _NORM),
    "intermediate.dense": ("intermediate", _LINEAR),
    "output.dense": ("output", _LINEAR),
    "output.LayerNorm": ("output_norm", _NORM),
}
_MLM = {
    "bert": {"cls.predictions.transform.dense": "dense", "cls.predictions.transform.LayerNorm": "norm", "cls.predictions": None},
    "roberta": {"lm_head.dense": "dense", "lm_head.layer_norm": "norm", "lm_head": None},
}
_CLASSIFIER = {
    "bert": {"classifier": "output"},
    "roberta": {"classifier.dense": "dense", "classifier.out_proj": "output"},
}
# Buffers, and BERT's next-sentence head, which no distillation reads.
_IGNORED = re.compile(r"(.*\.)?embeddings\.position_ids|cls\.seq_relationship\.(weight|bias)")
_SHARD = re.compile(r"model[\w.-]*\.safetensors")


def weight_names(config: EncoderConfig, *, base_prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs (name in the file, path of ours) of every tensor that a model of this shape may hold."""
    modules = {base_prefix + name: entry for name, entry in _EMBEDDINGS.items()}
    for i in range(config.num_layers):
        for name, (path, kind) in _BLOCK.items():
            modules[f"{base_prefix}encoder.layer.{i}.{name}"] = (f"layers/{i + 1:02d}/{path}", kind)
    modules[f"{base_prefix}pooler.dense"] = ("pooler/dense", _LINEAR)
    for name, path in _MLM[_PREFIX[config.family]].items():
        if path is None:
            yield f"{name}.bias", "mlm/bias"
            yield f"{name}.decoder.weight", "mlm/decoder"
        else:
            modules[name] = (f"mlm/{path}", _LINEAR if path == "dense" else _NORM)
    modules |= {name: (f"classifier/{path}", _LINEAR) for name, path in _CLASSIFIER[_PREFIX[config.family]].items()}
    for name, (path, kind) in modules.items():
        for suffix, leaf in kind:
            yield f"{name}.{suffix}", f"{path}/{leaf}"


def load_config(path_or_hub_id: str | Path) -> EncoderConfig:
    """The shape of the model in a folder or on the Hub.

    Raises:
      InputError: no such model, no readable config.json, or an architecture other than BERT, RoBERTa and XLM-R.
    """
    return read_config(find_model(path_or_hub_id))


def with_mlm_head(folder: Path) -> Path | None:
    """The folder whose weights have an MLM head: this one, or its subfolder mlm/ (as an export writes it); None: neither.

    Raises:
      InputError: no weights there, or an index that cannot be read.
    """
    for place in (folder, folder / "mlm"):
        if (place / "config.json").is_file() and any(
            re.match(r"cls\.predictions\.|lm_head\.", name) for name in _read_tensors(place, names_only=True)
        ):
            return place
    return None


def load_pretrained(path_or_hub_id: str | Path) -> tuple[EncoderConfig, dict]:
    """Config and parameters (float32 arrays on the host) of a model folder or Hub id; reads safetensors only.

    The parameters hold "pooler", "mlm" and "classifier" where the file has them; "mlm" has its own "decoder" only when it is not tied.

    Raises:
      InputError: no such model, weights as pickle, a damaged file, a tensor missing, left over or of another shape.
    """
    folder = find_model(path_or_hub_id)
    config = read_config(folder)
    tensors = {_modern_name(name): value for name, value in _read_tensors(folder).items() if not _IGNORED.fullmatch(name)}
    prefix = f"{_PREFIX[config.family]}."
    base_prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
    names = dict(weight_names(config, base_prefix=base_prefix))
    _drop_tied_decoder(tensors, names)
    config = _with_labels(config, tensors, names)
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise InputError(
            f"{folder}: {len(unknown)} weights have no place in a {config.family} encoder, MLM or classification head, e.g. {unknown[0]}"
        )
    present = {path.split("/")[0] for name, path in names.items() if name in tensors} | {"embeddings", "layers"}
    missing = [name for name, path in names.items() if path.split("/")[0] in present and name not in tensors and path != "mlm/decoder"]
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing, e.g. {missing[0]}")
    params: dict = {}
    expected = _shapes(config)
    for name, value in tensors.items():
        path = names[name]
        transposed = path.endswith("kernel") or path == "mlm/decoder"
        shape = expected(path)[::-1] if transposed else expected(path)
        if value.shape != shape:
            raise InputError(f"{folder}: {name} has shape {value.shape}, config.json asks for {shape}")
        node = params
        *parents, leaf = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = np.ascontiguousarray(value.T if transposed else value, np.float32)
    return config, params


def _with_labels(config: EncoderConfig, tensors: dict, names: dict) -> EncoderConfig:
    """The config with as many labels as its classification head has outputs; numbered, where config.json does not name them."""
    bias = next((tensors[name] for name, path in names.items() if path == "classifier/output/bias" and name in tensors), None)
    if bias is None or len(bias) == len(config.labels):
        return config
    return dataclasses.replace(config, labels=tuple(f"LABEL_{i}" for i in range(len(bias))))


def _modern_name(name: str) -> str:
    """TensorFlow-born checkpoints call a norm's weight and bias gamma and beta."""
    return re.sub(r"(LayerNorm|layer_norm)\.(gamma|beta)$", lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", name)


def _drop_tied_decoder(tensors: dict, names: dict) -> None:
    """A decoder that repeats the word embeddings is the tied one, written twice; a decoder's own bias is the one that counts."""
    names = {path: name for name, path in names.items()}
    word, decoder, bias = (names[path] for path in ("embeddings/word/embedding", "mlm/decoder", "mlm/bias"))
    if decoder in tensors and word in tensors and np.array_equal(tensors[decoder], tensors[word]):
        del tensors[decoder]
    decoder_bias = decoder.removesuffix("weight") + "bias"
    if decoder_bias in tensors:  # where the two differ (untied), transformers adds this one and leaves the other unused
        tensors[bias] = tensors.pop(decoder_bias)


def _shapes(config: EncoderConfig):
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    special = {
        "embeddings/word/embedding": (vocab, width),
        "embeddings/position/embedding": (config.max_position_embeddings, width),
        "embeddings/token_type/embedding": (config.type_vocab_size, width),
        "mlm/bias": (vocab,),
        "mlm/decoder": (width, vocab),
        "classifier/output/kernel": (width, len(config.labels)),
        "classifier/output/bias": (len(config.labels),),
    }

    def shape(path: str) -> tuple[int, ...]:
        if path in special:
            return special[path]
        *_, module, leaf = path.split("/")
        if leaf != "kernel":
            return (inner,) if module == "intermediate" else (width,)
        return {"intermediate": (width, inner), "output": (inner, width)}.get(module, (width, width))

    return shape


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a model."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            outside = any(Path(name).name != name or "\0" in name for name in names)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index}: not an index of safetensors files (no weight_map from weights to file names)") from None
        if outside:
            raise InputError(f"{index}: names a file outside its folder")
        if foreign := [name for name in names if not _SHARD.fullmatch(name)]:  # whose hash would not be taken either
            raise InputError(f"{index}: names {foreign[0]!r}; shards are called model-00001-of-00002.safetensors")
        if not names:
            raise InputError(f"{index}: names no file")
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        raise InputError(_no_weights(folder))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing; {index.name} names it")
    return [folder / name for name in names]


def _read_tensors(folder: Path, names_only: bool = False) -> dict[str, np.ndarray]:
    tensors = {}
    for shard in _shards(folder):
        try:
            with safe_open(shard, "numpy") as file:
                for name in file.keys():
                    kind = file.get_slice(name).get_dtype()
                    if kind not in _FLOATS and not _IGNORED.fullmatch(name):
                        raise InputError(f"{shard}: {name} holds {kind}; weights are read as {', '.join(_FLOATS)}, not quantised")
                    tensors[name] = np.empty(0) if names_only or kind not in _FLOATS else file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{shard}: damaged or truncated safetensors file ({error}); fetch it again") from None
    return tensors


def _no_weights(folder: Path) -> str:
    convert = (
        "convert once, in an environment with torch: AutoModelForMaskedLM.from_pretrained(model).save_pretrained(new_folder) "
        "writes model.safetensors (AutoModel without an MLM head)"
    )
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5", "flax_model.msgpack"):
        if (folder / pickled).is_file():
            return f"{folder}: weights are in {pickled}, which is not read (a pickle can run code); {convert}"
    # Of a Hub id, other weights are not even fetched.
    place = "@".join(hub_origin(folder) or (str(folder),))
    return f"{place}: no model.safetensors (nor an index of shards); if the model has its weights only as pickle, {convert}"


def save_pretrained(
    folder: Path, config: EncoderConfig, params: dict, *, head: Literal["mlm", "classifier"] | None = None, dtype: str = "float32"
) -> None:
    """Write config.json and model.safetensors that transformers loads without a missing or unexpected key.

    A base model goes with its pooler if `params` has one (load it with `add_pooling_layer=False` if not). With a `head` the
    folder is one for AutoModelForMaskedLM (without pooler) or AutoModelForSequenceClassification (BERT's with its pooler).

    Raises:
      ValueError: the parameters of the head are not there.
    """
    parts = {"embeddings", "layers"} | {"mlm": {"mlm"}, "classifier": {"classifier", "pooler"}, None: {"pooler"}}[head]
    if head and head not in params:
        raise ValueError(f"the parameters have no {head}")
    tensors = {}
    for name, path in weight_names(config, base_prefix=f"{_PREFIX[config.family]}." if head else ""):
        if path.split("/")[0] not in parts or (config.family != "bert" and head and path.startswith("pooler/")):
            continue
        node = params
        for key in path.split("/"):
            node = node.get(key) if isinstance(node, dict) else None
        if node is None:
            if (path.startswith("pooler/") and head is None) or path == "mlm/decoder":
                continue
            raise ValueError(f"the parameters lack {path}")
        value = np.asarray(node)
        value = value.T if path.endswith("kernel") or path == "mlm/decoder" else value
        tensors[name] = np.ascontiguousarray(value.astype(_DTYPES[dtype]))
        if path == "mlm/bias" and "decoder" in params["mlm"]:
            tensors[name.removesuffix("bias") + "decoder.bias"] = tensors[name].copy()
    kind = {"mlm": "ForMaskedLM", "classifier": CLASSIFICATION, None: "Model"}[head]
    values = {"architectures": [f"{FAMILIES[config.family]}{kind}"], "model_type": config.family, "dtype": dtype}
    values |= {name: getattr(config, field) for name, (field, _) in CONFIG_FIELDS.items()}
    values |= {"position_embedding_type": "absolute", "tie_word_embeddings": "decoder" not in params.get("mlm", {})}
    if head == "classifier":
        values |= {"id2label": {str(i): name for i, name in enumerate(config.labels)}}
        values |= {"label2id": {name: i for i, name in enumerate(config.labels)}}
        values |= {"problem_type": "regression" if len(config.labels) == 1 else "single_label_classification"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
