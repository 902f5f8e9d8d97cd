"""Model folders as they are found: every variant loads to the same arrays, and what cannot be read is refused in one line."""

import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, random_params, tiny_config, write_model

from jaxdistill.errors import InputError
from jaxdistill.models import find_model, load_config, load_pretrained, save_pretrained, weights_sha256
from jaxdistill.models.huggingface import weight_names

PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta."}
DECODER = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder"}


def same(tree, other) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


def change_weights(folder, change) -> None:
    """Rewrite the file with `change(tensors)`, or with what `change` did to them in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)


def change_config(folder, **values) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def refuses(path, message: str, load=load_pretrained) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mlm", [False, True], ids=["base", "mlm"])
@pytest.mark.parametrize("pooler", [False, True], ids=["", "pooler"])
@pytest.mark.parametrize("family", FAMILIES)
def test_own_round_trip(family, pooler, mlm, tmp_path):
    config = tiny_config(family)
    params = random_params(config, pooler=pooler, mlm=mlm)
    save_pretrained(tmp_path, config, params, head="mlm" if mlm else None)
    loaded, arrays = load_pretrained(tmp_path)
    assert loaded == load_config(str(tmp_path)) == config
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(arrays))
    if mlm:
        params.pop("pooler", None)  # an MLM folder has none
    assert same(arrays, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixed_base_model(family, tmp_path):
    params = write_model(tmp_path, tiny_config(family), pooler=True)
    assert not any(name.startswith(PREFIX[family]) for name in load_file(tmp_path / "model.safetensors"))
    change_weights(tmp_path, lambda tensors: {PREFIX[family] + name: value for name, value in tensors.items()})
    assert same(load_pretrained(tmp_path)[1], params)


def test_head_beside_a_base_without_prefix(tmp_path):
    params = write_model(tmp_path, tiny_config(), mlm=True)
    change_weights(tmp_path, lambda tensors: {name.removeprefix("bert."): value for name, value in tensors.items()})
    assert same(load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("family", FAMILIES)
def test_gamma_and_beta(family, tmp_path):
    params = write_model(tmp_path, tiny_config(family), mlm=True)

    def old_name(name):
        return name.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta")

    change_weights(tmp_path, lambda tensors: {old_name(name): value for name, value in tensors.items()})
    assert sum(name.endswith("gamma") for name in load_file(tmp_path / "model.safetensors")) == 2 * 3 + 2
    assert same(load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_in_the_file(dtype, tmp_path):
    params = write_model(tmp_path, tiny_config(), pooler=True)
    change_weights(tmp_path, lambda tensors: {name: value.astype(dtype) for name, value in tensors.items()})
    assert same(load_pretrained(tmp_path)[1], jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_type(dtype, tmp_path):
    write_model(tmp_path, tiny_config(), dtype=dtype)
    assert {value.dtype.name for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def shard(folder) -> None:
    """The weights in two shards and an index."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard_name, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard_name)
    weight_map = {name: shard_name for shard_name, own in shards.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_shards(tmp_path):
    params = write_model(tmp_path, tiny_config(), mlm=True)
    shard(tmp_path)
    assert same(load_pretrained(tmp_path)[1], params)


def test_buffers_and_next_sentence_head_are_ignored(tmp_path):
    params = write_model(tmp_path, tiny_config(), mlm=True)

    def add(tensors):
        tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
        tensors["cls.seq_relationship.weight"] = np.ones((2, 48), np.float32)
        tensors["cls.seq_relationship.bias"] = np.ones(2, np.float32)

    change_weights(tmp_path, add)
    assert same(load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_decoder_written_twice(family, tmp_path):
    params = write_model(tmp_path, tiny_config(family), mlm=True)

    def repeat(tensors):
        tensors[f"{DECODER[family]}.weight"] = tensors[f"{PREFIX[family]}embeddings.word_embeddings.weight"].copy()
        tensors[f"{DECODER[family]}.bias"] = tensors[DECODER[family].replace("decoder", "bias")].copy()

    change_weights(tmp_path, repeat)
    assert same(load_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("family", FAMILIES)
def test_untied_decoder(family, tmp_path):
    config = tiny_config(family)
    params = random_params(config, mlm=True, tied=False)
    save_pretrained(tmp_path, config, params, head="mlm")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert same(load_pretrained(tmp_path)[1], params)
    # Untied in PyTorch, `cls.predictions.bias` is a leftover that no logit reads.
    change_weights(tmp_path, lambda tensors: tensors[DECODER[family].replace("decoder", "bias")].fill(0))
    assert same(load_pretrained(tmp_path)[1], params)


def test_every_name_is_a_parameter():
    config = tiny_config(num_layers=12)
    pairs = list(weight_names(config, base_prefix="bert."))
    assert len(dict(pairs)) == len({path for _, path in pairs}) == 5 + 12 * 16 + 2 + 6 + 2
    assert dict(pairs)["bert.encoder.layer.0.attention.self.query.weight"] == "layers/01/query/kernel"
    assert dict(pairs)["bert.encoder.layer.11.output.LayerNorm.bias"] == "layers/12/output_norm/bias"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_config_json_may_leave_out(family, tmp_path):
    write_model(tmp_path, tiny_config(family, type_vocab_size=2, layer_norm_eps=1e-12))
    optional = ["type_vocab_size", "hidden_act", "layer_norm_eps", "initializer_range", "hidden_dropout_prob", "pad_token_id", "dtype"]
    optional += ["attention_probs_dropout_prob", "bos_token_id", "eos_token_id", "tie_word_embeddings", "position_embedding_type"]
    change_config(tmp_path, **dict.fromkeys(optional, ...))
    assert load_config(tmp_path) == tiny_config(family, type_vocab_size=2, layer_norm_eps=1e-12)


def test_hash_of_the_weights_is_free_of_the_place(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_model(tmp_path / name, tiny_config(), seed)
    first, second, third = (weights_sha256(tmp_path / name) for name in "abc")
    assert first == second != third


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"])
def test_pickled_weights(name, tmp_path):
    write_model(tmp_path, tiny_config())
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refuses(tmp_path, rf"weights are in {name}, .* convert once, .*\.save_pretrained\(new_folder\) writes model\.safetensors")


def test_no_weights(tmp_path):
    write_model(tmp_path, tiny_config())
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, r"no model\.safetensors \(nor an index of shards\); if .* only as pickle, convert once")


@pytest.mark.parametrize("model_type", ["distilbert", "gpt2", None, ["bert"]])
def test_other_architecture(model_type, tmp_path):
    write_model(tmp_path, tiny_config())
    change_config(tmp_path, model_type=model_type)
    refuses(tmp_path, r"config\.json: unsupported architecture .* supported: bert, roberta, xlm-roberta", load_config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": ...}, "missing 'hidden_size'"),
        ({"vocab_size": ...}, "missing 'vocab_size'"),
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported; supported: gelu, gelu_new, relu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "only encoders are supported"),
        ({"num_attention_heads": 5}, "hidden_size 48 does not divide into 5 heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"pad_token_id": None}, "pad_token_id"),
    ],
)
def test_shape_that_cannot_be_built(values, message, tmp_path):
    write_model(tmp_path, tiny_config())
    change_config(tmp_path, **values)
    refuses(tmp_path, rf"config\.json: .*{message}", load_config)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "null", b"\xff\xfe\x00"])
def test_config_is_not_json(text, tmp_path):
    write_model(tmp_path, tiny_config())
    (tmp_path / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    refuses(tmp_path, r"config\.json: not a JSON object", load_config)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(keep, tmp_path):
    write_model(tmp_path, tiny_config())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(tmp_path, r"model\.safetensors: damaged or truncated")


def test_weight_without_a_place(tmp_path):
    write_model(tmp_path, tiny_config())
    change_weights(tmp_path, lambda tensors: tensors.update({"qa_outputs.weight": np.ones((2, 48), np.float32)}))
    refuses(tmp_path, r"1 weights have no place in a bert encoder, MLM or classification head, e\.g\. qa_outputs\.weight")


def test_layers_beyond_the_config(tmp_path):
    write_model(tmp_path, tiny_config())
    change_config(tmp_path, num_hidden_layers=2)
    refuses(tmp_path, r"16 weights have no place .* encoder\.layer\.2\.")


@pytest.mark.parametrize("missing", ["encoder.layer.1.attention.self.key.bias", "embeddings.LayerNorm.weight", "pooler.dense.bias"])
def test_missing_weight(missing, tmp_path):
    write_model(tmp_path, tiny_config(), pooler=True)
    change_weights(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if name != missing})
    refuses(tmp_path, f"1 weights are missing, e.g. {missing}")


def test_missing_weight_of_the_head(tmp_path):
    write_model(tmp_path, tiny_config(), mlm=True)
    change_weights(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if name != "cls.predictions.bias"})
    refuses(tmp_path, r"1 weights are missing, e\.g\. cls\.predictions\.bias")


def test_shape_other_than_the_config_says(tmp_path):
    write_model(tmp_path, tiny_config())
    change_config(tmp_path, intermediate_size=96)
    # As in the file, where kernels are [out, in].
    refuses(tmp_path, r"encoder\.layer\.\d\.\S+ has shape .*80.*, config\.json asks for .*96")
    change_config(tmp_path, intermediate_size=80, vocab_size=100)
    refuses(tmp_path, r"embeddings\.word_embeddings\.weight has shape \(101, 48\), config\.json asks for \(100, 48\)")


def test_shape_is_given_as_in_the_file(tmp_path):
    write_model(tmp_path, tiny_config())
    change_weights(tmp_path, lambda tensors: tensors.update({"encoder.layer.0.output.dense.weight": np.ones((48, 79), np.float32)}))
    refuses(tmp_path, r"encoder\.layer\.0\.output\.dense\.weight has shape \(48, 79\), config\.json asks for \(48, 80\)")


def test_not_a_model_folder(tmp_path):
    refuses(tmp_path, "not a model folder, it has no config.json")
    refuses(tmp_path / "absent", "absent: no such model folder")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuses(tmp_path / "model.safetensors", "not a model folder but a file; give the folder")


@pytest.mark.parametrize("name", ["someone/some-encoder", "bert-base-uncased-of-nobody"])
def test_hub_id_without_network(name):
    refuses(name, rf"{name}: no such folder here, and the Hub could not be reached \(HF_HUB_OFFLINE is set\)", find_model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "a gated model of the Hub; accept its terms there and log in"),
        ("RepositoryNotFoundError", "neither a folder here nor a model that the Hub shows you"),
        ("HfHubHTTPError", "the Hub could not be reached"),
    ],
)
def test_what_the_hub_answers(kind, message, monkeypatch):
    import huggingface_hub

    def fetch(*_args, **_options):
        answer = types.SimpleNamespace(headers={}, request=None)
        raise getattr(huggingface_hub.errors, kind)("two\nlines", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    refuses("someone/some-encoder", f"someone/some-encoder: .*{message}", find_model)


def test_model_of_the_hub(monkeypatch, tmp_path):
    """A folder's name wins; else the snapshot, of which only what is read is asked for."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path))
    params = write_model(tmp_path, tiny_config())
    assert same(load_pretrained("someone/some-encoder")[1], params)
    assert asked["name"] == "someone/some-encoder"
    assert {"config.json", "model.safetensors"} <= set(asked["allow_patterns"])
    monkeypatch.chdir(tmp_path.parent)
    assert find_model(tmp_path.name).samefile(tmp_path)
    assert asked["name"] == "someone/some-encoder"


@pytest.mark.parametrize("name", ["a/b/c", "some folder", "/absent", "double--dash", "dots..here", "ends-with.git", "trailing-"])
def test_name_that_the_hub_could_not_have(name):
    refuses(name, rf"{name}: ", find_model)


def test_index_names_a_missing_shard(tmp_path):
    write_model(tmp_path, tiny_config())
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuses(tmp_path, r"model-00002-of-00002\.safetensors: missing; model\.safetensors\.index\.json names it")


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_names_a_file_outside(outside, tmp_path):
    write_model(tmp_path, tiny_config())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": outside}}))
    refuses(tmp_path, r"index\.json: names a file outside its folder")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"x": 5}}', '{"weight_map": {"x": ["y"]}}'])
def test_broken_index(text, tmp_path):
    write_model(tmp_path, tiny_config())
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refuses(tmp_path, r"index\.json: not an index of safetensors files")


def test_saving_what_is_not_there(tmp_path):
    config = tiny_config()
    params = random_params(config)
    with pytest.raises(ValueError, match="have no mlm"):
        save_pretrained(tmp_path, config, params, head="mlm")
    del params["layers"]["02"]["key"]["bias"]
    with pytest.raises(ValueError, match="lack layers/02/key/bias"):
        save_pretrained(tmp_path, config, params)
