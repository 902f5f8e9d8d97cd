"""Which of the latencies that were measured stands for the models, and what it is of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxdistill.compare.entries import Entry

Setting = tuple[str, str, int, int, str, int]  # framework, device, batch size, length, dtype, threads


def _settings(entry: Entry) -> list[tuple[Setting, dict[str, Any]]]:
    found = []
    for each in entry.latency.get("measurements", []):
        try:
            setting = (str(each["framework"]), str(each["device"]), int(each["batch_size"]), int(each["length"]))
        except (KeyError, TypeError, ValueError):
            continue
        dtype = str(each.get("dtype") or entry.latency.get("dtype") or "float32")
        found.append(((*setting, dtype, int(each.get("threads") or 0)), each))
    return found


def choose_setting(entries: Sequence[Entry]) -> Setting | None:
    """Of the settings that at least half as many models have as the commonest: CPU and batch 1, then JAX, then 128 tokens."""
    counts = Counter(setting for entry in entries for setting, _ in _settings(entry))
    most = max(counts.values(), default=0)

    def rank(setting: Setting) -> tuple:
        framework, device, batch_size, length, *_ = setting
        cpu = device.lower().startswith("cpu") and batch_size == 1
        return 2 * counts[setting] >= most, cpu, framework == "jax", counts[setting], -abs(length - 128), setting

    return max(counts, key=rank, default=None)


def milliseconds(entry: Entry, setting: Setting | None) -> tuple[float, float | None] | None:
    """Mean and deviation of one batch."""
    for own, measurement in _settings(entry):
        if own == setting and isinstance(measurement.get("mean_seconds"), (int, float)):
            deviation = measurement.get("deviation_seconds")
            return 1000 * measurement["mean_seconds"], None if deviation is None else 1000 * deviation
    return None


def setting_title(setting: Setting) -> str:
    framework, device, batch_size, length, dtype, threads = setting
    title = f"{ {'jax': 'JAX', 'pytorch': 'PyTorch'}.get(framework, framework) }, {device}, batch {batch_size}, {length} tokens, {dtype}"
    return title + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")
