"""Machines: their names, figures and links."""

import re
from importlib import resources

import pytest

from maxllm.errors import UserError
from maxllm.plan.compile import topology_devices
from maxllm.plan.hardware import CHIPS, DIMENSIONS, GIB, GPUS, SLICES, hardware_of, peak_flops


@pytest.mark.parametrize(
    ("name", "devices", "shape"),
    [
        ("v5p-16", 8, (2, 2, 2)),
        ("v5p-128", 64, (4, 4, 4)),
        ("v4-8", 4, (2, 2, 1)),
        ("v5p:2x2x4", 16, (2, 2, 4)),
        ("v5e-256", 256, (16, 16)),
        ("v6e-8", 8, (2, 4)),
        ("v6e:4x4", 16, (4, 4)),
        ("tpu7x:4x4x4", 128, (4, 4, 4)),
        ("tpu7x-128", 128, (4, 4, 4)),
        ("2xtpu7x-128", 256, (4, 4, 4)),
        ("h100x8", 8, (1, 8)),
        ("h200x16", 16, (2, 8)),
        ("h100x64", 64, (8, 8)),
        ("a100x4", 4, (1, 4)),
    ],
)
def test_names(name, devices, shape):
    """v4, v5p and tpu7x are counted in cores, two to a chip; v5e and v6e in chips. A device is a chip, and a
    core of tpu7x."""
    hardware = hardware_of(name)
    assert (hardware.devices, hardware.shape) == (devices, shape)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v5p-17", "v5p slices have 8, 16, 32"),
        ("v5e-7", "v5e slices have 4, 8, 16"),
        ("v5e:2x2x2", "a v5e slice has 2 dimensions"),
        ("v6e:0x4", "a v6e slice has 2 dimensions"),
        ("h100x12", "give a multiple of 8"),
        ("v9-8", "not known; known are v4, v5e, v5p, v6e, tpu7x as"),
        ("h300x8", "a100, h100, h200 as NAMExCOUNT"),
        ("", "not known"),
    ],
)
def test_what_is_not_a_machine_is_told(name, sentence):
    with pytest.raises(UserError, match=sentence):
        hardware_of(name)


@pytest.mark.parametrize(
    ("name", "teraflops", "gibibytes"),
    [
        ("v4", 275, 30.75),
        ("v5e", 197, 15.75),
        ("v5p", 459, 95.74),
        ("v6e", 918, 31.25),
        ("tpu7x", 1153.5, 94.75),
    ],
)
def test_published_figures(name, teraflops, gibibytes):
    """Google's TPU pages: bfloat16 peak, and memory less the part of a gibibyte that XLA keeps (of half a
    chip's 96: 1.25)."""
    assert (CHIPS[name].flops / 1e12, CHIPS[name].hbm_bytes) == (teraflops, int(gibibytes * GIB))


@pytest.mark.parametrize(
    ("name", "wrap", "links"),
    [
        ("v4:2x2x4", (False, False, False), "open"),
        ("v4:4x4x4", (True, True, True), "torus"),
        ("v5p-16", (False, False, False), "open"),
        ("v5p:2x4x4", (False, False, False), "open"),
        ("v5p-256", (True, True, True), "torus"),
        ("v5p:4x4x12", (True, True, True), "torus"),
        ("2xv5p-128", (True, True, True), "torus"),
        ("tpu7x:4x4x4", (True, True, True), "torus"),
        ("tpu7x:2x2x2", (False, False, False), "open"),
        ("v5e-64", (False, False), "open"),
        ("v5e-128", (False, True), "closed in dimension 2"),
        ("v6e:16x4", (True, False), "closed in dimension 1"),
        ("v6e-256", (True, True), "torus"),
        ("2xv6e-256", (True, True), "torus"),
        ("h100x8", (), None),
    ],
)
def test_links_are_closed_where_those_of_the_machine_are(name, wrap, links):
    """Slices of whole cubes of 4 x 4 x 4 in every dimension; pods of v5e and v6e along their 16 chips."""
    hardware = hardware_of(name)
    assert (hardware.wrap, hardware.links) == (wrap, links)


def test_every_count_that_has_a_name_is_a_slice_of_its_size():
    for name in DIMENSIONS:
        for chips, shape in SLICES[DIMENSIONS[name]].items():
            hardware = hardware_of(f"{name}-{chips * CHIPS[name].cores}")
            assert "x".join(map(str, hardware.shape)) == shape and len(hardware.wrap) == DIMENSIONS[name]
            assert (hardware.chips, hardware.devices) == (chips, chips * CHIPS[name].devices)


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_described_to_their_compiler(name):
    """With the bandwidth that is planned with, and memory that is at least what is planned with."""
    described = resources.files("maxllm.plan").joinpath(f"{name}.txtpb").read_text()
    said = dict(re.findall(r"(memory_bandwidth|device_memory_size): (\d+)", described))
    assert float(said["memory_bandwidth"]) == pytest.approx(CHIPS[name].hbm_bandwidth, rel=0.01)
    assert CHIPS[name].hbm_bytes <= int(said["device_memory_size"]) < 1.1 * CHIPS[name].hbm_bytes


@pytest.mark.parametrize(("name", "node"), [("h100x8", 8), ("h100x64", 8), ("a100x4", 4), ("v5p-128", None)])
def test_nodes(name, node):
    """GPUs come in nodes; the chips of a TPU slice are all linked."""
    assert hardware_of(name).node == node


@pytest.mark.parametrize("name", ["v4-16", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_devices_own_name_leads_to_its_chip(name):
    """MFU is measured against the peak that plans are made with."""
    pytest.importorskip("libtpu", reason="TPU's compiler is made for Linux on x86-64")
    hardware = hardware_of(name)
    kinds = {device.device_kind for device in topology_devices(hardware)}
    assert {peak_flops(kind) for kind in kinds} == {hardware.chip.flops}


def test_gpus_are_known_by_their_names_and_others_have_no_peak():
    assert peak_flops("NVIDIA A100-SXM4-40GB") == CHIPS["a100"].flops
    assert peak_flops("NVIDIA H100 80GB HBM3") == CHIPS["h100"].flops
    assert peak_flops("NVIDIA H200") == CHIPS["h200"].flops
    assert peak_flops("cpu") is None
