"""Fine-tuning computes what it says: packing, buckets, the task's words, seeds together and devices change nothing."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from tiny_models import FAMILIES, random_params, tiny_config

from jaxdistill.config import MeshConfig, Protocol
from jaxdistill.finetune import Settings, TaskData, Trainer, Training, finetune_step, start_params
from jaxdistill.finetune.step import predict
from jaxdistill.sharding import create_mesh
from jaxdistill.tasks import TASKS, TaskTokens, packed_batch

pytestmark = pytest.mark.usefixtures("compiled_once")


def make_tokens(config, count: int, seed: int, *, regression: bool = False, sizes: tuple[int, int] = (3, 14)) -> TaskTokens:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, config.vocab_size, size).astype(np.int32) for size in rng.integers(*sizes, count)]
    types = [(np.arange(len(each)) > 3).astype(np.int32) * (config.family == "bert") for each in ids]
    labels = rng.uniform(0, 5, count).astype(np.float32) if regression else rng.integers(0, 2, count).astype(np.int32)
    return TaskTokens(ids, types, labels)


def alone(config, params, tokens: TaskTokens, length: int) -> np.ndarray:
    """Every text in a row of its own of this length."""
    settings = Settings.create(config, "float32", Protocol())
    logits = jax.jit(partial(predict, settings))
    batches = [packed_batch(tokens, np.array([i]), length=length, num_examples=1, row_step=1) for i in range(len(tokens))]
    return np.concatenate([logits(params, batch) for batch in batches])


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_do_not_depend_on_padding_or_packing(family):
    config = tiny_config(family, num_layers=1, labels=("no", "yes"))
    params, tokens = random_params(config, pooler=family == "bert"), make_tokens(config, 9, 0)
    own = alone(config, params, tokens, 16)
    settings = Settings.create(config, "float32", Protocol())
    for length, num_examples, row_step in ((16, 9, 1), (38, 12, 4)):
        batch = packed_batch(tokens, np.arange(9), length=length, num_examples=num_examples, row_step=row_step)
        logits = np.asarray(jax.jit(partial(predict, settings))(params, batch))[:9]
        np.testing.assert_allclose(logits, own, rtol=0, atol=1e-5)
    np.testing.assert_allclose(alone(config, params, tokens, 37), own, rtol=0, atol=1e-5)
    assert np.abs(own - own[0]).max() > 1e-2  # the texts do differ


def test_a_padded_example_has_no_gradient():
    config = dataclasses.replace(tiny_config(num_layers=1, labels=("no", "yes")), hidden_dropout=0.0, attention_dropout=0.0)
    params, tokens = random_params(config, pooler=True), make_tokens(config, 3, 1)
    settings = Settings.create(config, "float32", Protocol())
    optimizer = settings.optimizer.init(params)
    results = []
    for num_examples in (3, 8):
        batch = packed_batch(tokens, np.arange(3), length=16, num_examples=num_examples, row_step=2)
        results.append(jax.jit(partial(finetune_step, settings))(params, optimizer, batch, np.float32(1e-2), np.int32(0), np.int32(0)))
    assert float(results[0][2]) == pytest.approx(float(results[1][2]), rel=1e-6)
    for one, other in zip(*(jax.tree.leaves(result[0]) for result in results), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def tiny_data(config, *, regression: bool = False, train: int = 24) -> TaskData:
    """Words of the train and the test split within the vocabulary, as ids within it. Two texts fill a row: one shape to compile."""
    task = TASKS["stsb" if regression else "mrpc"]
    parts = [make_tokens(config, count, seed, regression=regression, sizes=(6, 9)) for count, seed in ((train, 2), (12, 3))]
    vocabulary = np.unique(np.concatenate([ids for part in parts for ids in part.ids]))
    within = [dataclasses.replace(part, ids=[np.searchsorted(vocabulary, i).astype(np.int32) for i in part.ids]) for part in parts]
    return TaskData(task, within[0], {"validation": within[1]}, vocabulary, 16, train)


def make_trainer(config, data, protocol=None, devices: int = 1, **mesh) -> Trainer:
    protocol = protocol or Protocol(weight_decay=0.1, warmup=0.2)
    settings = Settings.create(config, "float32", protocol)
    params = random_params(dataclasses.replace(config, labels=()), pooler=True)
    return Trainer(settings, data, params, protocol, create_mesh(MeshConfig(**mesh), jax.devices()[:devices]))


def trained(trainer: Trainer, cells: list[Training]) -> tuple[dict, list[float]]:
    losses: list[float] = []
    return trainer.train(cells, None, lambda step, loss: losses.append(loss)), losses


CELL = Training(learning_rate=2e-3, batch_size=8, epochs=2, seed=3)


@pytest.fixture(scope="module")
def config():
    return tiny_config(num_layers=1, vocab_size=300, labels=("no", "yes"))


@pytest.fixture(scope="module")
def reference(config):
    trainer = make_trainer(config, tiny_data(config))
    params, losses = trained(trainer, [CELL])
    return trainer.whole(params, CELL), losses, trainer.logits(params, "validation")


def assert_close(tree, other, atol=2e-5):
    """But for the biases of keys: no softmax sees them, so that their gradient is rounding, which Adam scales up."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (path, one), two in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=0, atol=atol)


def test_words_that_the_task_lacks_only_decay(config, reference):
    """The same training with the whole table in the step: also under weight decay, to the last row."""
    data = tiny_data(config)
    assert len(data.vocabulary) < 250
    whole = dataclasses.replace(
        data,
        vocabulary=np.arange(config.vocab_size),
        train=dataclasses.replace(data.train, ids=[data.vocabulary[ids].astype(np.int32) for ids in data.train.ids]),
        tests={"validation": data.tests["validation"]},
    )
    trainer = make_trainer(config, whole)
    params, losses = trained(trainer, [CELL])
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    assert_close(trainer.whole(params, CELL), reference[0])
    unused = np.setdiff1d(np.arange(config.vocab_size), data.vocabulary)
    before = random_params(dataclasses.replace(config, labels=()), pooler=True)["embeddings"]["word"]["embedding"]
    moved = reference[0]["embeddings"]["word"]["embedding"][unused] / before[unused]
    assert moved.min() == pytest.approx(moved.max(), abs=1e-6) and 0.99 < moved.max() < 0.9999


def test_weight_decay_of_the_other_words_up_to_an_epoch(config):
    trainer = make_trainer(config, tiny_data(config), Protocol(weight_decay=0.5))
    params = {"embeddings": {"word": {"embedding": np.zeros((len(trainer.data.vocabulary), config.hidden_size), np.float32)}}}
    unused = np.setdiff1d(np.arange(config.vocab_size), trainer.data.vocabulary)[0]
    before = trainer._given["embeddings"]["word"]["embedding"][unused]
    rates = 2e-3 * np.array([6, 5, 4, 3, 2, 1]) / 6
    for epochs, steps in ((1, 3), (2, 6), (None, 6)):
        table = trainer.whole(params, CELL, epochs)["embeddings"]["word"]["embedding"]
        np.testing.assert_allclose(table[unused] / before, np.prod(1 - 0.5 * rates[:steps]), rtol=1e-5)


def test_seeds_together_are_seeds_one_after_the_other(config, reference):
    trainer = make_trainer(config, tiny_data(config))
    cells = [dataclasses.replace(CELL, seed=seed) for seed in (3, 4)]
    params, _ = trained(trainer, cells)
    assert_close(jax.tree.map(lambda x: x[0], params), trained(trainer, [CELL])[0])
    logits = trainer.logits(params, "validation", together=True)
    np.testing.assert_allclose(logits[0], reference[2], rtol=0, atol=5e-5)
    assert np.abs(logits[1] - logits[0]).max() > 1e-2
    assert [list(each) for each in trainer.scores(params, "validation", together=True)] == [["f1", "accuracy"]] * 2


@pytest.mark.parametrize(("devices", "mesh"), [(2, {}), (4, {"fsdp": 2, "tensor": 2})])
def test_devices_change_nothing(config, reference, devices, mesh):
    trainer = make_trainer(config, tiny_data(config), devices=devices, **mesh)
    params, losses = trained(trainer, [CELL])
    kernel = params["layers"]["01"]["query"]["kernel"]
    assert len(kernel.sharding.device_set) == devices and kernel.sharding.is_fully_replicated is (mesh == {})
    np.testing.assert_allclose(losses, reference[1], rtol=1e-4)  # dropout and all
    np.testing.assert_allclose(trainer.logits(params, "validation"), reference[2], rtol=0, atol=1e-4)


def test_seeds_together_on_devices(config, reference):
    trainer = make_trainer(config, tiny_data(config), devices=4, fsdp=2)
    params, _ = trained(trainer, [dataclasses.replace(CELL, seed=seed) for seed in (4, 3)])
    kernel = params["layers"]["01"]["query"]["kernel"]
    assert kernel.shape[0] == 2 and not kernel.sharding.is_fully_replicated
    np.testing.assert_allclose(trainer.logits(params, "validation", together=True)[1], reference[2], rtol=0, atol=1e-4)


def test_rates_are_those_of_transformers(config):
    trainer = make_trainer(config, tiny_data(config), Protocol(warmup=0.5))
    assert trainer.num_steps(CELL) == 6
    np.testing.assert_allclose(trainer.rates(CELL), 2e-3 * np.array([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]), rtol=1e-6)
    trainer = make_trainer(config, tiny_data(config), Protocol())
    np.testing.assert_allclose(trainer.rates(CELL), 2e-3 * np.array([6, 5, 4, 3, 2, 1]) / 6, rtol=1e-6)


def test_every_epoch_reads_every_example_once(config):
    data = tiny_data(config, train=22)
    trainer = make_trainer(config, data)
    seen: list[np.ndarray] = []
    for batch in trainer._batches([CELL]):
        batch = jax.device_get(batch)
        real = batch["weight"] > 0
        seen.append(batch["input_ids"][batch["row"], batch["slot"]][real])
    first = [ids[0] for ids in data.train.ids]
    assert [len(each) for each in seen] == [8, 8, 6] * 2
    assert sorted(np.concatenate(seen[:3])) == sorted(np.concatenate(seen[3:])) == sorted(first)
    assert np.concatenate(seen[:3]).tolist() != np.concatenate(seen[3:]).tolist()


@pytest.mark.parametrize("regression", [False, True])
def test_it_learns(regression):
    """The label is whether (or how often) a certain word is there."""
    labels = ("score",) if regression else ("no", "yes")
    config = tiny_config(num_layers=1, labels=labels, hidden_dropout=0.0, attention_dropout=0.0)
    data, rng = tiny_data(config, regression=regression, train=64), np.random.default_rng(0)
    parts = []
    for part in (data.train, data.tests["validation"]):
        answers = rng.integers(0, 2, len(part))
        words = [[7, 7] if answer else [9, 9] for answer in answers]
        ids = [np.concatenate([each[:1], word, each[1:12]]).astype(np.int32) for each, word in zip(part.ids, words, strict=True)]
        types = [np.zeros(len(each), np.int32) for each in ids]
        parts.append(TaskTokens(ids, types, answers.astype(np.float32) * 5 if regression else answers.astype(np.int32)))
    data = dataclasses.replace(data, train=parts[0], tests={"validation": parts[1]})
    trainer = make_trainer(config, data, Protocol())
    params, losses = trained(trainer, [Training(3e-3, 16, 12, 0)])
    scores = trainer.scores(params, "validation")[0]
    assert np.mean(losses[-4:]) < 0.3 * np.mean(losses[:4])
    assert next(iter(scores.values())) > 0.9, scores


def test_a_start_keeps_what_the_model_has():
    config = tiny_config(labels=("a", "b", "c"))
    params = random_params(dataclasses.replace(config, labels=()), pooler=True, mlm=True)
    start, other = start_params(config, params, 0), start_params(config, params, 1)
    assert sorted(start) == ["classifier", "embeddings", "layers", "pooler"]
    assert start["pooler"] is params["pooler"]
    kernels = [np.asarray(each["classifier"]["output"]["kernel"]) for each in (start, other)]
    assert kernels[0].shape == (48, 3) and np.abs(kernels[0] - kernels[1]).max() > 0.01
    assert np.asarray(start["classifier"]["output"]["bias"]).tolist() == [0.0] * 3
    without = start_params(config, {name: params[name] for name in ("embeddings", "layers")}, 0)
    assert sorted(without) == sorted(start)
    assert "pooler" not in start_params(tiny_config("roberta", labels=("a",)), params, 0)
