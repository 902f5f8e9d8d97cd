"""Which of the latencies that were measured stands for the models, and what it is of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxdistill.compare.entries import Entry

Setting = tuple[str, str, int, int]  # framework, device, batch size, length


def _setting(measurement: dict[str, Any]) -> Setting | None:
    try:
        return (str(measurement["framework"]), str(measurement["device"]), int(measurement["batch_size"]), int(measurement["length"]))
    except (KeyError, TypeError, ValueError):
        return None


def choose_setting(entries: Sequence[Entry]) -> Setting | None:
    """Of the settings that at least half as many models have as the commonest: CPU and batch 1, then JAX, then 128 tokens."""
    settings = (_setting(measurement) for entry in entries for measurement in entry.latency.get("measurements", []))
    counts = Counter(setting for setting in settings if setting)
    most = max(counts.values(), default=0)

    def rank(setting: Setting) -> tuple:
        framework, device, batch_size, length = setting
        cpu = device.lower().startswith("cpu") and batch_size == 1
        return 2 * counts[setting] >= most, cpu, framework == "jax", counts[setting], -abs(length - 128), setting

    return max(counts, key=rank, default=None)


def milliseconds(entry: Entry, setting: Setting | None) -> tuple[float, float | None] | None:
    """Mean and deviation of one batch."""
    for measurement in entry.latency.get("measurements", []):
        if setting and _setting(measurement) == setting and isinstance(measurement.get("mean_seconds"), (int, float)):
            deviation = measurement.get("deviation_seconds")
            return 1000 * measurement["mean_seconds"], None if deviation is None else 1000 * deviation
    return None


def setting_title(setting: Setting) -> str:
    framework, device, batch_size, length = setting
    return f"{ {'jax': 'JAX', 'pytorch': 'PyTorch'}.get(framework, framework) }, {device}, batch {batch_size}, {length} tokens"
