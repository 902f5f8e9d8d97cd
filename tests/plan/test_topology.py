"""Names of topologies, the chips behind them, and how they are described to a compiler."""

from __future__ import annotations

import pytest

from jaxdistill.errors import InputError
from jaxdistill.plan import parse_topology
from jaxdistill.plan.chips import CHIPS, target_config, usable_memory


@pytest.mark.parametrize(
    ("name", "told", "devices", "platform"),
    [
        ("v5e:16x16", "v5e:16x16", 256, "tpu"),
        ("V6E:4x4", "v6e:4x4", 16, "tpu"),
        ("v5p:4x4x4", "v5p:4x4x4", 64, "tpu"),
        ("v5e:1x1", "v5e:1x1", 1, "tpu"),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8, "tpu"),  # two devices a chip
        ("h200x8", "h200x8", 8, "gpu"),
        ("h200", "h200x1", 1, "gpu"),
        ("a100-40x4", "a100-40x4", 4, "gpu"),
        ("a100-80x2", "a100x2", 2, "gpu"),
        ("l4", "l4x1", 1, "gpu"),
    ],
)
def test_names(name, told, devices, platform):
    found = parse_topology(name)
    assert (found.name, found.num_devices, found.chip.platform) == (told, devices, platform)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5:4x4", ["unknown chip in 'v5:4x4'", "did you mean 'v5"]),
        ("h20x8", ["unknown chip", "did you mean 'h200'"]),
        ("4x4", ["unknown chip"]),
        ("", ["unknown chip", "known: a100"]),
        ("v5e", ["a v5e is a torus of 2 dimensions, as in v5e:4x4"]),
        ("v5p:4x4", ["torus of 3 dimensions, as in v5p:4x4x4"]),
        ("v5ex8", ["torus of 2 dimensions"]),
        ("v5e:0x4", ["torus of 2 dimensions"]),
        ("v5e:3x4", ["2 x 2 chips"]),
        ("h200:2x4", ["say how many, as in h200x8"]),
        ("h200x0", ["say how many"]),
    ],
)
def test_refused(name, parts):
    with pytest.raises(InputError, match=r"^--topology: ") as refused:
        parse_topology(name)
    for part in parts:
        assert part in str(refused.value)


def test_peaks_are_what_the_units_give():
    """A v5e has four matrix units of 128 x 128, a v4 and v5p eight; a multiply-add a cycle each."""
    for name, units in (("v5e", 4), ("v4", 8), ("v5p", 8)):
        chip = CHIPS[name]
        assert chip.flops == pytest.approx(units * 128 * 128 * 2 * chip.clock, rel=3e-3)
    assert usable_memory(CHIPS["h200"]) == 0.75 * CHIPS["h200"].memory
    assert usable_memory(CHIPS["v5e"]) == 15.75 * 2**30


def test_description_of_a_gpu():
    text = target_config(CHIPS["h200"])
    for line in ("core_count: 132", "shared_memory_per_block_optin: 232448", "l2_cache_size: 62914560", "clock_rate_ghz: 1.98",
                 "cuda_compute_capability { major: 9 minor: 0 }", 'platform_name: "CUDA"', "memory_bandwidth: 4800000000000"):  # fmt: skip
        assert line in text
    assert text.count("{") == text.count("}")
