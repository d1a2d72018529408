"""What XLA, libtpu and NCCL are told beside the program, by platform: one table for training and planning.

`launch.compiler_options` and `launch.variables` of a recipe go on top of it; what the environment says itself
(XLA_FLAGS, LIBTPU_INIT_ARGS, a variable of the table) wins over both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maxllm.config.launch import LaunchConfig, Option
from maxllm.errors import UserError

Options = dict[str, Option]
"""`compiler_options` of `lowered.compile`."""


@dataclass(frozen=True)
class Settings:
    """What a platform's libraries are told."""

    compiler_options: Mapping[str, Option] = field(default_factory=dict)
    """Of XLA, for each program that is compiled."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment, read when JAX's client for the platform begins."""
    devices: tuple[str, ...] = ()
    """Files by which a machine shows that it has such devices."""


SETTINGS = {
    "cpu": Settings(
        {
            # The pass that takes barriers out before anything is fused. Without them XLA undoes what
            # `jax.checkpoint` computes again, and computes the rotary embedding's sines in every use of them.
            "xla_disable_hlo_passes": "cse_barrier_expander",
            # Otherwise XLA copies AdamW's old moments before it writes the new ones, as parameters are
            # computed from the old ones too: 0.27 GB in a step of 34 M parameters (tools/bench_step.py).
            "xla_cpu_copy_insertion_use_region_analysis": True,
        },
    ),
    "tpu": Settings(
        {
            # Weights are gathered once for each pass (model/layers.py). Left alone, XLA turns gather and
            # matmul into a loop of small exchanges and gathers again for every use: 79 GB of them instead
            # of 35 for Llama-2-7B on eight v5p chips.
            "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
            # A reduce-scatter over more than one dimension of the torus; otherwise it becomes an all-reduce
            # of twice the bytes.
            "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
        },
        devices=("/dev/accel0", "/dev/vfio/0"),
    ),
    "gpu": Settings(
        {
            # A layer's reductions go on beside the next layer's work, across turns of the loop over layers:
            # the step of Llama-3-70B on 64 H100s has 438 operations between the starts and the ends of its
            # exchanges, where it had 258, for 0.2 GB. Gathers pipelined too send 28 GB more there.
            "xla_gpu_enable_pipelined_all_reduce": True,
        },
        {
            # Of a GPU's memory, where JAX takes three quarters: the rest is for cuDNN and NCCL, which take
            # what they need beside it (https://docs.nvidia.com/jax-toolbox, GPU Performance: 0.8 to 0.9).
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
            # NCCL says what failed, and on which network interface; otherwise it says nothing.
            "NCCL_DEBUG": "WARN",
        },
        devices=("/dev/nvidia0",),
    ),
}
"""Platform -> what its libraries are told."""


REFUSED = re.compile(r"INVALID_ARGUMENT: (No such compile option: .*|While setting option .*)")
"""What XLA says of an option that is none, or of its value."""


def compiler_options(platform: str, launch: LaunchConfig) -> Options:
    """XLA's options for every program of a run on a platform.

    Those that XLA_FLAGS or LIBTPU_INIT_ARGS name are left to them.
    """
    table = SETTINGS[platform].compiler_options if platform in SETTINGS else {}
    given = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}".split()
    named = {word.lstrip("-").partition("=")[0] for word in given}
    options = dict(table) | launch.compiler_options
    return {name: value for name, value in options.items() if value is not None and name not in named}


def compile_lowered(lowered: Any, platform: str, launch: LaunchConfig) -> Any:
    """A lowered program, compiled with the options of a run on a platform.

    Raises:
      UserError: the recipe has an option that the compiler does not know, or a value of another kind.
    """
    import jax

    try:
        return lowered.compile(compiler_options=compiler_options(platform, launch))
    except jax.errors.JaxRuntimeError as error:
        if match := REFUSED.search(str(error)):
            raise UserError(f"launch.compiler_options: the compiler says: {match[1]}") from None
        raise


def set_variables(platform: str, launch: LaunchConfig) -> None:
    """Sets what the libraries of a platform read in the environment, before JAX's client begins."""
    table = SETTINGS[platform].variables if platform in SETTINGS else {}
    for name, value in (dict(table) | launch.variables).items():
        os.environ.setdefault(name, value)


def described(platform: str, launch: LaunchConfig) -> str:
    """The settings as a line, for a run to print."""
    table = SETTINGS[platform].variables if platform in SETTINGS else {}
    names = dict.fromkeys((*table, *launch.variables))
    variables = {name: os.environ[name] for name in names if name in os.environ}
    options = compiler_options(platform, launch)
    return ", ".join(f"{name}={value}" for name, value in (options | variables).items())


def platform_here() -> str:
    """The platform of this machine's devices, before JAX is asked; JAX_PLATFORMS has the last word."""
    wanted = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    if wanted:
        return "gpu" if wanted in ("cuda", "rocm") else wanted
    found = (name for name, settings in SETTINGS.items() if any(map(os.path.exists, settings.devices)))
    return next(found, "cpu")
