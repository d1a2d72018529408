"""What TPU's compiler makes of a gather over a slice whose ends are linked, and over one with open ends."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.config import MeshConfig
from maxllm.parallel.mesh import make_mesh
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
