"""Which implementation computes what in the step of a run, and whether those that the config forces can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxdistill.config import Config, KernelsConfig
from jaxdistill.errors import InputError
from jaxdistill.kernels import relations_kernel
from jaxdistill.models import attention_kernel, not_fused
from jaxdistill.train_step import StepSettings
from jaxdistill.update import Student


def fuses_attention(device) -> bool:
    """False for a GPU that cuDNN's fused attention does not run on: older than Ampere, or not NVIDIA's, whose kind is no number."""
    try:
        return device.platform != "gpu" or float(device.compute_capability) >= 8.0
    except (AttributeError, ValueError):
        return False


def without_cudnn(kernels: KernelsConfig) -> tuple[KernelsConfig, tuple[str, ...]]:
    """What "auto" is on such a GPU, with a warning for what it changes."""
    found = {"attention": "plain", "relations": "attend"}
    found = {field: name for field, name in found.items() if getattr(kernels, field) == "auto"}
    why = "cuDNN's attention needs an NVIDIA GPU of Ampere or newer (compute capability 8.0)"
    return kernels.model_copy(update=found), tuple(f"kernels.{field}: {name}, for {why}" for field, name in found.items())


def check_attention(settings: StepSettings, config: Config, students: Sequence[Student], where: str) -> list[str]:
    """A warning for each student that trains without the fused attention that its device has, for its dropout.

    Raises:
      InputError: a fused attention is forced where it cannot be.
    """
    warnings, kernels = [], settings.kernels
    for place, encoder, drops in _encoders(settings, students):
        job = encoder, settings.dtype, config.data.sequence_length
        place = place if place == "teacher" else f"{where}.{place}"
        if kernels.attention in ("cudnn", "splash") and (reason := not_fused(kernels.attention, kernels, *job, dropout=drops)):
            raise InputError(f"kernels.attention: {place}: {reason}")
        fused = attention_kernel(kernels, *job, dropout=False)
        if fused != attention_kernel(kernels, *job, dropout=drops):
            reason = not_fused(fused, kernels, *job, dropout=drops)
            warnings.append(f"{place}: its attention is computed plainly, which is slower and takes more memory: {reason}")
    return warnings


def relations_of(student: Student, settings: StepSettings, config: Config, mesh: Mapping[str, int]) -> dict[str, str]:
    """Term -> the implementation of its relation or attention KL.

    Raises:
      InputError: the one that kernels.relations forces cannot compute it.
    """
    names = {}
    for term in (term for term in student.terms if term.relation_heads):
        pieces = mesh["tensor"] if term.relation_heads % mesh["tensor"] == 0 else 1
        heads, widths = term.relation_heads // pieces, (student.config.hidden_size // pieces, settings.teacher.hidden_size // pieces)
        names[term.name] = relations_kernel(settings.kernels, config.data.sequence_length, *widths, heads, settings.dtype)
    return names


def chosen(
    settings: StepSettings, config: Config, students: Sequence[Student], mesh: Mapping[str, int]
) -> list[tuple[str, str, dict[str, str]]]:
    """(field of `kernels`, what the config says, what it comes to for each encoder or student and term that has it)."""
    length = config.data.sequence_length
    attention = {
        place: attention_kernel(settings.kernels, encoder, settings.dtype, length, dropout=drops)
        for place, encoder, drops in _encoders(settings, students)
    }
    relations = {f"{s.name}/{term}": name for s in students for term, name in relations_of(s, settings, config, mesh).items()}
    squares = "plain" if settings.kernels.relations == "plain" else "head blocks" if settings.packing else "Gram matrices"
    relations |= {f"{s.name}/{t.name}": squares for s in students for t in s.terms if t.kind in ("relation_mse", "attention_mse")}
    logits = "plain" if settings.kernels.logits == "plain" else "blocks"
    vocabulary = {f"{s.name}/{t.name}": logits for s in students for t in s.terms if t.kind in ("output_kl", "mlm_cross_entropy")}
    found = {"attention": attention, "relations": relations, "logits": vocabulary}
    return [(field, getattr(config.kernels, field), names) for field, names in found.items()]


def _encoders(settings: StepSettings, students: Sequence[Student]):
    """(name, shape, whether it drops attention weights in training)."""
    yield "teacher", settings.teacher, False
    for student in students:
        yield student.name, student.config, student.config.attention_dropout > 0
