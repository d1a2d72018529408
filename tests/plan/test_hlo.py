"""Collectives counted in a program written by hand, loops in loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config import MeshConfig
from maxllm.parallel.mesh import make_mesh
from maxllm.plan.hlo import Collective, collectives, group_size

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
  %ring = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %ring_done = bf16[8,16]{1,0} collective-permute-done(%ring)
  %back = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%y), channel_id=1
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
"""


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


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", 4),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", 4),
    ],
)
def test_group_sizes(groups, size):
    assert group_size(groups) == size


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
