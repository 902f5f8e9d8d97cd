"""By formula: the roofline worked out by hand, the largest batch by a made-up compiler."""

from __future__ import annotations

import pytest

from jaxdistill.plan.chips import CHIPS, Chip, Multiprocessors
from jaxdistill.plan.compiled import largest_batch, rows_per_device, with_rows
from jaxdistill.plan.estimate import (
    argument_bytes,
    flops_per_token,
    hours,
    interconnect_traffic,
    peak_flops,
    roofline,
    state_traffic,
    tokens_per_step,
)

ROUND = Chip("round", "tpu", flops=1e12, memory=1e9, bandwidth=1e11, interconnect=1e10, clock=1e9, dimensions=2)


def test_the_roofline_by_hand(planned):
    run = planned(platform="tpu")
    assert run.config.training.precision == "bfloat16"
    assert tokens_per_step(run) == 64 * 64
    # Blocks of width 64, inner 256, at length 64. Teacher: two whole blocks and the projections of three kinds.
    block = 4 * 2 * 64 * 64 + 4 * 64 * 64 + 2 * 2 * 64 * 256
    assert flops_per_token(run)["teacher"] == 2 * block + 3 * 2 * 64 * 64
    students = 3 * (block + 3 * 2 * 64 * 64)
    assert flops_per_token(run)["small"] > students  # and the losses
    whole = sum(flops_per_token(run).values()) * 4096 / 8
    best = roofline(run, ROUND)
    assert best.compute == pytest.approx(whole / 1e12)
    assert best.memory == pytest.approx(state_traffic(run) / 1e11)
    own = argument_bytes(run)["students' parameters"]
    assert interconnect_traffic(run) == pytest.approx(2 * own * 7 / 8)
    assert best.interconnect == pytest.approx(2 * own * 7 / 8 / 1e10)
    told = roofline(run, ROUND, sent=1e9)
    assert (told.memory, told.interconnect, told.bound, told.seconds) == (best.memory, 0.1, "interconnect", 0.1)
    assert hours(run, 36.0) == 1.0  # 100 steps


def test_what_stays_on_a_device(planned):
    whole, split = argument_bytes(planned(devices=1)), argument_bytes(planned("mesh={data: 1, fsdp: 8}"))
    assert whole["optimizer"] == 2 * whole["students' parameters"] + 8  # two moments, two counters
    assert split["students' parameters"] < 0.2 * whole["students' parameters"]
    half = argument_bytes(planned(platform="tpu", devices=1))
    assert half["students' parameters"] == whole["students' parameters"]
    assert 0.5 < half["teacher"] / whole["teacher"] < 0.55  # its matrices in bfloat16


def test_traffic_of_fsdp_and_tensor(planned):
    fsdp = planned("mesh={data: 1, fsdp: 8}", platform="tpu")
    found = argument_bytes(fsdp)
    assert interconnect_traffic(fsdp) == 7 * (3 * found["students' parameters"] + found["teacher"])
    tensor = planned("mesh={data: 1, tensor: 4}", devices=4, platform="tpu")
    activations = 64 * 64 * 64 * 2  # tokens x width x bytes
    assert interconnect_traffic(tensor) == pytest.approx(2 * 3 / 4 * activations * (4 * 2 + 2 * 3))


def test_peaks_of_float32():
    assert peak_flops(CHIPS["v5e"], "float32") == CHIPS["v5e"].flops / 6
    assert peak_flops(CHIPS["a100"], "float32") == pytest.approx(19.5e12, rel=2e-3)  # as its data sheet says
    assert isinstance(CHIPS["a100"].multiprocessors, Multiprocessors)


def test_rows_of_a_device(planned):
    run = planned("training.micro_batches=2", "mesh={data: 2, fsdp: 2, tensor: 2}")
    assert rows_per_device(run) == 64 // (2 * 2 * 2)
    assert with_rows(run, 3).config.training.batch_size == 24


def compiler(limit: float, slope: float = 10.0, fixed: float = 100.0, curve: float = 0.0):
    """Bytes of so many rows, and the sizes that were asked for; refuses what needs over twice the limit."""
    asked = []

    def need(rows: int) -> float | None:
        asked.append(rows)
        size = fixed + slope * rows + curve * rows**2
        return size if size <= 2 * limit else None

    return need, asked


def test_the_largest_batch():
    need, asked = compiler(limit=1000)
    found = largest_batch(need, 16, 1000)
    assert found.rows == 88 and asked == [16, 8, 88]  # (1000 - 100) / 10 = 90, in eights
    need, asked = compiler(limit=1000, curve=0.2)  # more than the line says
    found = largest_batch(need, 16, 1000)
    assert need(found.rows) <= 1000 and asked[2] > found.rows and len(set(asked)) == len(asked) - 1
    need, asked = compiler(limit=1000)
    assert largest_batch(need, 640, 1000).rows == 88  # the config's own does not fit
    assert asked[0] == 640 and 88 in asked
    asked = []

    def hidden(rows: int) -> float | None:  # what is alive at another time hides the activations of a small batch
        asked.append(rows)
        size = max(300.0, 10.0 * rows) + 100
        return size if size <= 5000 else None

    assert largest_batch(hidden, 16, 4000).rows == 384 and asked[:3] == [16, 8, 256]  # 390, in eights
    need, asked = compiler(limit=50)
    assert largest_batch(need, 4, 50).rows is None
    assert asked == [4, 1]
