"""What those who rent machines out call them: Cloud TPU, GKE, xpk and SkyPilot, and how many hosts they have.

Chips of a host, types and runtime versions: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,runtimes};
labels of nodes: https://docs.cloud.google.com/kubernetes-engine/docs/concepts/{plan-tpus,gpus}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from maxllm.plan.hardware import Hardware

HOST_CHIPS = 4
"""TPU chips of a host, where a slice has several hosts."""

WHOLE_HOST_CHIPS = {"v5e": 8, "v6e": 8}
"""Generation -> chips of the largest slice that is one host."""


@dataclass(frozen=True)
class Names:
    """What a kind of chip is called."""

    gke: str
    """Label of GKE's nodes, `cloud.google.com/gke-tpu-accelerator` or `gke-accelerator`."""
    cloud_tpu: str | None = None
    """Type of a Cloud TPU slice without its number; None where only GKE has it, or for GPUs."""
    counts_cores: bool = False
    """Whether the number is of cores, two to a chip."""
    runtime: str | None = None
    """Cloud TPU's runtime version."""
    xpk: str | None = None
    """xpk's device type of a node of eight GPUs."""
    sky: str | None = None
    """SkyPilot's name of a GPU."""


NAMES = {
    "v4": Names("tpu-v4-podslice", "v4", counts_cores=True, runtime="tpu-ubuntu2204-base"),
    "v5e": Names("tpu-v5-lite-podslice", "v5litepod", runtime="v2-alpha-tpuv5-lite"),
    "v5p": Names("tpu-v5p-slice", "v5p", counts_cores=True, runtime="v2-alpha-tpuv5"),
    "v6e": Names("tpu-v6e-slice", "v6e", runtime="v2-alpha-tpuv6e"),
    "tpu7x": Names("tpu7x"),
    "a100": Names("nvidia-a100-80gb", sky="A100-80GB"),
    "h100": Names("nvidia-h100-80gb", xpk="h100-80gb-8", sky="H100"),
    "h200": Names("nvidia-h200-141gb", xpk="h200-141gb-8", sky="H200"),
}
"""Key of `hardware.CHIPS` -> names."""


@dataclass(frozen=True)
class Machine:
    """A machine as launchers need it."""

    hardware: Hardware

    @property
    def is_tpu(self) -> bool:
        """TPUs rather than GPUs."""
        return self.hardware.chip.platform == "tpu"

    @property
    def names(self) -> Names:
        """What its chips are called."""
        return NAMES[self.hardware.generation]

    @property
    def chips_per_host(self) -> int:
        """TPU chips or GPUs of a host."""
        if not self.is_tpu:
            return self.hardware.shape[1]
        chips = math.prod(self.hardware.shape)
        whole = WHOLE_HOST_CHIPS.get(self.hardware.generation, HOST_CHIPS)
        return chips if chips <= whole else HOST_CHIPS

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of a TPU slice; of GPUs, all of them."""
        return math.prod(self.hardware.shape) // self.chips_per_host

    @property
    def hosts(self) -> int:
        """All hosts: one process on each."""
        return self.hardware.slices * self.hosts_per_slice

    @property
    def topology(self) -> str | None:
        """A TPU slice's shape, as in 4x4x8."""
        return "x".join(map(str, self.hardware.shape)) if self.is_tpu else None

    @property
    def tpu_type(self) -> str | None:
        """A slice's type as Cloud TPU and xpk call it: v5p-16, v5litepod-256; None for GPUs."""
        if not self.is_tpu:
            return None
        chips = math.prod(self.hardware.shape)
        if self.names.cloud_tpu is None:
            return f"{self.hardware.generation}-{chips * self.hardware.chip.cores}"
        return f"{self.names.cloud_tpu}-{2 * chips if self.names.counts_cores else chips}"

    def facts(self) -> dict[str, str | int | None]:
        """All that scripts in launch/ ask for; None of what this machine has not."""
        return {
            "hardware": self.hardware.name,
            "platform": self.hardware.chip.platform,
            "hosts": self.hosts,
            "slices": self.hardware.slices,
            "chips_per_host": self.chips_per_host,
            "gpus_per_host": 0 if self.is_tpu else self.chips_per_host,
            "topology": self.topology,
            "tpu_type": self.tpu_type,
            "runtime": self.names.runtime,
            "gke_accelerator": self.names.gke,
            "xpk_device": self.tpu_type or self.names.xpk,
        }
