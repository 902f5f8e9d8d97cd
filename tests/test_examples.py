"""The examples, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import tiny_config, write_model
from tiny_texts import BERT_SPECIAL, make_texts, wordpiece, write_folder
from waiting import PATIENCE

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.torch
def test_finetune_pytorch(tmp_path):
    folder = write_folder(tmp_path / "student", wordpiece(), BERT_SPECIAL)
    write_model(folder, tiny_config("bert", vocab_size=220), pooler=True)
    (tmp_path / "data" / "stsb").mkdir(parents=True)
    for split, count in (("train", 16), ("validation", 8)):
        texts, labels = make_texts(2 * count, longest=20), [i % 6 for i in range(count)]
        columns = {"sentence1": texts[:count], "sentence2": texts[count:], "label": pyarrow.array(labels, "float32")}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "stsb" / f"{split}-00000-of-00001.parquet")
    script = EXAMPLES / "finetune_pytorch.py"
    assert "jaxdistill" not in script.read_text()  # who has a student needs no more than PyTorch
    options = ["--task", "stsb", "--data", "data", "--output", "tuned", "--epochs", "1", "--batch-size", "4", "--max-length", "32"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    finished = subprocess.run(
        [sys.executable, script, "student", *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"^stsb validation: pearson -?\d+\.\d, spearman -?\d+\.\d$", finished.stdout, re.MULTILINE), finished.stdout
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert (tmp_path / "tuned" / "model.safetensors").exists() and (tmp_path / "tuned" / "tokenizer.json").exists()
