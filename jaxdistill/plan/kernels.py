"""Which implementation computes what on the devices of a plan, and what "auto" made of it."""

from __future__ import annotations

from collections.abc import Callable

from jaxdistill.resolve import Run


def _attention(run: Run) -> str:
    return "plain"


def _relations(run: Run) -> str:
    return "blocks of relation heads"


def _logits(run: Run) -> str:
    return "plain"


# Field of `kernels` in the config -> what it comes to for a run: asks the same function as the kernel itself.
CHOSEN: dict[str, Callable[[Run], str]] = {"attention": _attention, "relations": _relations, "logits": _logits}


def chosen_kernels(run: Run) -> list[tuple[str, str, str]]:
    """(what, as the config says, as it is computed) for every choice."""
    said = run.config.kernels
    return [(name, getattr(said, name), choose(run)) for name, choose in CHOSEN.items()]
