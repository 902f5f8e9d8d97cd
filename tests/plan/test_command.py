"""`jaxdistill plan` on a machine without libtpu and CUDA, as the suite's; and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest
import yaml
from commands import command, finish

from jaxdistill.plan import topology
from jaxdistill.plan.plan import plan_run, show_plan
from jaxdistill.plan.tables import scaling_line


@pytest.fixture
def config(plan_fields, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plan_fields | {"output": str(tmp_path / "run")}))
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    """As where neither extra is installed."""
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    cache = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h200x8", "cuda13")])
def test_without_its_compiler_by_formula(cli, config, no_compiler, tmp_path, name, extra):
    code, out, err = cli("plan", config, "--topology", name, "training.batch_size=256")
    assert code == 0, err
    assert f"pip install 'jaxdistill[{extra}]'" in out
    assert f"Plan for {name}" in out and "bfloat16" in out
    for part in ("students' parameters", "Roofline of a", "tokens/s", "hours", "relations", "by formula"):
        assert part in out
    assert "Collectives" not in out
    assert not (tmp_path / "run").exists()


def test_in_a_process_of_its_own_with_one_device(config):
    code, out, err = finish(command("plan", config, "--topology", "v5p:2x2x2", "--no-compile"))
    assert code == 0, err
    assert "8 devices as data 8" in out and "as asked for" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--topology", "v5f:4x4"], ["--topology", "v5f:4x4", "did you mean 'v5"]),
        (["--topology", "v5e:4x4", "mesh={data: 8}"], ["mesh:", "16 devices"]),
        (["--topology", "v5e:4x4", "training.batch_size=24"], ["training.batch_size: 24 rows", "16 would"]),
        (["--topology", "h200x8", "--stage", "x"], ["--stage: no stage 'x'", "no stages"]),
        (["--topology", "h200x8", "training.stepps=3"], ["training.stepps: unknown field", "'steps'"]),
        (["--topology", "h200x8", "--student", "big"], ["big"]),
    ],
)
def test_refused(cli, config, no_compiler, words, parts):
    code, out, err = cli("plan", config, *words)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_stages_one_after_the_other_or_one_of_them(cli, plan_fields, no_compiler, tmp_path):
    path = tmp_path / "staged.yaml"
    stages = {"first": {}, "second": {"training": {"batch_size": 128}}}
    path.write_text(yaml.safe_dump(plan_fields | {"stages": stages}))
    code, out, _ = cli("plan", path, "--topology", "v5e:2x2")
    assert code == 0
    assert out.index("stage first") < out.index("stage second")
    code, out, _ = cli("plan", path, "--topology", "v5e:2x2", "--stage", "second")
    assert code == 0 and "stage first" not in out and "of 128 x 64" in out
    code, _, err = cli("plan", path, "--topology", "v5e:2x2", "--stage", "secnd")
    assert code == 2 and "did you mean 'second'" in err


def test_a_plan_of_a_compiled_step(planned, monkeypatch):
    """The whole of it with this machine's compiler in the place of a TPU's."""
    from rich.console import Console

    from jaxdistill.plan import parse_topology, plan

    monkeypatch.setattr(plan, "missing_compiler", lambda chip: None)
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices())
    found = plan_run(planned(), parse_topology("v5e:2x4"))
    assert found.compiled is not None and found.largest is not None
    assert len(found.largest.tried) >= 3 and found.largest.rows > 64 // 8
    assert found.best.interconnect == found.compiled.program.sent / 200e9
    console = Console(width=200)
    with console.capture() as captured:
        console.print(show_plan(found))
    text = captured.get()
    for part in ("temporaries", "all-reduce", "largest batch:", "training.batch_size=", "compiled in", "sizes in all"):
        assert part in text
    assert "resharding" not in text
    computing, sending = 2 * found.best.compute, found.best.interconnect  # no cycles on a CPU
    assert f"scaling: {100 * computing / (computing + sending):.1f} % of 8 single devices' speed" in text
    assert scaling_line(planned(devices=1), found.topology.chip, found.best, found.compiled) is None
