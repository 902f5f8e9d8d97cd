"""How long a forward pass takes: one example and batches, in JAX and in PyTorch, on the CPU and on an accelerator where there is one.

The encoder alone up to its last hidden state, every slot a real token. What is timed is a call from the host until its result
is there, on the device; compiling, the first passes and the transfer of the token ids are not in it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import InputError, nearest
from jaxdistill.features import Feature
from jaxdistill.flops import forward_flops_per_token
from jaxdistill.models import EncoderConfig, find_model, forward, load_config, load_pretrained, num_parameters
from jaxdistill.report import print_table, summary_table
from jaxdistill.results import check_same_model, describe_model, find_models, read_result, result_file, update_section

FRAMEWORKS = ("jax", "pytorch")
DTYPES = ("float32", "bfloat16", "float16")
SHORTEST_RUN = 0.2  # seconds: a single pass of a small student is near the noise of the clock and the scheduler
WARM_UP_PASSES = 3
COLUMNS = (
    "model", "framework", "device", "batch", "parameters (M)", "GFLOPs an example", "weights (MB)", "beside them (MB)", "ms", "+- ms",
    "examples/s", "speed",
)  # fmt: skip


@dataclass
class Model:
    """A model to measure, and what was measured."""

    name: str
    source: str
    folder: Path
    config: EncoderConfig
    description: dict[str, Any]
    measurements: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Pass:
    """A forward pass, ready to be called. `memory`: bytes beside weights and input, None where nothing tells."""

    model: Model
    run: Callable[[], Any]
    device: str
    threads: int | None
    memory: Callable[[], int | None]
    seconds: list[float] = field(default_factory=list)


def latency(
    models: Sequence[str],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    length: int = 128,
    repeats: int = 5,
    frameworks: Sequence[str] = (),
    dtype: str = "float32",
    results: str | Path = "results",
) -> dict[str, dict[str, Any]]:
    """Measure, print a table, and write the section "latency" of each model's results; returns it by the model's name.

    A run is as many passes as fill 0.2 s, its value the seconds of one; the runs of all models take turns, so that a drift of the
    machine meets all of them. Mean and standard deviation (of the sample) are over the runs.

    Args:
      models: what `results.find_models` reads; the first one is what the others' speed is relative to.
      frameworks: of "jax" and "pytorch"; none: both, where PyTorch is installed.
      dtype: of the weights and of the products.

    Raises:
      InputError: a model, number or framework that cannot be measured; before anything is.
    """
    chosen = _chosen_frameworks(frameworks)
    _check_numbers(batch_sizes, length, repeats, dtype)
    found = _check_models(find_models(models), length, Path(results))
    for framework in chosen:
        for passes, batch_size in _PASSES[framework](found, tuple(dict.fromkeys(batch_sizes)), length, dtype):
            _measure(passes, repeats)
            for each in passes:
                each.model.measurements.append(_measurement(each, framework, batch_size, length) | {"dtype": dtype})
    sections = {model.name: _section(model, length, dtype, chosen) for model in found}
    for model in found:
        update_section(Path(results), model.name, model.description, "latency", partial(_beside, sections[model.name]))
    print_table(summary_table(_rows(found, sections), COLUMNS, f"A forward pass of {length} tokens, {dtype}, mean of {repeats} runs"))
    return sections


def _chosen_frameworks(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in FRAMEWORKS:
            raise InputError(f"--framework: unknown framework {name!r}{nearest(name, FRAMEWORKS)}")
    if "pytorch" in names and find_spec("torch") is None:
        raise InputError("--framework: PyTorch is not installed here; pip install torch, or measure jax alone")
    return tuple(dict.fromkeys(names)) or (FRAMEWORKS if find_spec("torch") else ("jax",))


def _check_numbers(batch_sizes: Sequence[int], length: int, repeats: int, dtype: str) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"--batch-size: at least 1, got {min(batch_sizes, default='none')}")
    if length < 1:
        raise InputError(f"--length: at least 1 token, got {length}")
    if repeats < 2:
        raise InputError(f"--repeats: a standard deviation takes at least 2 runs, got {repeats}")
    if dtype not in DTYPES:
        raise InputError(f"--dtype: unknown type {dtype!r}{nearest(dtype, DTYPES)}")


def _check_models(named: dict[str, str], length: int, results: Path) -> list[Model]:
    found = []
    for name, source in named.items():
        folder = find_model(source)
        config = load_config(folder)
        if length > config.max_sequence_length:
            raise InputError(f"--length: {length} is over the {config.max_sequence_length} positions of {name}")
        load_pretrained(folder)  # a damaged file is found before an hour of measuring, not after it
        found.append(Model(name, source, folder, config, describe_model(source)))
        file = result_file(results, name)
        if file.exists():
            check_same_model(read_result(file), found[-1].description, file)
    return found


def example_batch(config: EncoderConfig, batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, attention_mask) [B, S] int32: tokens drawn evenly from the vocabulary, no padding."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size - 1, (batch_size, length))
    return (ids + (ids >= config.pad_token_id)).astype(np.int32), np.ones_like(ids, np.int32)


def _devices() -> list[jax.Device]:
    """The CPU, and an accelerator where jax has one; with JAX_PLATFORMS set, what it names."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        return [first]
    try:
        return [jax.devices("cpu")[0], first]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return [first]


def _encode(config: EncoderConfig, dtype: str, params: dict, ids, mask) -> jax.Array:
    last = Feature("hidden", config.num_layers)
    return forward(config, params, ids, mask, features=frozenset([last]), dtype=jnp.dtype(dtype))[last]


def _jax_passes(models: list[Model], batch_sizes: Sequence[int], length: int, dtype: str) -> Iterator[tuple[list[Pass], int]]:
    for device in _devices():
        weights = {}
        for model in models:
            params = load_pretrained(model.folder)[1]
            encoder = {part: params[part] for part in ("embeddings", "layers")}
            weights[model.name] = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), encoder), device)
        for batch_size in batch_sizes:
            yield [_jax_pass(model, weights[model.name], device, batch_size, length, dtype) for model in models], batch_size


def _jax_pass(model: Model, params: dict, device: jax.Device, batch_size: int, length: int, dtype: str) -> Pass:
    inputs = jax.device_put(example_batch(model.config, batch_size, length), device)
    compiled = jax.jit(partial(_encode, model.config, dtype)).lower(params, *inputs).compile()
    analysis = compiled.memory_analysis()  # None where a backend has none
    memory = None if analysis is None else int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
    is_cpu = device.platform == "cpu"
    return Pass(
        model=model,
        run=lambda: compiled(params, *inputs).block_until_ready(),
        device="cpu" if is_cpu else device.device_kind,
        threads=_usable_cores() if is_cpu else None,
        memory=lambda: memory,
    )


def _usable_cores() -> int:
    """The threads that XLA's CPU backend takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_passes(models: list[Model], batch_sizes: Sequence[int], length: int, dtype: str) -> Iterator[tuple[list[Pass], int]]:
    import torch
    from transformers import AutoModel, logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # of an MLM folder it would list the head's weights, which are left out on purpose
    logging.disable_progress_bar()
    loaded = {}
    for model in models:
        options = {"add_pooling_layer": False, "attn_implementation": "sdpa", "dtype": getattr(torch, dtype), "local_files_only": True}
        place = str(model.folder)
        loaded[model.name] = AutoModel.from_pretrained(place, trust_remote_code=False, use_safetensors=True, **options).eval()
    logging.set_verbosity(verbosity)
    if shows_progress:
        logging.enable_progress_bar()

    def one(model: Model, device: str, batch_size: int) -> Pass:
        module = loaded[model.name].to(device)
        ids, mask = (torch.tensor(x).long().to(device) for x in example_batch(model.config, batch_size, length))
        is_cpu = device == "cpu"

        def run():
            with torch.inference_mode():
                hidden = module(input_ids=ids, attention_mask=mask).last_hidden_state
            if not is_cpu:
                torch.cuda.synchronize()
            return hidden

        def memory() -> int | None:
            if is_cpu:
                return None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() - before

        name = "cpu" if is_cpu else torch.cuda.get_device_name()
        return Pass(model, run, name, torch.get_num_threads() if is_cpu else None, memory)

    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for batch_size in batch_sizes:
            yield [one(model, device, batch_size) for model in models], batch_size


_PASSES = {"jax": _jax_passes, "pytorch": _torch_passes}


def _measure(passes: list[Pass], repeats: int) -> None:
    for each in passes:
        for _ in range(WARM_UP_PASSES):
            each.run()
    for _ in range(repeats):
        for each in passes:
            each.seconds.append(seconds_per_call(each.run))


def seconds_per_call(run: Callable[[], Any], shortest: float | None = None) -> float:
    """Calls `run` until `shortest` seconds (default: SHORTEST_RUN) have passed; the seconds of one call."""
    shortest, calls, start = SHORTEST_RUN if shortest is None else shortest, 0, time.perf_counter()
    while True:
        run()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= shortest:
            return elapsed / calls


def _measurement(measured: Pass, framework: str, batch_size: int, length: int) -> dict[str, Any]:
    mean = float(np.mean(measured.seconds))
    return {
        "framework": framework,
        "device": measured.device,
        "threads": measured.threads,
        "batch_size": batch_size,
        "length": length,
        "repeats": len(measured.seconds),
        "mean_seconds": mean,
        "deviation_seconds": float(np.std(measured.seconds, ddof=1)),
        "examples_per_second": batch_size / mean,
        "memory_bytes": measured.memory(),
    }


def _section(model: Model, length: int, dtype: str, frameworks: Iterable[str]) -> dict[str, Any]:
    features = [Feature("hidden", model.config.num_layers)]
    packages = ["jaxdistill", "jax", "jaxlib", *(["torch", "transformers"] if "pytorch" in frameworks else [])]
    return {
        "parameters": num_parameters(model.config),
        "flops_per_example": length * forward_flops_per_token(model.config, length, features),
        "weights_bytes": num_parameters(model.config) * jnp.dtype(dtype).itemsize,
        "dtype": dtype,
        "processor": _processor(),
        "measurements": model.measurements,
        "versions": {name: _version(name) for name in packages},
    }


_SETTING = ("framework", "device", "threads", "batch_size", "length", "dtype")


def _beside(section: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """The section with what was measured before on the same processor under other settings."""
    if before is None or before.get("processor") != section["processor"]:
        return section
    now = {tuple(each[name] for name in _SETTING) for each in section["measurements"]}
    kept = [each for each in before["measurements"] if tuple(each.get(name) for name in _SETTING) not in now]
    return section | {"measurements": [*kept, *section["measurements"]]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return None


def _processor() -> str:
    """The CPU's name: a latency means nothing without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _rows(models: list[Model], sections: dict[str, dict]) -> Iterator[tuple[str, ...]]:
    """The table, one block for each framework, device and batch size; speed is relative to the first model of the block."""
    for measured in zip(*(model.measurements for model in models), strict=True):
        for model, one in zip(models, measured, strict=True):
            section = sections[model.name]
            yield (
                model.name,
                one["framework"],
                one["device"] if one["threads"] is None else f"{one['device']}, {one['threads']} threads",
                str(one["batch_size"]),
                f"{section['parameters'] / 1e6:.1f}",
                f"{section['flops_per_example'] / 1e9:.2f}",
                f"{section['weights_bytes'] / 1e6:.0f}",
                "-" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 1e6:.1f}",
                f"{1000 * one['mean_seconds']:.2f}",
                f"{1000 * one['deviation_seconds']:.2f}",
                f"{one['examples_per_second']:.1f}",
                f"{measured[0]['mean_seconds'] / one['mean_seconds']:.2f}x",
            )
