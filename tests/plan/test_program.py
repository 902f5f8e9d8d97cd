"""Compiled programs as text: trip counts, cycles, collectives with their bytes, what is resharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.config import MeshConfig
from jaxdistill.plan import compile_ahead
from jaxdistill.plan.ahead import abstract_arguments
from jaxdistill.plan.estimate import abstract_mesh, argument_bytes, device_bytes
from jaxdistill.plan.hlo import Array, read_module
from jaxdistill.plan.program import Collective, group_size, tally
from jaxdistill.plan.resharding import parameter_shapes, resharded
from jaxdistill.sharding import create_mesh

# A loop as the TPU's compiler prints it: without its trip count, the limit outside; a conditional; a fused reduce-scatter.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%body (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %one = s32[]{:T(128)} constant(2)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%p.1), index=1
  %twice = f32[8,128]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/teacher/mul"}, backend_config={"window_config":{"estimated_cycles":"100","other":"7"}}
  %sum.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%twice), channel_id=3, replica_groups=[2,2]<=[4], to_apply=%add
  %i.2 = s32[]{:T(128)} add(%i.1, %one)
  ROOT %t.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i.2, %sum.1)
}

%inner (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %m = f32[8,128]{1,0} add(%a, %a), backend_config={"estimated_cycles":"999"}
}

%condition (p.2: (s32[], f32[8,128])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(15)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.3, %limit), direction=LT
}

%all-reduce-scatter.1 (input: bf16[64,64]) -> bf16[16,64] {
  %input = bf16[64,64]{1,0} parameter(0)
  %all-reduce.9 = bf16[64,64]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[16,64]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,64}
}

%long (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %n = f32[8,128]{1,0} negate(%q), metadata={op_name="jit(f)/update/neg"}, backend_config={"estimated_cycles":"50"}
}

%short (r: f32[8,128]) -> f32[8,128] {
  ROOT %r = f32[8,128]{1,0} parameter(0)
}

ENTRY %main (x: f32[8,128], w: bf16[64,64]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = bf16[64,64]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(3)
  %start = s32[]{:T(128)} copy(%zero)
  %t.0 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%start, %x)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%t.0), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %scattered = bf16[16,64]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(f)/dot_general"}
  %kernel = f32[8,128]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", metadata={op_name="k"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"500"}}}
  %mark = f32[8,128]{1,0} custom-call(%y), custom_call_target="ConcatBitcast"
  %choice = s32[] constant(1)
  ROOT %out = f32[8,128]{1,0} conditional(%choice, %kernel, %mark), branch_computations={%long, %short}
}
"""  # noqa: E501


def test_a_tpu_program_by_hand():
    found = tally(TPU)
    # i = 3, 5, ..., 13: six rounds of 100 cycles; what is inside of a fusion is the fusion's; the longer branch.
    assert dict(found.cycles) == {"jit(f)/teacher/mul": 600.0, "jit(f)/update/neg": 50.0}
    assert found.unknown_loops == 0
    loop, scatter = sorted(found.collectives, key=lambda c: c.kind)
    assert (loop.kind, loop.group, loop.times, loop.bytes) == ("all-reduce", 2, 6, 8 * 128 * 4)
    assert loop.sent == 6 * 2 * (1 / 2) * 8 * 128 * 4
    assert (scatter.kind, scatter.group, scatter.times, scatter.bytes) == ("reduce-scatter", 4, 1, 64 * 64 * 2)
    assert scatter.sent == 3 / 4 * 64 * 64 * 2
    assert dict(found.kernels) == {"tpu_custom_call": 1} and found.kernel_costs == [(1000.0, 500.0, 7.0)] and found.silent_kernels == 0


def test_a_loop_of_unknown_length_is_counted_once_and_told():
    found = tally(TPU.replace("direction=LT", "direction=NE"))
    assert found.cycles["jit(f)/teacher/mul"] == 100.0
    assert found.unknown_loops == 1


def test_an_overlapped_collective_stands_in_several_fusions_and_counts_once():
    text = """HloModule m, num_partitions=4

%piece.1 (a: bf16[16,64]) -> bf16[64,64] {
  %a = bf16[16,64]{1,0} parameter(0)
  ROOT %g.1 = bf16[64,64]{1,0} all-gather(%a), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%piece.2 (b: bf16[16,64]) -> bf16[64,64] {
  %b = bf16[16,64]{1,0} parameter(0)
  ROOT %g.2 = bf16[64,64]{1,0} all-gather(%b), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (p: bf16[16,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %f.1 = bf16[64,64]{1,0} fusion(%p), kind=kCustom, calls=%piece.1
  ROOT %f.2 = bf16[64,64]{1,0} fusion(%p), kind=kCustom, calls=%piece.2
}
"""
    (gather,) = tally(text).collectives
    assert (gather.kind, gather.sent) == ("all-gather", 3 / 4 * 64 * 64 * 2)


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("%c = (bf16[4]{0}, f32[2,8]{1,0}) all-reduce(%a, %b), replica_groups={{0,1,2,3}}", "all-reduce", 1.5 * (8 + 64)),
        ("%c = (f32[4]{0}, f32[8]{0}) all-reduce-start(%a, %b), replica_groups={{0,1,2,3}}", "all-reduce", 1.5 * 48),
        ("%c = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4], dimensions={0}", "all-gather", 0.75 * 64),
        ("%c = ((f32[4], f32[2]), (f32[16], f32[8])) all-gather-start(%a, %b), replica_groups={}", "all-gather", 0.75 * 96),
        ("%c = f32[4]{0} reduce-scatter(%a), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add", "reduce-scatter", 0.75 * 64),
        ("%c = ((f32[16]), f32[4]) reduce-scatter-start(%a), replica_groups=[1,4]<=[4]", "reduce-scatter", 0.75 * 64),
        ("%c = (s8[8]{0}, s8[8]{0}) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}", "all-to-all", 0.5 * 16),
        ("%c = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}", "collective-permute", 16),
    ],
)
def test_bytes_that_a_device_sends(line, kind, sent):
    text = f"HloModule m, num_partitions=4\n\nENTRY %main (a: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} parameter(0)\n  {line}\n}}\n"
    (found,) = tally(text).collectives
    assert (found.kind, found.sent) == (kind, sent)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[2,4]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([4,2]T(1,0)) {'axis_0'}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("replica_groups={}", 8),
        ("to_apply=%add", 8),
    ],
)
def test_group_sizes(attributes, size):
    assert group_size(attributes, 8) == size


def test_types():
    module = read_module(
        "HloModule m\n\nENTRY %e (a: s4[3]) -> s4[3] {\n  ROOT %a = (s4[3]{0}, pred[2,5], token[], f8e4m3fn[7]) parameter(0)\n}\n"
    )
    assert [array.bytes for array in module.computations["e"]["a"].arrays] == [1.5, 10.0, 0.0, 7.0]


@pytest.mark.parametrize("length", [1, 7])
def test_trip_counts_of_a_compiled_scan(length):
    """With the compiler's own count, and without it from the loop itself; an all-reduce in the body tells."""
    mesh = create_mesh(MeshConfig())
    x = jax.ShapeDtypeStruct((8, 32, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    whole = NamedSharding(mesh, PartitionSpec())

    def f(x):
        def body(carry, _):
            summed = jax.lax.with_sharding_constraint(jnp.sum(x * carry[None], axis=0), whole)
            return jnp.tanh(summed), None

        return jax.lax.scan(body, jnp.ones((32, 64), jnp.float32), None, length=length, unroll=1)[0]

    text = jax.jit(f).lower(x).compile().as_text()
    for told in (text, text.replace("known_trip_count", "unknown")):
        found = tally(told)
        reduces = [c for c in found.collectives if c.kind == "all-reduce"]
        assert sum(c.times for c in reduces) == length
        assert found.sent == pytest.approx(length * 2 * 7 / 8 * 32 * 64 * 4)


def _collectives(run):
    compiled = compile_ahead(run, jax.devices())
    state, teacher, _ = abstract_arguments(run, abstract_mesh(run))
    shapes = parameter_shapes([student.trained for student in state.students.values()], teacher, length=run.config.data.sequence_length)
    found = tally(compiled.as_text())
    warnings = resharded(found.collectives, shapes, tensor=run.mesh["tensor"] > 1)
    return compiled, found, {c.kind for c in found.collectives if c.group > 1}, warnings


def test_data_parallel_sums_gradients_and_nothing_else(planned):
    run = planned()
    compiled, found, kinds, warnings = _collectives(run)
    assert kinds == {"all-reduce"}
    assert warnings == []
    parameters = argument_bytes(run)["students' parameters"]
    # What no loss reads of the last block has no gradient to sum.
    assert 0.5 * parameters < found.sent / (2 * 7 / 8) <= 1.01 * parameters
    # Nor is that part of the teacher's last block an argument of the program, though it stays on the devices.
    unread = sum(argument_bytes(run).values()) - compiled.memory_analysis().argument_size_in_bytes
    last = abstract_arguments(run, abstract_mesh(run))[1]["layers"]["03"]
    assert unread == device_bytes({name: last[name] for name in last if name not in ("query", "key", "value")})


@pytest.mark.parametrize("mesh", ["{data: 2, fsdp: 4}", "{data: 1, fsdp: 4, tensor: 2}", "{data: 2, tensor: 4}"])
def test_memory_by_formula_is_what_the_compiled_step_takes(planned, mesh):
    run = planned(f"mesh={mesh}", "objective=[{kind: hidden_mse}]")
    compiled, _, kinds, _ = _collectives(run)
    assert sum(argument_bytes(run).values()) == compiled.memory_analysis().argument_size_in_bytes
    assert "all-reduce" in kinds
    assert ("all-gather" in kinds) == (run.mesh["fsdp"] > 1)


def test_relations_add_no_memory(planned):
    """Of the real step: what a run takes against the same step without relations, where the plain form's matrices are most of it."""
    job = ("data.sequence_length=128", "objective.0.relation_heads=16")

    def temporaries(*overrides):
        return compile_ahead(planned(*job, *overrides, devices=1), jax.devices()[:1]).memory_analysis().temp_size_in_bytes

    without = temporaries("objective=[{kind: direct_mse, relation_heads: 16}]")
    assert temporaries() <= 1.05 * without
    assert temporaries("kernels.relations=plain") > 3 * without


def test_the_used_rows_of_a_position_table_are_a_parameters(planned):
    state, _, _ = abstract_arguments(run := planned(), abstract_mesh(run))
    trained = [student.trained for student in state.students.values()]
    assert (32, 64) in parameter_shapes(trained, length=32) - parameter_shapes(trained, length=128)


def test_warnings_name_what_is_laid_out_anew():
    parameters = {(64, 256), (16, 256), (128,)}
    weights = Collective("all-gather", (Array("f32", (256, 64)), Array("f32", (1, 256, 64))), 4, "")
    scattered = Collective("reduce-scatter", (Array("f32", (4, 16, 256)),), 4, "")
    small = Collective("all-to-all", (Array("f32", (8,)),), 4, "")
    activations = Collective("all-gather", (Array("bf16", (64, 128, 512)),), 4, "jit(train_step)/teacher/dot_general", times=3)
    exchanged = Collective("all-to-all", (Array("bf16", (64, 128, 512)),), 4, "")
    summed = Collective("all-reduce", (Array("bf16", (64, 128, 512)),), 4, "")
    assert resharded([weights, scattered, small], parameters, tensor=False) == []
    gathered, moved = resharded([weights, activations, exchanged], parameters, tensor=False)
    assert "3 all-gather" in gathered and "bf16[64,128,512]" in gathered and "jit(train_step)/teacher" in gathered and "18.9 MB" in gathered
    assert "1 all-to-all" in moved
    both = Collective("all-reduce", (*weights.arrays, Array("bf16", (64, 128, 512))), 4, "")
    (named,) = resharded([both], parameters, tensor=False)
    assert "bf16[64,128,512]" in named and f"{1.5 * 64 * 128 * 512 * 2 / 1e6:.1f} MB" in named  # what is explained is not charged
    assert len(resharded([summed], parameters, tensor=False)) == 1
    flat = Collective("all-reduce", (Array("bf16", (14_763_264,)),), 8, "")  # many gradients as one array
    assert resharded([flat], parameters, tensor=False) == []
    assert resharded([summed], parameters, tensor=True) == []
