"""Names of machines."""

import pytest

from maxllm.errors import UserError
from maxllm.plan.hardware import CHIPS, GIB, hardware_of


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
        ("h100x8", 8, (1, 8)),
        ("h100x64", 64, (8, 8)),
        ("a100x4", 4, (1, 4)),
    ],
)
def test_names(name, devices, shape):
    """v4 and v5p are counted in cores, two to a chip; v5e and v6e in chips."""
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
        ("v9-8", "not known; known are v4, v5e, v5p, v6e"),
        ("", "not known"),
    ],
)
def test_what_is_not_a_machine_is_told(name, sentence):
    with pytest.raises(UserError, match=sentence):
        hardware_of(name)


@pytest.mark.parametrize(
    ("name", "teraflops", "gibibytes"),
    [("v4", 275, 30.75), ("v5e", 197, 15.75), ("v5p", 459, 95.74), ("v6e", 918, 31.25)],
)
def test_published_figures(name, teraflops, gibibytes):
    """Google's TPU pages: bfloat16 peak, and memory less the quarter of a gibibyte that XLA keeps."""
    assert (CHIPS[name].flops / 1e12, CHIPS[name].hbm_bytes) == (teraflops, int(gibibytes * GIB))


@pytest.mark.parametrize(("name", "node"), [("h100x8", 8), ("h100x64", 8), ("a100x4", 4), ("v5p-128", None)])
def test_nodes(name, node):
    """GPUs come in nodes; a TPU slice is one torus."""
    assert hardware_of(name).node == node
