"""Fine-tunes an exported student with the Hugging Face Trainer, in PyTorch alone, and prints its scores on the dev set.

    pip install torch transformers accelerate datasets scikit-learn scipy
    python examples/finetune_pytorch.py runs/small/export/small --task rte --output small-rte

The student is a model as any other: a folder or a Hub id. The task is one of GLUE's, from the Hub (nyu-mll/glue), or with --data from
a folder of parquet files in the same layout (FOLDER/rte/train-*.parquet).
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

COLUMNS = dict.fromkeys(("cola", "sst2"), ("sentence",)) | dict.fromkeys(("mrpc", "stsb", "rte", "wnli"), ("sentence1", "sentence2"))
COLUMNS |= {"qqp": ("question1", "question2"), "qnli": ("question", "sentence"), "mnli": ("premise", "hypothesis")}
F1 = {"f1": f1_score, "accuracy": accuracy_score}
METRICS = {"cola": {"matthews": matthews_corrcoef}, "stsb": {"pearson": pearsonr, "spearman": spearmanr}, "mrpc": F1, "qqp": F1}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a student on a task of GLUE with the Hugging Face Trainer.")
    parser.add_argument("model", help="folder of an exported student, or a Hub id")
    parser.add_argument("--task", choices=sorted(COLUMNS), required=True)
    parser.add_argument("--data", type=Path, help="folder with TASK/train-*.parquet; without it the Hub's nyu-mll/glue")
    parser.add_argument("--output", default="finetuned", help="folder of the model that is written")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    columns, metrics = COLUMNS[options.task], METRICS.get(options.task, {"accuracy": accuracy_score})
    dev = "validation_matched" if options.task == "mnli" else "validation"
    if options.data:
        files = {split: str(options.data / options.task / f"{split}-*.parquet") for split in ("train", dev)}
        data = datasets.load_dataset("parquet", data_files=files)
    else:
        data = datasets.load_dataset("nyu-mll/glue", options.task)

    transformers.set_seed(options.seed)  # of the new head
    num_labels = {"stsb": 1, "mnli": 3}.get(options.task, 2)  # 1 is a regression
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=num_labels, dtype="float32")
    data = data.map(lambda rows: tokenizer(*(rows[name] for name in columns), truncation=True, max_length=options.max_length), batched=True)

    def scores(predicted: transformers.EvalPrediction) -> dict[str, float]:
        logits, labels = predicted
        values = logits[:, 0] if num_labels == 1 else logits.argmax(axis=1)
        return {name: float(np.ravel(metric(labels, values))[0]) for name, metric in metrics.items()}  # a correlation is (value, p)

    arguments = transformers.TrainingArguments(
        output_dir=options.output,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        seed=options.seed,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    # Given a tokenizer, the Trainer pads each batch to its longest example.
    rows = {"train_dataset": data["train"], "eval_dataset": data[dev]}
    trainer = transformers.Trainer(model, arguments, **rows, processing_class=tokenizer, compute_metrics=scores)
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    print(f"{options.task} {dev}: " + ", ".join(f"{name} {100 * found[f'eval_{name}']:.1f}" for name in metrics))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
