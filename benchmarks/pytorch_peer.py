"""The same distillation step in PyTorch, as a good user of transformers would write it; `step_against_pytorch.py` runs it.

No work is left in that the loss does not need (teacher and student stop at the projections that it reads), nothing loops over
the batch, the optimizer is the fused one, and `compile` holds both models, the relations and the KL in one graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
from step_against_pytorch import measure
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging

KINDS = ("query", "key", "value")
# Dropout by ATen's generator instead of Inductor's own: 8 % of the compiled step on a CPU.
torch._inductor.config.fallback_random = True


class Vectors(nn.Module):
    """Queries, keys and values of one layer: the blocks below it, and of the block itself the three projections only."""

    def __init__(self, model: BertModel, layer: int):
        super().__init__()
        attention = model.encoder.layer[layer - 1].attention.self
        self.projections = nn.ModuleList(getattr(attention, kind) for kind in KINDS)
        model.encoder.layer = model.encoder.layer[: layer - 1]
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return [projection(hidden) for projection in self.projections]


def load(folder: str, layer: int, dropout: float) -> Vectors:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False, dtype=torch.float32, **rates)
    return Vectors(model, layer)


def log_relations(vectors: Tensor, bias: Tensor, num_relation_heads: int) -> Tensor:
    """log softmax(A A^T / sqrt(d)), [B, R, S, S]; the scale goes on the vectors, which are S / d times fewer than the scores."""
    batch, length, width = vectors.shape
    size = width // num_relation_heads
    heads = vectors.view(batch, length, num_relation_heads, size).transpose(1, 2)
    return torch.log_softmax((heads * size**-0.5) @ heads.transpose(2, 3) + bias, dim=-1)


def relation_kl(student: Tensor, teacher: Tensor, attention_mask: Tensor, num_relation_heads: int) -> Tensor:
    """Mean over real queries and relation heads of KL(teacher || student)."""
    real = attention_mask.to(student.dtype)
    bias = (1.0 - real)[:, None, None, :] * torch.finfo(student.dtype).min
    with torch.no_grad():
        target = log_relations(teacher, bias, num_relation_heads)
    divergence = nn.functional.kl_div(log_relations(student, bias, num_relation_heads), target, reduction="none", log_target=True)
    return (divergence.sum(-1) * real[:, None, :]).sum() / (real.sum() * num_relation_heads)


def loss_function(teacher: Vectors, student: Vectors, num_relation_heads: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(input_ids, attention_mask)
        pairs = zip(student(input_ids, attention_mask), targets, strict=True)
        return sum(relation_kl(ours, target, attention_mask, num_relation_heads) for ours, target in pairs) / len(KINDS)

    return loss


def create_optimizer(parameters: list[nn.Parameter], job: dict) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW that decays matrices only, and the linear schedule with warmup, neither of whose ends has a rate of 0."""
    options, steps = job["optimizer"], job["total_steps"]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (options["b1"], options["b2"])
    optimizer = torch.optim.AdamW(groups, lr=options["learning_rate"], betas=betas, eps=options["eps"], fused=True)
    warmup = max(round(options["warmup"] * steps), 1)

    def rate(done: int) -> float:
        return min((done + 1) / warmup, 1.0 - max(done + 1 - warmup, 0) / (steps - warmup + 1))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def create_step(job: dict, mode: str, dropout: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One update from (input_ids, attention_mask); returns the loss, and the gradient's norm before clipping."""
    torch.manual_seed(0)
    teacher = load(job["teacher"], job["teacher_layer"], 0.0).eval().requires_grad_(False)
    student = load(job["student"], job["student_layer"], dropout).train()
    loss = loss_function(teacher, student, job["relation_heads"])
    if mode == "compile":  # max-autotune is no faster here (it has no templates for training on a CPU), a frozen teacher neither
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    parameters = list(student.parameters())
    optimizer, schedule = create_optimizer(parameters, job)

    def step(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        value = loss(input_ids, attention_mask)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, job["optimizer"]["clip_norm"])
        optimizer.step()
        schedule.step()
        return value.detach(), norm

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="One side of step_against_pytorch.py.")
    parser.add_argument("job", type=Path)
    parser.add_argument("--mode", choices=("eager", "compile"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    logging.disable_progress_bar()
    job = json.loads((options.job / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    arrays = np.load(options.job / ("padded.npz" if options.check else "full.npz"))
    batch = [torch.from_numpy(arrays[name]).long() for name in ("input_ids", "attention_mask")]
    step = create_step(job, options.mode, 0.0 if options.check else job["dropout"])
    if options.check:
        result = {"updates": [[float(value) for value in step(*batch)] for _ in range(3)]}
    else:
        result = measure(lambda: step(*batch), job)
    options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
