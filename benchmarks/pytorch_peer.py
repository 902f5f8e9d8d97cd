"""The same distillation step in PyTorch, as a good user of transformers would write it; `step_against_pytorch.py` runs it.

No work is left in that the loss does not need (teacher and student stop at the projections that it reads), nothing loops over
the batch, attention is SDPA, the optimizer is the fused one, and `compile` holds both models, the relations and the KL in one
graph. In bfloat16 the teacher's weights are cast once, the student's products are in autocast, relations' softmax in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
from timing import measure, peak_resident_bytes
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

# How torch.compile is called in each mode; None: not at all.
MODES = {"eager": None, "compile": {}, "max-autotune": {"mode": "max-autotune-no-cudagraphs"}}


class Vectors(nn.Module):
    """Some of the queries, keys and values of one layer: the blocks below it, and of the block itself their projections only."""

    def __init__(self, model: nn.Module, layer: int, kinds: list[str]):
        super().__init__()
        attention = model.encoder.layer[layer - 1].attention.self
        self.projections = nn.ModuleList(getattr(attention, kind) for kind in kinds)
        model.encoder.layer = model.encoder.layer[: layer - 1]
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return [projection(hidden) for projection in self.projections]


def load(job: dict, side: str, dropout: dict[str, float], dtype: torch.dtype) -> Vectors:
    rates = {"hidden_dropout_prob": dropout["hidden"], "attention_probs_dropout_prob": dropout["attention"]}
    model = AutoModel.from_pretrained(job[side], attn_implementation="sdpa", add_pooling_layer=False, dtype=dtype, **rates)
    return Vectors(model, job[f"{side}_layer"], list(job["weights"])).to(job["device"])


def log_relations(vectors: Tensor, bias: Tensor | None, num_relation_heads: int) -> Tensor:
    """log softmax(A A^T / sqrt(d)), [B, R, S, S]; the scale goes on the vectors, which are S / d times fewer than the scores."""
    batch, length, width = vectors.shape
    size = width // num_relation_heads
    heads = vectors.view(batch, length, num_relation_heads, size).transpose(1, 2)
    scores = ((heads * size**-0.5) @ heads.transpose(2, 3)).float()
    return torch.log_softmax(scores if bias is None else scores + bias, dim=-1)


def relation_kl(student: Tensor, teacher: Tensor, attention_mask: Tensor | None, num_relation_heads: int) -> Tensor:
    """Mean over real queries and relation heads of KL(teacher || student); mask None: every token is real."""
    real = torch.ones(student.shape[:2], device=student.device) if attention_mask is None else attention_mask.float()
    bias = None if attention_mask is None else (1.0 - real)[:, None, None, :] * torch.finfo(torch.float32).min
    with torch.no_grad():
        target = log_relations(teacher, bias, num_relation_heads)
    divergence = nn.functional.kl_div(log_relations(student, bias, num_relation_heads), target, reduction="none", log_target=True)
    return (divergence.sum(-1) * real[:, None, :]).sum() / (real.sum() * num_relation_heads)


def loss_function(teacher: Vectors, student: Vectors, job: dict) -> Callable[[Tensor, Tensor | None], Tensor]:
    weights, num_relation_heads = list(job["weights"].values()), job["relation_heads"]
    device, lower = torch.device(job["device"]).type, job["dtype"] == "bfloat16"

    def loss(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            targets = teacher(input_ids, attention_mask)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=lower):
            pairs = zip(weights, student(input_ids, attention_mask), targets, strict=True)
            return sum(weight * relation_kl(ours, target, attention_mask, num_relation_heads) for weight, ours, target in pairs)

    return loss


def create_optimizer(parameters: list[nn.Parameter], job: dict) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW that decays matrices only, and the schedule with warmup, neither of whose ends has a rate of 0."""
    options, steps = job["optimizer"], job["total_steps"]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (options["b1"], options["b2"])
    optimizer = torch.optim.AdamW(groups, lr=options["learning_rate"], betas=betas, eps=options["eps"], fused=True)
    warmup = max(round(options["warmup"] * steps), 1)

    def rate(done: int) -> float:
        progress = min(max(done + 1 - warmup, 0) / (steps - warmup + 1), 1.0)
        decayed = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + np.cos(np.pi * progress))}
        return min((done + 1) / warmup, float(decayed[options["schedule"]]))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def create_step(job: dict, mode: str, dropout: dict[str, float]) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """One update from (input_ids, attention_mask); returns the loss, and the gradient's norm before clipping."""
    torch.manual_seed(0)
    # Dropout by ATen's generator instead of Inductor's own is 8 % of the compiled step on a CPU; on a GPU Inductor's is the faster one.
    torch._inductor.config.fallback_random = job["device"] == "cpu"
    none = {"hidden": 0.0, "attention": 0.0}
    teacher = load(job, "teacher", none, getattr(torch, job["dtype"])).eval().requires_grad_(False)
    student = load(job, "student", dropout, torch.float32).train()
    loss = loss_function(teacher, student, job)
    if MODES[mode] is not None:  # on a CPU max-autotune is no faster (it has no templates for training there), a frozen teacher neither
        loss = torch.compile(loss, fullgraph=True, dynamic=False, **MODES[mode])
    parameters = list(student.parameters())
    optimizer, schedule = create_optimizer(parameters, job)

    def step(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        value = loss(input_ids, attention_mask)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, job["optimizer"]["clip_norm"] or float("inf"))
        optimizer.step()
        schedule.step()
        return value.detach(), norm

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="One side of step_against_pytorch.py.")
    parser.add_argument("job", type=Path)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--no-mask", action="store_true", help="tell the models that no row is padded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    logging.disable_progress_bar()
    job = json.loads((options.job / "job.json").read_text())
    if job["device"] == "cpu":
        torch.set_num_threads(job["threads"])
    arrays = np.load(options.job / ("padded.npz" if options.check else "full.npz"))
    ids, mask = (torch.from_numpy(arrays[name]).long().to(job["device"]) for name in ("input_ids", "attention_mask"))
    step = create_step(job, options.mode, {"hidden": 0.0, "attention": 0.0} if options.check else job["dropout"])
    if options.check:
        result = {"updates": [[float(value) for value in step(ids, mask)] for _ in range(3)]}
    else:
        result = measured(lambda: step(ids, None if options.no_mask else mask), job)
    options.out.write_text(json.dumps(result))


def measured(step: Callable[[], object], job: dict) -> dict:
    if job["device"] == "cpu":
        return measure(step, lambda: None, job) | {"memory": peak_resident_bytes()}
    result = measure(step, torch.cuda.synchronize, job, warmed_up=torch.cuda.reset_peak_memory_stats)
    return result | {"memory": torch.cuda.max_memory_allocated()}


if __name__ == "__main__":
    main()
