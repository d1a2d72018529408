"""What TPU's compiler makes of a gather over a slice whose ends are linked, and over one with open ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config.mesh import MeshConfig
from maxllm.model.layers import scatter
from maxllm.parallel.mesh import make_mesh
from maxllm.parallel.sharding import RULES
from maxllm.plan.compile import compiled_for, topology_devices
from maxllm.plan.hardware import Hardware, hardware_of

pytest.importorskip("libtpu", reason="TPU's compiler is made for Linux on x86-64")

WIDTH = 1024


def exchanges(name, width=WIDTH):
    """Kind -> bytes that a device sends in a layer of weights [width, width], bfloat16, split over all."""
    hardware = hardware_of(name)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology_devices(hardware))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    x, w = (
        jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=split)
        for rows in (8 * hardware.devices, width)
    )
    layer = jax.jit(lambda x, w: x @ w, out_shardings=split)
    compiled = compiled_for(hardware, lambda: layer.lower(x, w))
    return {kind: exchange.bytes for kind, exchange in compiled.collectives.items()}


@pytest.mark.parametrize("name", ["v4:4x4x4", "v5p:4x4x4", "tpu7x:4x4x4", "v6e:16x16"])
def test_gathers_stay_gathers_where_the_ends_are_linked(name, monkeypatch):
    """Each device is sent what the others hold, once; over open ends the compiler adds up arrays of zeros
    instead, an all-reduce of twice the bytes."""
    whole, n = 2 * WIDTH * WIDTH, hardware_of(name).devices
    once = whole * (n - 1) // n
    assert exchanges(name) == {"all-gather": once}
    monkeypatch.setattr(Hardware, "wrap", property(lambda hardware: (False,) * len(hardware.shape)))
    assert exchanges(name) == {"all-reduce": 2 * whole * (n - 1) // n}


@pytest.mark.parametrize(("width", "kind"), [(4 * WIDTH, "all-gather"), (WIDTH, "all-reduce")])
def test_v5e_gathers_what_is_large_whatever_its_ends(width, kind, monkeypatch):
    """Its compiler goes by the size alone: neither closed ends nor open ones change the program."""
    linked = exchanges("v5e:16x16", width)
    assert linked.keys() == {kind}
    monkeypatch.setattr(Hardware, "wrap", property(lambda hardware: (False,) * len(hardware.shape)))
    assert exchanges("v5e:16x16", width) == linked


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")], ids=["up", "down"])
def test_gradients_are_scattered_whichever_dimension_is_split(axes):
    """Over a last dimension, as w_down's, TPU's compiler left alone sums the whole and keeps a slice."""
    hardware = hardware_of("v5p:4x4x4")
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology_devices(hardware))
    sizes = {"embed": 8192, "mlp": 2048}
    rows, split = (
        NamedSharding(mesh, PartitionSpec("fsdp")),
        NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == "embed" else None for axis in axes))),
    )
    x, gradient = (
        jax.ShapeDtypeStruct((128 * hardware.devices, sizes[axis]), jnp.bfloat16, sharding=rows)
        for axis in axes
    )

    def weight_gradient(x, gradient):
        return scatter(axes, jnp.bfloat16, None, x.T @ gradient)[0]

    def lower():
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
            return jax.jit(weight_gradient, out_shardings=split).lower(x, gradient)

    sent = {kind: found.bytes for kind, found in compiled_for(hardware, lower).collectives.items()}
    # An array this small goes a quarter of its way twice, as permutations; an all-reduce is all of it twice.
    assert "all-reduce" not in sent and sum(sent.values()) < 1.3 * 2 * 8192 * 2048


def test_ends_that_are_open_are_compiled_open():
    """Eight v5p chips are two in a row: no ends are left to link, and gathers are gathers."""
    assert exchanges("v5p:2x2x2") == {"all-gather": 2 * WIDTH * WIDTH * 7 // 8}


def test_v4s_two_cores_are_one_device():
    """As on its machines; libtpu's own choice is a device for each core."""
    hardware = hardware_of("v4:2x2x1")
    assert len(topology_devices(hardware)) == hardware.devices == 4


def test_ironwoods_two_cores_are_two_devices():
    hardware = hardware_of("tpu7x:2x2x1")
    assert len(topology_devices(hardware)) == hardware.devices == 8
