"""What TPU's compiler makes of the gradient of a weight that FSDP splits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config.mesh import MeshConfig
from maxllm.model.layers import gathered
from maxllm.parallel.mesh import make_mesh
from maxllm.parallel.sharding import RULES
from maxllm.plan.compile import compiled_for, topology_devices
from maxllm.plan.hardware import hardware_of

pytest.importorskip("libtpu", reason="TPU's compiler is made for Linux on x86-64")

LANES = 128
"""Numbers in a TPU's vector: the width of a shard that the compiler stumbles over."""


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((512, 8 * LANES), ("mlp", "embed")),
        ((4, 128, 8 * LANES), ("heads", "head_dim", "embed")),
        ((8 * LANES, 512), ("embed", "mlp")),
    ],
    ids=["w_down", "wo", "w_up"],
)
def test_gradients_are_scattered_where_a_shard_is_as_wide_as_a_vector(shape, axes):
    """Over eight chips, in bfloat16: each device sends 7 of the 8 parts of the whole, once."""
    hardware = hardware_of("v5p:2x2x2")
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology_devices(hardware))

    def laid_out(shape: tuple[int, ...], *split: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*split)))

    w = laid_out(shape, *("fsdp" if axis == "embed" else None for axis in axes))
    rows, width = 8 * 256, math.prod(shape) // (8 * LANES)
    x, y = laid_out((rows, width), "fsdp"), laid_out((rows, 8 * LANES), "fsdp")

    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        whole = gathered(w, None, axes, jnp.bfloat16)
        into, out = (y, x) if axes[0] == "embed" else (x, y)
        product = into.astype(jnp.bfloat16) @ whole.reshape(into.shape[-1], -1)
        return jnp.vdot(product.astype(jnp.float32), out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        step = jax.jit(jax.grad(loss), out_shardings=w.sharding)
        sent = compiled_for(hardware, lambda: step.lower(w, x, y)).collectives
    once = 2 * w.size * 7 // 8
    assert {kind: exchange.bytes for kind, exchange in sent.items()} == {"reduce-scatter": once}
