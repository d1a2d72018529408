"""Machines that can be planned for: what a chip has, and how chips are named and arranged.

v5e-256, v6e-16: TPUs counted in chips; v5p-16, v4-32, tpu7x-128: TPUs counted in cores, two to a chip;
v5p:2x2x2, v6e:4x4: a TPU slice by its shape; 2xv5e-256: two slices; h100x8, h200x64: GPUs, eight to a node.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from maxllm.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX sees it: a device. TPU: Google's system architecture pages, XLA's own limit for
    memory, and for links Austin et al. 2025, "How to scale your model"; GPU: NVIDIA's data sheets, and those
    of its DGX for the network (8 x 400 Gb/s a node with H100 and H200, 8 x 200 with A100)."""

    platform: str
    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: int
    """What a program may use."""
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s that a chip sends, over all its links together; of a GPU to others of its node, by NVLink."""
    cores: int = 1
    """TensorCores of a chip, which some names count."""
    devices: int = 1
    """JAX devices of a chip. Both cores of v4 and v5p make one; those of tpu7x are a device each, and what is
    said here is each one's half of the chip."""
    watts: float | None = None
    """Power of the board, where published."""
    node_bandwidth: float | None = None
    """Bytes/s that a chip sends to other nodes or slices, by its share of the network; None if unknown."""


CHIPS = {
    "v4": Chip("tpu", 275e12, int(30.75 * GIB), 1.228e12, 3 * 2 * 4.5e10, cores=2),
    "v5e": Chip("tpu", 197e12, int(15.75 * GIB), 8.19e11, 2 * 2 * 4.5e10, node_bandwidth=3.125e9),
    "v5p": Chip("tpu", 459e12, int(95.74 * GIB), 2.765e12, 3 * 2 * 9e10, cores=2, node_bandwidth=6.25e9),
    "v6e": Chip("tpu", 918e12, int(31.25 * GIB), 1.64e12, 2 * 2 * 9e10, node_bandwidth=1.25e10),
    # A chip: 2,307 TFLOP/s in bfloat16, 192 GiB, 7,380 GB/s, 100 Gb/s of network, and 1,200 GB/s of links in
    # both directions together, as v5p has (https://docs.cloud.google.com/tpu/docs/tpu7x).
    "tpu7x": Chip(
        "tpu",
        2307e12 / 2,
        int(94.75 * GIB),
        7.38e12 / 2,
        3 * 2 * 9e10 / 2,
        cores=2,
        devices=2,
        node_bandwidth=6.25e9,
    ),
    "a100": Chip("gpu", 312e12, 80 * 10**9, 2.039e12, 3e11, watts=400, node_bandwidth=2.5e10),
    "h100": Chip("gpu", 989e12, 80 * 10**9, 3.35e12, 4.5e11, watts=700, node_bandwidth=5e10),
    "h200": Chip("gpu", 989e12, 141 * 10**9, 4.8e12, 4.5e11, watts=700, node_bandwidth=5e10),
}

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""`jax.Device.device_kind` -> key of CHIPS."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a JAX device; None where it is not known, so that it has no MFU."""
    name = KINDS.get(device_kind)
    return None if name is None else CHIPS[name].flops


GPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "gpu")

SLICES = {
    2: {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
        1024: "8x8x16",
        2048: "8x16x16",
        4096: "16x16x16",
    },
}
"""Number of dimensions -> chips -> shape of the slice."""

DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
"""Generation -> number of dimensions in which a chip is linked to its neighbours."""

CUBE = 4
"""Chips along the edge of the cubes that v4, v5p and tpu7x slices are made of. Optical switches join cubes to
each other and to themselves, so that a slice of whole cubes is closed in every dimension and a smaller one in
none (https://docs.cloud.google.com/tpu/docs/v5p; of v4 Jouppi et al. 2023, "TPU v4", §2)."""

POD_EDGE = 16
"""Chips along the edge of a pod of v5e or v6e, whose ends are cabled together: a slice is closed in those
dimensions in which it is as long as that (Austin et al. 2025, part 2)."""


@dataclass(frozen=True)
class Hardware:
    """A machine."""

    name: str
    """As the user gave it."""
    generation: str
    """Key of CHIPS."""
    shape: tuple[int, ...]
    """TPU: the slice; GPU: (nodes, GPUs of a node)."""
    slices: int = 1
    """Of TPUs, joined by the network of the data centre."""

    @property
    def chip(self) -> Chip:
        """What each device is."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """What is paid for: TPU chips, or GPUs."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices: one for each chip, two for tpu7x."""
        return self.chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """TPU: whether each dimension of a slice is closed, its last chip linked to its first; GPU: empty."""
        if self.chip.platform == "gpu":
            return ()
        if DIMENSIONS[self.generation] == 3:
            return (all(size % CUBE == 0 for size in self.shape),) * 3
        return tuple(size == POD_EDGE for size in self.shape)

    @property
    def links(self) -> str | None:
        """What the links of a TPU slice make of it, for people: torus, open, or which dimensions are closed;
        None for GPUs."""
        if not self.wrap:
            return None
        if all(self.wrap):
            return "torus"
        closed = [str(place) for place, is_closed in enumerate(self.wrap, start=1) if is_closed]
        return f"closed in dimension {' and '.join(closed)}" if closed else "open"

    @property
    def node(self) -> int | None:
        """GPUs of a node; None for a TPU slice, whose links join all."""
        return self.shape[1] if self.chip.platform == "gpu" else None


def hardware_of(name: str) -> Hardware:
    """A machine by its name.

    Raises:
      UserError: it is none that is known, with those that are.
    """
    known = (
        f"{', '.join(DIMENSIONS)} as NAME-COUNT or NAME:SHAPE (v5e-256, v5p:2x2x2), several slices of "
        f"them as 2xv5e-256; {', '.join(GPUS)} as NAMExCOUNT"
    )
    tpus, gpus = "|".join(DIMENSIONS), "|".join(GPUS)
    if match := re.fullmatch(rf"([1-9]\d*)x((?:{tpus})\W.*)", name):
        return replace(hardware_of(match[2]), name=name, slices=int(match[1]))
    if match := re.fullmatch(rf"({gpus})x(\d+)", name):
        generation, count = match[1], int(match[2])
        if count < 1 or (count > 8 and count % 8):
            raise UserError(f"--hardware {name}: GPUs come up to eight to a node; give a multiple of 8")
        return Hardware(name, generation, (max(1, count // 8), min(8, count)))
    if match := re.fullmatch(rf"({tpus}):(\d+(?:x\d+)+)", name):
        shape = tuple(int(size) for size in match[2].split("x"))
        if len(shape) != DIMENSIONS[match[1]] or 0 in shape:
            raise UserError(f"--hardware {name}: a {match[1]} slice has {DIMENSIONS[match[1]]} dimensions")
        return Hardware(name, match[1], shape)
    if match := re.fullmatch(rf"({tpus})-(\d+)", name):
        generation, count = match[1], int(match[2])
        per_chip, slices = CHIPS[generation].cores, SLICES[DIMENSIONS[generation]]
        if count % per_chip or count // per_chip not in slices:
            sizes = ", ".join(str(chips * per_chip) for chips in slices)
            raise UserError(f"--hardware {name}: {generation} slices have {sizes}")
        shape = tuple(int(size) for size in slices[count // per_chip].split("x"))
        return Hardware(name, generation, shape)
    raise UserError(f"--hardware {name} is not known; known are {known}")
