"""Asking the real compiler, with no accelerator here: libtpu and JAX's CUDA plugin compile for machines that
are only described."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax

from maxllm.config.launch import NO_SETTINGS, LaunchConfig
from maxllm.errors import RunFailed, UserError
from maxllm.parallel.compiler import made_whole, without_tpu
from maxllm.parallel.settings import compile_lowered
from maxllm.plan.hardware import GIB, Hardware
from maxllm.plan.hlo import Collective, collectives
from maxllm.plan.matmuls import matmul_flops

OUT_OF_MEMORY = re.compile(
    r"(?:Used |HLO temporaries \()(?P<size>[\d.]+)(?P<unit>[KMGT])(?: of |\) exceeds available HBM)"
)
"""The compiler's two ways to say it: all that a program uses, or its temporaries, where they are too much."""


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program, per device."""

    argument_bytes: int
    """Parameters, optimizer state and batch."""
    temp_bytes: int
    """Everything else that is in use at once, donated arguments' space included."""
    peak_bytes: int
    """The most that is in use at one time; an upper bound where activations are offloaded."""
    host_bytes: int
    """In the memory of the host, of this device."""
    seconds: float
    """Seconds that compiling took."""
    collectives: dict[str, Collective]
    matmul_flops: float
    """Of matmuls, attention's kernels left out."""
    text: str
    """The program, XLA's text."""
    made_whole: tuple[str, ...]
    """Arrays that the partitioner makes whole on every device, for want of a better way: a fault."""


@dataclass(frozen=True)
class TooLarge:
    """A program that the compiler refuses for its memory."""

    peak_bytes: int
    """What it would need, at least."""
    seconds: float
    largest: tuple[str, ...]
    """The compiler's own list of what is large."""


def topology_devices(hardware: Hardware) -> Sequence[jax.Device]:
    """The devices of a machine that is not here, for a mesh to compile for.

    Raises:
      UserError: its compiler is not installed, or does not know such a slice.
    """
    return gpus(hardware) if hardware.chip.platform == "gpu" else tpus(hardware)


def tpus(hardware: Hardware) -> Sequence[jax.Device]:
    """The devices of a TPU slice that is not here.

    Raises:
      UserError: TPU's compiler is not installed, or does not know such a slice.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            f"compiling for {hardware.name} needs TPU's compiler, which runs on any machine: "
            "pip install 'maxllm[tpu]'"
        ) from None
    without_tpu()
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "1")  # for `made_whole`
    from jax.experimental import topologies

    name = f"{hardware.generation}:{'x'.join(map(str, hardware.shape))}"
    # Left alone libtpu takes every end to be open, and a v4 chip for two devices: its machines make it one.
    described: dict[str, Any] = {"wrap": (*hardware.wrap, False)[:3]}  # it counts three dimensions always
    if hardware.generation == "v4":
        described["chip_config_name"] = "megacore"
    if hardware.slices > 1:
        described["num_slices"] = hardware.slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **described).devices
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--hardware {hardware.name}: TPU's compiler refuses {name} ({reason})") from None


def gpus(hardware: Hardware) -> Sequence[jax.Device]:
    """The devices of GPU nodes that are not here.

    The plugin compiles with no GPU and no driver here. What cuDNN needs beside its operands, and NCCL's
    buffers, are in no figure: it asks neither.

    Raises:
      UserError: JAX's CUDA plugin is not installed.
    """
    try:
        import jax_cuda12_plugin  # noqa: F401
    except ImportError:
        raise UserError(
            f"compiling for {hardware.name} needs JAX's CUDA plugin, which runs on any Linux machine: "
            "pip install 'maxllm[cuda]'"
        ) from None
    from jax.experimental import topologies

    described = resources.files("maxllm.plan").joinpath(f"{hardware.generation}.txtpb").read_text()
    nodes, each = hardware.shape
    # Domains of NVLink, hosts of a domain, GPUs of a host.
    shape = f"{nodes}x1x{each}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=described, topology=shape
    ).devices


def check_cudnn(hardware: Hardware) -> None:
    """JAX lowers attention for cuDNN only where it can ask its version.

    Raises:
      UserError: it is not installed.
    """
    from jax_cuda12_plugin import _versions

    try:
        _versions.cudnn_get_version()
    except RuntimeError:
        raise UserError(
            f"attention for {hardware.name} needs cuDNN, which is not installed: "
            "pip install 'maxllm[cuda]', or give model.attention=xla"
        ) from None


def check_host_memory(hardware: Hardware, wanted: bool) -> None:
    """JAX knows the host's memory of a TPU that is not here, and not that of a GPU: there, what is offloaded
    would be counted on the device without a word.

    Raises:
      UserError: it is wanted.
    """
    if wanted and hardware.chip.platform == "gpu":
        raise UserError(
            f"{hardware.name}: what mesh.offload and model.keep_in_host take off a GPU cannot be planned: "
            "JAX describes no host memory of GPUs that are not here; plan without them"
        )


def compiled_for(
    hardware: Hardware, lower: Callable[[], Any], launch: LaunchConfig = NO_SETTINGS
) -> Compiled | TooLarge:
    """Compiles what `lower` lowers, with what a recipe tells the compiler.

    Raises:
      RunFailed: the compiler fails for another reason than memory.
    """
    started = time.perf_counter()
    try:
        with made_whole() as whole:
            compiled = compile_lowered(lower(), hardware.chip.platform, launch)
    except jax.errors.JaxRuntimeError as error:
        message, seconds = str(error), time.perf_counter() - started
        if found := OUT_OF_MEMORY.search(message):
            size = float(found["size"]) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[found["unit"]]
            return TooLarge(int(size), seconds, largest_in(message))
        raise RunFailed(f"the compiler for {hardware.name} fails: {message.splitlines()[0][:300]}") from error
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=device_peak(memory),
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        seconds=seconds,
        collectives=collectives(text, hardware.node),
        matmul_flops=matmul_flops(text),
        text=text,
        made_whole=tuple(whole),
    )


def device_peak(memory: Any) -> int:
    """The most that is in use on the device at one time.

    XLA's own figure counts what lies in the host's memory too: arguments all the time, temporaries (offloaded
    activations) some of it. With the latter this is an upper bound.
    """
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    if not memory.host_temp_size_in_bytes:
        return peak
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return min(peak, memory.argument_size_in_bytes + memory.temp_size_in_bytes + results)


def largest_in(message: str) -> tuple[str, ...]:
    """Sizes and shapes of the largest allocations that the compiler names when it runs out of memory."""
    sizes = re.findall(r"Size: ([\d.]+[KMGT]?)", message)
    shapes = re.findall(r"Shape: (\S+?)\{", message)
    names = re.findall(r'Operator: op_name="([^"]*)"', message)
    rows = zip(sizes, shapes, (*names, *[""] * len(sizes)), strict=False)
    return tuple(f"{size} {shape} {name.split('/')[-1]}".strip() for size, shape, name in rows)[:8]
