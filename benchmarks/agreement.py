"""What the students of finished runs keep of their teacher, measured alike whatever each was trained on: a Markdown table.

    python benchmarks/agreement.py RUN [RUN ...] [--rows 256]

On the same held-out rows (clean text) for every student, against the teacher of the first run:

  similarity   Spearman's correlation of the cosine similarities between the rows' mean vectors (last layer)
  CKA          linear centred kernel alignment of the tokens' vectors in the last layer
  R2 last      share of the variance of the teacher's last layer that a linear map of the student's last layer explains
  R2 best      the same from the student's best layer: MiniLM trains no feed-forward of its last block
  relations    relation KL of the last layers (nats, 12 heads, mean of queries, keys and values): lower is better
  top-1        how often the MLM head's first guess is the teacher's, on masked tokens; "-" without a head
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxdistill.agreement import explained_variance, linear_cka, similarity_agreement
from jaxdistill.config import load_config
from jaxdistill.data import Masking, TokenStore, held_out_rows, mask_tokens
from jaxdistill.features import Feature
from jaxdistill.losses import relation_kl
from jaxdistill.models import forward, load_pretrained, mlm_logits, with_mlm_head
from jaxdistill.report import markdown_table
from jaxdistill.resolve import Run, resolve
from jaxdistill.row_keys import RowKeys

BATCH = 16
COLUMNS = ("student", "similarity", "CKA", "R2 last", "R2 best (layer)", "relations", "top-1")


def outputs(folder: Path, ids: np.ndarray, mask: np.ndarray) -> dict:
    """Hidden states of all layers, and queries, keys and values of the last, on the host."""
    config, params = load_pretrained(folder)
    last = config.num_layers
    hidden = [Feature("hidden", i) for i in range(last + 1)]
    features = frozenset(hidden + [Feature(kind, last) for kind in ("query", "key", "value")])
    run = jax.jit(partial(forward, config, features=features))
    batches = [run(params, ids[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, len(ids), BATCH)]
    joined = {feature: np.concatenate([np.asarray(batch[feature]) for batch in batches]) for feature in features}
    return {"hidden": [joined[feature] for feature in hidden]} | {k: joined[Feature(k, last)] for k in ("query", "key", "value")}


def guesses(folder: Path, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """First guesses of the MLM head at the masked places, as (token ids); None without a head."""
    found = with_mlm_head(folder)
    if found is None:
        return None
    config, params = load_pretrained(found)
    last = Feature("hidden", config.num_layers)

    @jax.jit
    def run(params, ids, mask):
        hidden = forward(config, params, ids, mask, features=frozenset([last]))[last]
        return mlm_logits(config, params, hidden).argmax(axis=-1)

    best = np.concatenate([np.asarray(run(params, ids[i : i + BATCH], mask[i : i + BATCH])) for i in range(0, len(ids), BATCH)])
    return best[labels != -100]


def relations(student: dict, teacher: dict, mask: np.ndarray, heads: int) -> float:
    measure = jax.jit(partial(relation_kl, num_relation_heads=heads))
    total = count = 0.0
    for kind in ("query", "key", "value"):
        for i in range(0, len(mask), BATCH):
            one = measure(student[kind][i : i + BATCH], teacher[kind][i : i + BATCH], mask[i : i + BATCH])
            total, count = total + float(one[0]), count + float(one[1])
    return total / count


def masked_rows(run: Run, ids: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = run.tokenizer
    special = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
    masking = Masking(0.15, 0.8, 0.1, tokenizer.mask_id, special, tokenizer.vocab_size)
    keys = RowKeys.create(jax.random.key(0), np.arange(len(ids), dtype=np.uint32))
    return tuple(np.asarray(x) for x in mask_tokens(keys, ids, segments, masking))


def measured(folder: Path, teacher: dict, rows: dict) -> tuple:
    student, real = outputs(folder, rows["ids"], rows["mask"]), rows["mask"] > 0
    weights = rows["mask"][..., None] / rows["mask"].sum(axis=1)[:, None, None]
    pooled = [(side["hidden"][-1] * weights).sum(axis=1) for side in (teacher, student)]
    target = teacher["hidden"][-1][real]
    explained = [explained_variance(hidden[real], target) for hidden in student["hidden"]]
    best = int(np.argmax(explained))
    own = guesses(folder, rows["masked"], rows["mask"], rows["labels"]) if rows["guesses"] is not None else None
    return (
        f"{similarity_agreement(*pooled):.3f}",
        f"{linear_cka(student['hidden'][-1][real], target):.3f}",
        f"{explained[-1]:.3f}",
        f"{explained[best]:.3f} ({best})",
        f"{relations(student, teacher, rows['mask'], 12):.4f}",
        "-" if own is None else f"{100 * np.mean(own == rows['guesses']):.1f} %",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    run = resolve(load_config(options.runs[0], ["mesh={}"]), num_devices=1)
    store = TokenStore(run.store)
    ids, segments = store.read_rows("held_out", held_out_rows(store, options.rows))
    rows = {"ids": ids, "mask": (segments > 0).astype(np.int32)}
    rows["masked"], rows["labels"] = masked_rows(run, ids, segments)
    rows["guesses"] = guesses(run.teacher_folder, rows["masked"], rows["mask"], rows["labels"])
    teacher = outputs(run.teacher_folder, ids, rows["mask"])
    found = sorted(folder for each in options.runs for folder in (each / "export").iterdir() if not folder.name.startswith("."))
    print(f"{len(ids)} held-out rows, {int(rows['mask'].sum()):,} tokens\n")
    print(markdown_table([(folder.name, *measured(folder, teacher, rows)) for folder in found], COLUMNS), end="")


if __name__ == "__main__":
    main()
