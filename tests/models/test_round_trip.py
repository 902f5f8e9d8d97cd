"""From PyTorch to us and back to PyTorch: not a bit and not a key is lost; an export trains in the Hugging Face Trainer."""

import warnings

import jax
import numpy as np
import pytest
from tiny_models import FAMILIES, random_params, tiny_config, torch_model

from jaxdistill.models import load_pretrained, save_pretrained

pytestmark = pytest.mark.torch


def load_in_torch(kind: str, folder, **options):
    """The PyTorch model of a folder, in the types that the folder says; no key may be missing, left over or misshapen."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model, info = getattr(transformers, kind).from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def assert_bit_equal(model, reference) -> None:
    import torch

    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_model(family, dtype, tmp_path):
    import torch

    model = torch_model("AutoModel", tiny_config(family), seed=1).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", *load_pretrained(tmp_path / "theirs"), dtype=dtype)
    again = load_in_torch("AutoModel", tmp_path / "ours")
    assert again.dtype == getattr(torch, dtype)
    assert_bit_equal(again, model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_language_model(family, tied, tmp_path):
    model = torch_model("AutoModelForMaskedLM", tiny_config(family), seed=2, tied=tied)
    if not tied:  # PyTorch then keeps a second bias that no logit reads; ours are equal
        head = model.get_output_embeddings()
        (model.cls.predictions if family == "bert" else model.lm_head).bias.data.copy_(head.bias.data)
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", *load_pretrained(tmp_path / "theirs"), head="mlm")
    again = load_in_torch("AutoModelForMaskedLM", tmp_path / "ours")
    assert_bit_equal(again, model)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_classification(family, num_labels, tmp_path):
    names = tuple(f"class {i}" for i in range(num_labels))
    model = torch_model("AutoModelForSequenceClassification", tiny_config(family, labels=names), seed=3)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_pretrained(tmp_path / "theirs")
    assert config.labels == names
    save_pretrained(tmp_path / "ours", config, params, head="classifier")
    again = load_in_torch("AutoModelForSequenceClassification", tmp_path / "ours")
    assert_bit_equal(again, model)
    assert again.config.id2label == dict(enumerate(names)) and load_pretrained(tmp_path / "ours")[0] == config


@pytest.mark.parametrize("family", FAMILIES)
def test_without_pooler(family, tmp_path):
    config = tiny_config(family)
    save_pretrained(tmp_path, config, random_params(config))
    model = load_in_torch("AutoModel", tmp_path, add_pooling_layer=False)
    assert not any(name.startswith("pooler") for name in model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives(family, tmp_path):
    config = tiny_config(family, activation="gelu_new", initializer_range=0.03, hidden_dropout=0.2, attention_dropout=0.3)
    save_pretrained(tmp_path / "ours", config, random_params(config, pooler=True))
    model = load_in_torch("AutoModel", tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert load_pretrained(tmp_path / "theirs")[0] == config
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.2, 0.3)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_export_learns_in_the_trainer(family, tmp_path):
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the classifier; over seeds the loss falls to between 0.2 and 0.5 of its start
    config = tiny_config(family, num_layers=2, initializer_range=0.1)
    params = jax.tree.map(lambda x: 0.5 * x, random_params(config, pooler=True))
    save_pretrained(tmp_path / "student", config, params)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", num_labels=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(10, config.vocab_size, (64, 8))
    labels = np.arange(64) % 2
    ids[:, 1:4] = np.where(labels, 5, 6)[:, None]  # what the label can be read from
    examples = [
        {"input_ids": torch.tensor(row), "attention_mask": torch.ones(8, dtype=torch.long), "labels": int(label)}
        for row, label in zip(ids, labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Trainer's own
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), losses
