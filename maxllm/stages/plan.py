"""Plan: compile a recipe for a machine that is not here: memory, collectives, time, cost.

    maxllm plan configs/pretrain/llama2-7b_synthetic_v5p-16.yaml
    maxllm plan pretrain/tiny_slice_cpu --hardware v6e-16 mesh.fsdp=-1 --json

The program that is compiled is the one that the stage would run: same state, same step, same batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.filesize import decimal

from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.model.attend import resolve
from maxllm.parallel.mesh import AXES, check_batch_divides, check_model_divides, make_mesh, sizes_of
from maxllm.parallel.pipeline import bubble
from maxllm.plan import search
from maxllm.plan.compile import (
    Compiled,
    TooLarge,
    check_cudnn,
    check_host_memory,
    compiled_for,
    topology_devices,
)
from maxllm.plan.flops import matmul_parameters, train_flops_per_token
from maxllm.plan.hardware import Hardware, hardware_of
from maxllm.plan.layout import layout
from maxllm.plan.roofline import Bound, step_bound, update_bytes
from maxllm.plan.scaling import (
    classic_bytes,
    optimal_parameters,
    optimal_tokens,
    training_flops,
)
from maxllm.run.program import STEP, Part, Program, lower_part
from maxllm.run.session import check_replies_fit, resolved
from maxllm.stages.registry import stage_of
from maxllm.steps.state import parameter_count


def run(
    config: Config, hardware_name: str | None, tokens: float | None = None, price: float | None = None
) -> dict[str, Any]:
    """Compiles a recipe's step for a machine.

    Args:
      config: the recipe.
      hardware_name: see plan/hardware.py; the recipe's own when absent.
      tokens: length of the training, for days and cost; what the recipe's steps come to when absent.
      price: of a chip for an hour, in any currency.

    Returns:
      The figures, as `--json` prints them; bytes are per device.

    Raises:
      UserError: the recipe does not say its model, or does not divide the machine.
      RunFailed: the compiler fails.
    """
    hardware = hardware_of(named(config, hardware_name))
    plan = prepare(config, hardware)
    parts = {
        name: compiled_for(hardware, partial(lower_part, plan.mesh, part, config.mesh.zero), config.launch)
        for name, part in plan.program.parts.items()
    }
    return machine_figures(plan) | compiler_figures(plan, parts) | speed_figures(plan, parts, tokens, price)


CONFIRMED = 3
"""Candidates of a search that are compiled."""


def search_best(config: Config, hardware_name: str | None, fixed: Collection[str] = ()) -> dict[str, Any]:
    """Searches by estimate, and compiles the best: see plan/search.py for the arguments.

    Returns:
      The figures of the search. Of its `best`, the first few have `compiled`, the figures of `run`; `fits` is
      whether one of these does, and `chosen` the overrides of the first that does.
    """
    figures, fitting = search.run(config, hardware_name, fixed)
    figures["chosen"] = None
    for candidate, best in zip(fitting[:CONFIRMED], figures["best"], strict=False):
        best["compiled"] = compiled = run(candidate.config, figures["hardware"])
        if compiled["fits"] and figures["chosen"] is None:
            figures["chosen"] = best["words"]
    figures["fits"] = figures["chosen"] is not None
    return figures


@dataclass(frozen=True)
class Plan:
    """A recipe on a machine."""

    config: Config
    model: ModelConfig
    hardware: Hardware
    mesh: Mesh
    program: Program


def layout_of(config: Config, hardware_name: str | None) -> dict[str, Any]:
    """How each parameter of a recipe is split over a machine, whose compiler need not be here.

    Raises:
      UserError: the recipe does not say its model, or does not divide the machine.
    """
    hardware = hardware_of(named(config, hardware_name))
    model = model_of(config)
    # Shapes and shardings need no devices.
    mesh: Any = AbstractMesh(tuple(sizes_of(config.mesh, hardware.devices)), AXES)
    check_model_divides(mesh, model)
    program = stage_of(config.stage).program(config, model, mesh)
    return {
        "hardware": hardware.name,
        "mesh": dict(mesh.shape),
        "layout": layout(program.abstract_state.detach()[0], program.declared),
    }


def named(config: Config, hardware_name: str | None) -> str:
    """The machine that is asked for, or the recipe's own.

    Raises:
      UserError: there is neither.
    """
    name = hardware_name or config.run.hardware
    if name is None:
        raise UserError("this recipe names no machine: give --hardware, such as v5p-16, v6e:4x4 or v5e-256")
    return name


def model_of(config: Config) -> ModelConfig:
    """The model of a recipe, or of the run that it starts from, as machines compute that have bfloat16: all
    that are planned for do.

    Raises:
      UserError: neither says it.
    """
    model = resolved(config).model
    if model is None:
        raise UserError(
            f"this {config.stage} recipe takes its model from {config.start.policy}, which is not there: "
            "train that stage first, or give the section model"
        )
    return model.computed_in("bfloat16")


def prepare(config: Config, hardware: Hardware) -> Plan:
    """Everything that is checked before the compiler is asked.

    Raises:
      UserError: naming what does not fit.
    """
    model = model_of(config)
    attention = resolve(model.kernel, hardware.chip.platform, model.dtype)
    model = model.model_copy(update={"attention": attention})
    mesh = make_mesh(config.mesh, topology_devices(hardware))
    if attention == "cudnn":
        check_cudnn(hardware)
    check_host_memory(hardware, config.mesh.offload != "none" or bool(model.keep_in_host))
    if config.run.epochs is not None:
        raise UserError(
            "run.epochs are counted in steps when the rows are read: to plan, give run.epochs=null and "
            "run.steps"
        )
    check_model_divides(mesh, model)
    check_batch_divides(mesh, config.batch, model)
    check_replies_fit(config)
    return Plan(config, model, hardware, mesh, stage_of(config.stage).program(config, model, mesh))


# --- figures -----------------------------------------------------------------------------------------------


def machine_figures(plan: Plan) -> dict[str, Any]:
    """The machine and the model; `classic_state_bytes` is what all devices together would hold of it in the
    classic recipe (mixed precision, Adam, nothing split)."""
    trained, references = plan.program.trained, plan.program.references
    return {
        "hardware": plan.hardware.name,
        "devices": plan.hardware.devices,
        "links": plan.hardware.links,
        "mesh": {axis: int(size) for axis, size in plan.mesh.shape.items()},
        "parameters": plan.program.parameters,
        "trained_parameters": plan.program.trained_parameters,
        "compute_optimal_tokens": optimal_tokens(plan.program.parameters),
        "classic_state_bytes": classic_bytes(plan.program.parameters, trained, references),
        "attention": plan.model.attention,
        "bubble": bubble_of(plan),
    }


CompiledParts = Mapping[str, Compiled | TooLarge]
"""What the compiler says of each part of a program."""


def compiler_figures(plan: Plan, parts: CompiledParts) -> dict[str, Any]:
    """Memory, time and collectives, by the compiler: of several parts, the largest peak and the sums."""
    limit = plan.hardware.chip.hbm_bytes
    elsewhere = {name: bytes_elsewhere(plan.program, part) for name, part in plan.program.parts.items()}
    peaks = {name: part.peak_bytes + elsewhere[name] for name, part in parts.items()}
    figures: dict[str, Any] = {
        "hbm_bytes": limit,
        "peak_bytes": max(peaks.values()),
        "compile_seconds": round(sum(part.seconds for part in parts.values()), 2),
    }
    if len(parts) > 1:
        figures["parts"] = {
            name: {"peak_bytes": peaks[name], "compile_seconds": round(part.seconds, 2)}
            for name, part in parts.items()
        }
    refused = [part for part in parts.values() if isinstance(part, TooLarge)]
    if refused:
        nothing = dict.fromkeys(
            ("argument_bytes", "temp_bytes", "host_bytes", "collectives", "matmul_flops", "made_whole")
        )
        largest = list(refused[0].largest) or largest_arguments(plan)
        return {"fits": False, **figures, **nothing, "largest": largest}
    compiled = [part for part in parts.values() if isinstance(part, Compiled)]
    top = parts[max(peaks, key=lambda name: peaks[name])]
    assert isinstance(top, Compiled), "none was refused"
    return {
        "fits": figures["peak_bytes"] <= limit,
        **figures,
        "argument_bytes": top.argument_bytes + (figures["peak_bytes"] - top.peak_bytes),
        "temp_bytes": top.temp_bytes,
        "host_bytes": top.host_bytes,
        "collectives": {
            kind: {
                "bytes": sum(part.collectives[kind].bytes for part in compiled if kind in part.collectives),
                "count": sum(part.collectives[kind].count for part in compiled if kind in part.collectives),
            }
            for kind in dict.fromkeys(kind for part in compiled for kind in part.collectives)
        },
        "matmul_flops": sum(part.matmul_flops for part in compiled),
        "largest": largest_arguments(plan),
        "made_whole": [array for part in compiled for array in part.made_whole],
    }


def bytes_elsewhere(program: Program, part: Part) -> int:
    """Bytes of a device that lie there while a part runs that does not read them: other models."""
    held = {id(leaf) for leaf in jax.tree.leaves(part.arguments)}
    resident = jax.tree.leaves((program.abstract_state, program.frozen))
    return sum(shard_bytes(leaf) for leaf in resident if id(leaf) not in held)


def speed_figures(
    plan: Plan, parts: CompiledParts, tokens: float | None, price: float | None
) -> dict[str, Any]:
    """What the bound allows; None where there is none: a program that does not fit, or one that decodes."""
    batch, model, program = plan.config.batch, plan.model, plan.program
    flops = train_flops_per_token(model, batch.sequence_length, **counted(plan))
    total = tokens if tokens is not None else float(program.tokens_per_step * plan.config.run.steps)
    figures: dict[str, Any] = {
        "flops_per_token": flops,
        "flops_per_token_full_attention": flops + masked_flops(model, batch.sequence_length, program),
        "tokens_per_step": program.tokens_per_step,
        "tokens": total,
        "compute_optimal_parameters": optimal_parameters(training_flops(plan.program.parameters, total)),
    }
    names = ("step_seconds_bound", "bound_by", "mfu_bound", "tokens_per_second", "days", "cost", "energy_kwh")
    compiled = parts.get(STEP)
    if program.decodes or not isinstance(compiled, Compiled):
        return figures | dict.fromkeys(names)
    bound = bound_of(plan, compiled)
    speed = program.tokens_per_step / bound.seconds
    chip, devices = plan.hardware.chip, plan.hardware.devices
    hours = total / speed / 3600
    return figures | {
        "step_seconds_bound": bound.seconds,
        "bound_by": bound.by,
        "mfu_bound": flops * speed / (chip.flops * devices),
        "tokens_per_second": speed,
        "days": hours / 24,
        "cost": None if price is None else price * plan.hardware.chips * hours,
        "energy_kwh": None if chip.watts is None else chip.watts * devices * hours / 1000,
    }


def masked_flops(model: ModelConfig, sequence_length: int, program: Program) -> float:
    """FLOPs per token of the masked half of attention, which the older convention counts too."""
    masked = 6 * model.n_layers * model.n_heads * model.k_dim * sequence_length
    return masked * (1 + program.references / 3)


def bound_of(plan: Plan, compiled: Compiled) -> Bound:
    """The floors of one device's step."""
    config, shape, program = plan.config, plan.mesh.shape, plan.program
    tuning, trained = config.tuning, plan.program.trained_parameters
    frozen = parameter_count(program.frozen) if tuning else 0
    # What a loss compares with is all that training began from, and so what stays too.
    multiplied = frozen if tuning and program.references else trained + frozen
    matrices = 1.0 if tuning else matmul_parameters(plan.model, 0) / trained
    shards = plan.hardware.devices // shape["data"]
    return step_bound(
        plan.hardware.chip,
        model=plan.model,
        sequence_length=plan.config.batch.sequence_length,
        tokens_per_device=program.tokens_per_step / plan.hardware.devices,
        parameter_shard=trained / shards,
        gathered_parameters=multiplied / (shape["tensor"] * shape["stage"]),
        sent_bytes=sum(exchange.bytes for exchange in compiled.collectives.values()),
        passes=(2 if tuning else 3) + (plan.model.remat != "none"),
        between_nodes_bytes=sum(exchange.between_nodes for exchange in compiled.collectives.values()),
        idle=bubble_of(plan),
        update_bytes=update_bytes(config.optimizer, matrices),
        **counted(plan),
    )


def bubble_of(plan: Plan) -> float:
    """Share of a step in which a stage of the pipeline waits."""
    stages, model = plan.mesh.shape["stage"], plan.model
    return bubble(stages, model.pipeline_microbatches or stages, model.pipeline_rounds)


def counted(plan: Plan) -> dict[str, Any]:
    """What a training pass has beside a language model's: frozen models that it goes with, a head of another
    width, adapters."""
    program = plan.program
    return {"references": program.references, "head": program.head, "tuning": plan.config.tuning}


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a device's shard of an array."""
    assert leaf.sharding is not None, "the state and what stays have shardings"
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def largest_arguments(plan: Plan, count: int = 5) -> list[str]:
    """The largest arrays that live through the step, with the bytes of one device's shard."""
    arrays = {"state": plan.program.abstract_state, "frozen": plan.program.frozen}
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    leaves.sort(key=lambda pair: -shard_bytes(pair[1]))
    return [
        f"{decimal(shard_bytes(leaf))} {name(path)} {leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in leaves[:count]
    ]
