"""The accelerators that a run can be planned for, as numbers.

Sources. TPU: Google Cloud's pages on v4, v5e, v5p, v6e and TPU7x; `memory` is what libtpu 0.0.42's compiler itself allows a
program; `clock` the frequency at which its matrix units reach the published peak. GPU: NVIDIA's data sheets (bfloat16 without
sparsity), for the chip's parts its architecture whitepapers and CUDA's table of compute capabilities. Bandwidth between chips
is one way, all links of a chip together: half of what both vendors publish as bidirectional.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Multiprocessors:
    """What XLA's compiler for GPUs wants to know of a chip beside bandwidth and memory. Bytes, and counts per multiprocessor."""

    count: int
    capability: tuple[int, int]
    lanes: int  # float32 units
    threads: int
    shared_memory: int
    l2_cache: int


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: of a TPU7x that is half a chip, of the others a whole one."""

    name: str
    platform: str  # "tpu" or "gpu"
    flops: float  # peak bfloat16 operations per second, a multiply-add being 2
    memory: float  # bytes that a program may have
    bandwidth: float  # of its memory, bytes per second
    interconnect: float  # bytes per second that it can send to other chips
    clock: float | None  # Hz; of a TPU for the compiler's cycles, None where it is not published
    devices_per_chip: int = 1
    dimensions: int = 0  # of a TPU's torus
    multiprocessors: Multiprocessors | None = None


def _tpu(name, flops, memory, bandwidth, interconnect, clock, dimensions, devices_per_chip=1) -> Chip:
    return Chip(name, "tpu", flops, memory * GIB, bandwidth, interconnect, clock, devices_per_chip, dimensions)


def _gpu(name, flops, memory, bandwidth, interconnect, clock, *parts) -> Chip:
    return Chip(name, "gpu", flops, memory, bandwidth, interconnect, clock, multiprocessors=Multiprocessors(*parts))


_KIB, _MIB = 2**10, 2**20
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275e12, 30.75, 1.228e12, 300e9, 1.05e9, 3),
        _tpu("v5e", 197e12, 15.75, 0.819e12, 200e9, 1.5e9, 2),
        _tpu("v5p", 459e12, 95.74, 2.765e12, 600e9, 1.75e9, 3),
        _tpu("v6e", 918e12, 31.25, 1.638e12, 400e9, 1.75e9, 2),
        _tpu("tpu7x", 2307e12 / 2, 94.75, 7.38e12 / 2, 600e9 / 2, None, 3, 2),
        _gpu("l4", 121e12, 24.0e9, 0.3e12, 32e9, 2.04e9, 58, (8, 9), 128, 1536, 100 * _KIB, 48 * _MIB),
        _gpu("a100-40", 312e12, 42.4e9, 1.555e12, 300e9, 1.41e9, 108, (8, 0), 64, 2048, 164 * _KIB, 40 * _MIB),
        _gpu("a100", 312e12, 85.1e9, 2.039e12, 300e9, 1.41e9, 108, (8, 0), 64, 2048, 164 * _KIB, 40 * _MIB),
        _gpu("h100", 989e12, 84.9e9, 3.35e12, 450e9, 1.98e9, 132, (9, 0), 128, 2048, 228 * _KIB, 50 * _MIB),
        _gpu("h200", 989e12, 150.7e9, 4.8e12, 450e9, 1.98e9, 132, (9, 0), 128, 2048, 228 * _KIB, 60 * _MIB),
        _gpu("b200", 2250e12, 191.5e9, 7.7e12, 900e9, 1.965e9, 148, (10, 0), 128, 2048, 228 * _KIB, 126 * _MIB),
    )
}
ALIASES = {"a100-80": "a100", "v5litepod": "v5e", "v7x": "tpu7x"}
GPU_SHARE = 0.75  # of its memory that JAX reserves and uses by default (XLA_PYTHON_CLIENT_MEM_FRACTION)


def usable_memory(chip: Chip) -> float:
    """Bytes that a program has on this chip with JAX's defaults."""
    return chip.memory * (GPU_SHARE if chip.platform == "gpu" else 1.0)


def target_config(chip: Chip) -> str:
    """The chip as XLA's GPU compiler reads it (a GpuTargetConfigProto as text), cuDNN 9.12 beside it."""
    parts = chip.multiprocessors
    assert parts is not None, f"{chip.name} is no GPU"
    major, minor = parts.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * _KIB,
        "shared_memory_per_block_optin": parts.shared_memory - _KIB,
        "shared_memory_per_core": parts.shared_memory,
        "threads_per_core_limit": parts.threads,
        "core_count": parts.count,
        "fpus_per_core": parts.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": parts.l2_cache,
        "clock_rate_ghz": chip.clock / 1e9,
        "device_memory_size": int(chip.memory),
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    described = f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 12 }}\ndevice_description_str: "NVIDIA {chip.name.upper()}"\n'
    return "\n".join(["gpu_device_info {", *lines, "}", described])
