"""Against transformers in PyTorch, every parameter random: what the three families compute."""

import jax
import numpy as np
import pytest
from tiny_models import tiny_config, tiny_rows, torch_model

from jaxdistill.features import Feature, all_features
from jaxdistill.models import encode, forward, load_pretrained, mlm_logits

pytestmark = pytest.mark.torch

# Whole, padded on the right, on the left, on both sides; one token.
LAYOUT = ((0, 12), (0, 7), (5, 7), (2, 6), (0, 1))
MODELS = {
    "bert": {"family": "bert"},
    "bert, gelu_new": {"family": "bert", "activation": "gelu_new", "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "roberta": {"family": "roberta", "layer_norm_eps": 1e-2},
    "roberta, relu": {"family": "roberta", "activation": "relu", "type_vocab_size": 5},
    "xlm-roberta": {"family": "xlm-roberta"},
    "roberta, padded with 0": {"family": "roberta", "pad_token_id": 0},
}
CASES = [(name, True) for name in MODELS] + [("bert", False), ("xlm-roberta", False)]


def relative_error(ours, reference) -> float:
    reference = reference.detach().numpy()
    assert ours.shape == reference.shape
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


def record_projections(encoder) -> dict:
    """Query, key and value by layer (from 1), filled by the next call of the PyTorch encoder."""
    recorded: dict = {}
    for i, layer in enumerate(encoder.encoder.layer, 1):
        for kind in ("query", "key", "value"):
            module = getattr(layer.attention.self, kind)
            module.register_forward_hook(lambda _module, _inputs, output, place=(kind, i): recorded.update({place: output}))
    return recorded


@pytest.mark.parametrize(("name", "tied"), CASES, ids=[name + ("" if tied else ", untied") for name, tied in CASES])
def test_features_and_logits(name, tied, tmp_path):
    import torch

    config = tiny_config(**MODELS[name])
    model = torch_model("AutoModelForMaskedLM", config, seed=3, tied=tied)
    model.save_pretrained(tmp_path)
    loaded, params = load_pretrained(tmp_path)
    assert ("decoder" in params["mlm"]) is not tied
    assert (loaded.activation, loaded.layer_norm_eps) == (config.activation, config.layer_norm_eps)
    ids, mask = tiny_rows(config, LAYOUT, 12, seed=4)
    types = np.random.default_rng(5).integers(0, config.type_vocab_size, ids.shape).astype(np.int32)

    recorded = record_projections(model.base_model)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        reference = model(**{key: torch.tensor(x).long() for key, x in inputs.items()}, output_hidden_states=True)
    features = all_features(range(config.num_layers + 1))

    @jax.jit
    def ours(params, ids, mask, types):
        output = forward(loaded, params, ids, mask, types, features=features)
        return output, mlm_logits(loaded, params, output.hidden[loaded.num_layers])

    output, logits = ours(params, ids, mask, types)
    errors = {("hidden", i): relative_error(output.hidden[i], x) for i, x in enumerate(reference.hidden_states)}
    errors |= {place: relative_error(getattr(output, place[0])[place[1]], x) for place, x in recorded.items()}
    errors["logits"] = relative_error(logits, reference.logits)
    assert len(errors) == 4 * config.num_layers + 2
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encode_without_token_types(family, tmp_path):
    import torch

    config = tiny_config(family, num_layers=2)
    model = torch_model("AutoModel", config, seed=6)
    model.save_pretrained(tmp_path)
    ids, mask = tiny_rows(config, ((0, 9), (0, 4)), 9)
    with torch.no_grad():
        reference = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    output = encode(*load_pretrained(tmp_path), ids, mask)
    assert relative_error(output.hidden[2], reference) <= 1e-5
    assert sorted(output.hidden) == [0, 1, 2] and sorted(output.query) == sorted(output.key) == sorted(output.value) == [1, 2]


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_label_logits(family, num_labels, tmp_path):
    import torch

    config = tiny_config(family, num_layers=2, labels=("x",) * num_labels)
    model = torch_model("AutoModelForSequenceClassification", config, seed=7)
    model.save_pretrained(tmp_path)
    config, params = load_pretrained(tmp_path)
    assert len(config.labels) == num_labels
    ids, mask = tiny_rows(config, ((0, 12), (0, 7), (0, 1)), 12, seed=4)
    with torch.no_grad():
        reference = model(torch.tensor(ids).long(), torch.tensor(mask)).logits
    feature = Feature("label_logits", 2)
    output = jax.jit(lambda *arrays: forward(config, *arrays, features=frozenset({feature})))(params, ids, mask)
    assert output[feature].dtype == np.float32 and relative_error(output[feature], reference) <= 1e-5
