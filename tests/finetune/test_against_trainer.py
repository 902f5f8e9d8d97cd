"""A fine-tuning against the Hugging Face Trainer's on the same batches, without dropout: the losses and every parameter."""

import warnings

import jax
import numpy as np
import pytest
from tiny_models import random_params, tiny_config

from jaxdistill.config import MeshConfig, Protocol
from jaxdistill.data import RowOrder
from jaxdistill.finetune import Settings, TaskData, Trainer, Training, start_params
from jaxdistill.models import load_pretrained, save_pretrained
from jaxdistill.sharding import create_mesh
from jaxdistill.tasks import TASKS, TaskTokens

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("compiled_once")]
EXAMPLES, BATCH, EPOCHS, SEED = 11, 4, 2, 3  # the last batch of an epoch is not full; each is one row


def task_data(config, task) -> TaskData:
    rng = np.random.default_rng(0)
    ids = [
        rng.integers(5, config.vocab_size // 2, length).astype(np.int32) for length in rng.integers(4, 8, EXAMPLES)
    ]  # a batch is one row
    types = [(np.arange(len(each)) > 3).astype(np.int32) * (config.family == "bert") for each in ids]
    labels = rng.uniform(0, 5, EXAMPLES).astype(np.float32) if task.range else np.arange(EXAMPLES, dtype=np.int32) % 2
    vocabulary = np.unique(np.concatenate(ids))
    tokens = TaskTokens([np.searchsorted(vocabulary, each).astype(np.int32) for each in ids], types, labels)
    return TaskData(task, tokens, {"validation": tokens}, vocabulary, 32, EXAMPLES)


def padded(rows: list[np.ndarray], fill: int):
    import torch

    longest = max(map(len, rows))
    return torch.tensor(np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows])).long()


def torch_batches(config, data: TaskData) -> list[dict]:
    """The same examples in the same order, each batch padded to its longest."""
    import torch

    order, batches = RowOrder((EXAMPLES,), None, SEED), []
    for epoch in range(EPOCHS):
        for start in range(0, EXAMPLES, BATCH):
            chosen = order.rows(epoch * EXAMPLES + np.arange(start, min(start + BATCH, EXAMPLES)))
            ids = [data.vocabulary[data.train.ids[i]] for i in chosen]
            batch = {"input_ids": padded(ids, config.pad_token_id), "attention_mask": padded([np.ones_like(row) for row in ids], 0)}
            if config.family == "bert":
                batch["token_type_ids"] = padded([data.train.types[i] for i in chosen], 0)
            labels = torch.tensor(data.train.labels[chosen])
            batches.append(batch | {"labels": labels if data.task.range else labels.long()})
    return batches


def train_in_torch(folder, batches: list[dict], cell: Training, protocol: Protocol) -> list[dict]:
    """Losses and gradient norms of the updates; the model goes to `folder`/tuned."""
    import torch
    import transformers

    class OnBatches(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

    torch.set_num_threads(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "tuned"),
        max_steps=len(batches),
        learning_rate=cell.learning_rate,
        warmup_steps=protocol.warmup,
        weight_decay=protocol.weight_decay,
        adam_epsilon=protocol.eps,
        max_grad_norm=protocol.clip_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = OnBatches(model, arguments, train_dataset=batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Trainer's own
        trainer.train()
        trainer.save_model()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


CASES = {  # clip_norm: between the norms of the gradients, so that some are clipped and some are not
    "bert, classes": ("bert", "rte", {"clip_norm": 1.5}),
    "bert, regression, warmup and decay": ("bert", "stsb", {"clip_norm": 30.0, "weight_decay": 0.1, "warmup": 0.4}),
    "roberta, classes, warmup and decay": ("roberta", "rte", {"clip_norm": 0.3, "weight_decay": 0.1, "warmup": 0.4}),
    "roberta, regression": ("roberta", "stsb", {"clip_norm": 7.0}),
}


@pytest.mark.parametrize("family, task, protocol", CASES.values(), ids=CASES)
def test_same_training(family, task, protocol, tmp_path):
    task = TASKS[task]
    config = tiny_config(family, num_layers=1, hidden_dropout=0.0, attention_dropout=0.0, labels=task.labels or ("score",))
    # A key's bias has no gradient but rounding, which Adam would make an update of under its usual eps.
    protocol = Protocol.model_validate(protocol | {"eps": 1e-5})
    cell, params = Training(1e-3, BATCH, EPOCHS, SEED), random_params(config, pooler=family == "bert")
    save_pretrained(tmp_path, config, jax.tree.map(np.asarray, start_params(config, params, SEED)), head="classifier")
    data = task_data(config, task)
    logs = train_in_torch(tmp_path, torch_batches(config, data), cell, protocol)
    assert min(entry["grad_norm"] for entry in logs) < protocol.clip_norm < max(entry["grad_norm"] for entry in logs)

    trainer = Trainer(Settings.create(config, "float32", protocol), data, params, protocol, create_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_allclose(trainer.rates(cell), [entry["learning_rate"] for entry in logs], rtol=1e-6)
    losses = []
    trained = trainer.train([cell], None, lambda step, loss: losses.append(loss))
    np.testing.assert_allclose(losses, [entry["loss"] for entry in logs][:-1], rtol=1e-5)
    ours, theirs = trainer.whole(trained, cell), load_pretrained(tmp_path / "tuned")[1]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, own), value in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(own, value, rtol=0, atol=1e-5, err_msg=jax.tree_util.keystr(path))
