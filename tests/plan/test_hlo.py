"""Collectives counted in a program written by hand, loops in loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config.mesh import MeshConfig
from maxllm.parallel.mesh import make_mesh
from maxllm.plan.hlo import Collective, collectives, group

PROGRAM = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (p: (s32[])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner_body (p: (s32[])) -> (s32[]) {
  %ring = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %ring_done = bf16[8,16]{1,0} collective-permute-done(%ring)
  %back = bf16[8,16]{1,0} collective-permute(%y), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[]) tuple(%i)
}

%all-reduce-scatter (p: f32[8,32]) -> f32[1,32] {
  %all-reduce.9 = f32[8,32]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[1,32]{1,0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={1,32}
}

%outer_condition (p: (s32[])) -> pred[] {
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%async_collective_fusion (w: u16[8,16]) -> u16[64,16] {
  ROOT %gathered = u16[64,16]{1,0} all-gather(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}

%async_collective_fusion.1 (w: u16[8,16]) -> u16[64,16] {
  ROOT %gathered.1 = u16[64,16]{1,0} all-gather(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}

%outer_body (p: (s32[])) -> (s32[]) {
  %start = u16[64,16]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%async_collective_fusion
  %done = u16[64,16]{1,0:T(8,128)(2,1)} fusion(%start), kind=kCustom, calls=%async_collective_fusion.1
  %scattered = f32[1,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %loop = (s32[]) while(%t), condition=%inner_condition, body=%inner_body
  ROOT %out = (s32[]) tuple(%i)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %loop.1 = (s32[]) while(%t), condition=%outer_condition, body=%outer_body
  %sum = (f32[100]{0}, f32[20]{0}) all-reduce(%y, %z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %swapped = bf16[4,8]{1,0} all-to-all(%q), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %part = f32[10]{0} reduce-scatter(%r), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_a_program_written_by_hand():
    """Bytes that a device sends; of an all-gather of n devices (n - 1) / n, of an all-reduce twice that.

    The two all-gathers are one, begun and ended in two fusions; the two permutations are two.
    """
    assert collectives(PROGRAM) == {
        "all-gather": Collective(3 * (64 * 16 * 2 * 7 // 8), 3),
        "all-reduce": Collective(2 * 120 * 4 * 3 // 4, 1),
        "reduce-scatter": Collective(3 * (8 * 32 * 4 * 7 // 8) + 10 * 4 * 8 * 7 // 8, 4),
        "all-to-all": Collective(4 * 8 * 2 * 3 // 4, 1),
        "collective-permute": Collective(3 * 5 * 2 * 8 * 16 * 2, 30),
    }


GPU_PROGRAM = """
HloModule step

%condition (p: (s32[])) -> pred[] {
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%wrapped (g: f32[16]) -> f32[2] {
  ROOT %scattered.1 = f32[2]{0} reduce-scatter(%g), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%add
}

%body (p: (s32[])) -> (s32[]) {
  %gather = ((bf16[2,8]{1,0}, bf16[4]{0}), (bf16[32,8]{1,0}, bf16[64]{0})) all-gather-start(%a, %b), channel_id=1, replica_groups=mesh['axis_0'=16] {'axis_0'}
  %gathered = (bf16[32,8]{1,0}, bf16[64]{0}) all-gather-done(%gather)
  %start = ((f32[16]{0}), f32[2]{0}) async-start(%g), calls=%wrapped
  %done = f32[2]{0} async-done(%start)
  ROOT %out = (s32[]) tuple(%i)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %loop = (s32[]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %sums = (f32[100]{0}, f32[20]{0}) all-reduce-start(%y, %z), channel_id=1, replica_groups=[8,2]<=[2,8]T(1,0)
  %summed = (f32[100]{0}, f32[20]{0}) all-reduce-done(%sums)
  %part = ((f32[1600]{0}), f32[100]{0}) reduce-scatter-start(%r), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}
  ROOT %swapped = ((bf16[16,8]{1,0}), bf16[16,8]{1,0}) all-to-all-start(%q), channel_id=3, replica_groups=[1,16]<=[16]
}
"""  # noqa: E501


def test_a_program_as_gpus_have_it():
    """Started exchanges hold their operands too, but an all-reduce; a channel is no name. Two nodes of eight:
    of 16 devices 8 are elsewhere, for whom the 8 here send 8 of the 16 parts between them."""
    gathered, scattered = (32 * 8 + 64) * 2 * 15 // 16, 1600 * 4 * 15 // 16
    swapped = 16 * 8 * 2 * 15 // 16
    assert collectives(GPU_PROGRAM, node=8) == {
        "all-gather": Collective(3 * gathered, 3, 3 * (gathered // 15)),
        "all-reduce": Collective(120 * 4, 1, 120 * 4),  # pairs, one of each node
        "reduce-scatter": Collective(3 * (16 * 4 * 7 // 8) + scattered, 4, scattered // 15),
        "all-to-all": Collective(swapped, 1, swapped * 8 // 15),
    }
    assert all(exchange.between_nodes == 0 for exchange in collectives(GPU_PROGRAM).values())


SPARSE_CORE_PROGRAM = """
HloModule step

%wrapped (w: bf16[8,16]) -> bf16[64,16] {
  ROOT %all-gather.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, replica_groups=[1,8]<=[8]
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %start = ((bf16[8,16]{1,0:T(8,128)(2,1)}, token[]), bf16[64,16]{1,0:T(8,128)(2,1)}) call-start(%x, %t), async_execution_thread="sparsecore", to_apply=%wrapped
  ROOT %done = bf16[64,16]{1,0:T(8,128)(2,1)} call-done(%start)
}
"""  # noqa: E501


def test_what_ironwoods_sparse_cores_exchange():
    """They are called beside the program, and what they are called for is sent as well."""
    assert collectives(SPARSE_CORE_PROGRAM) == {"all-gather": Collective(64 * 16 * 2 * 7 // 8, 1)}


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups={{0,2,4},{1,3,5}}", [0, 2, 4]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [0, 4]),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", [0, 1, 2, 3]),
        ("replica_groups=mesh['x'=8] {'x':(1)4}", [0, 2, 4, 6]),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", [0, 1, 4, 5]),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,2,2]T(0,2,1)) {'x':(2)2}", [0, 1]),
        ("source_target_pairs={{0,0},{0,1},{1,7},{7,1}}, metadata={{9,0}}", [1, 7]),
    ],
)
def test_groups(groups, devices):
    assert group(groups) == devices


def test_a_compiled_program():
    """A sum over eight devices in a loop of seven, as XLA writes it for CPU."""
    mesh = make_mesh(MeshConfig(data=8))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def total(x):
        body = jax.shard_map(
            lambda x: jax.lax.psum(x, "data"),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
        )
        step = lambda carry, _: (carry + jnp.tile(body(carry), 8) * 1e-3, None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=7)[0]

    x = jax.ShapeDtypeStruct((8 * 1024,), jnp.float32, sharding=split)
    text = jax.jit(total, out_shardings=split).lower(x).compile().as_text()
    assert collectives(text)["all-reduce"] == Collective(7 * int(2 * 1024 * 4 * 7 / 8), 7)
