"""Plan: what a recipe would cost on a machine that is not here, asked of that machine's own compiler.

    maxllm plan configs/pretrain/llama2-7b_synthetic_v5p-16.yaml
    maxllm plan pretrain/tiny_slice_cpu --hardware v6e-16 mesh.fsdp=-1 --json

The program that is compiled is the one that the stage would run: same state, same step, same batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from rich.filesize import decimal

from maxllm.config import Config, ModelConfig
from maxllm.errors import UserError
from maxllm.model.attend import resolve
from maxllm.parallel.mesh import check_batch_divides, check_model_divides, make_mesh
from maxllm.parallel.pipeline import bubble
from maxllm.plan import search
from maxllm.plan.compile import Compiled, TooLarge, check_cudnn, compiled_for, topology_devices
from maxllm.plan.flops import matmul_parameters, train_flops_per_token
from maxllm.plan.hardware import Hardware, hardware_of
from maxllm.plan.roofline import Bound, step_bound, update_bytes
from maxllm.plan.scaling import (
    classic_bytes,
    classic_dpo_bytes,
    classic_ppo_bytes,
    optimal_parameters,
    optimal_tokens,
    training_flops,
)
from maxllm.run.session import check_replies_fit, lower_step, resolved
from maxllm.stages.ppo import algorithm_of, check_sampling, program_of
from maxllm.stages.program import Program, dpo_program, language_program, reward_program
from maxllm.steps.state import parameter_count

STOP, PAD = (2,), 0
"""Stand-ins for the tokenizer's: any ids compile to the same program."""


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
    name = hardware_name or config.run.hardware
    if name is None:
        raise UserError("this recipe names no machine: give --hardware, such as v5p-16, v6e:4x4 or v5e-256")
    hardware = hardware_of(name)
    plan = prepare(config, hardware)
    asked = compiled_for(
        hardware,
        lambda: lower_step(
            plan.mesh,
            plan.program.step,
            plan.program.abstract_state,
            plan.program.abstract_batch,
            *plan.program.frozen,
            zero=config.mesh.zero,
        ),
    )
    return machine_figures(plan) | compiler_figures(plan, asked) | speed_figures(plan, asked, tokens, price)


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
    for candidate, said in zip(fitting[:CONFIRMED], figures["best"], strict=False):
        said["compiled"] = compiled = run(candidate.config, figures["hardware"])
        if compiled["fits"] and figures["chosen"] is None:
            figures["chosen"] = said["words"]
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


def prepare(config: Config, hardware: Hardware) -> Plan:
    """Everything that is checked before the compiler is asked.

    Raises:
      UserError: naming what does not fit.
    """
    model = resolved(config).model
    if model is None:
        raise UserError(
            f"this {config.stage} recipe takes its model from {config.start.policy}, which is not there: "
            "train that stage first, or give the section model"
        )
    attention = resolve(model.kernel, hardware.chip.platform, model.dtype)
    model = model.model_copy(update={"attention": attention})
    mesh = make_mesh(config.mesh, topology_devices(hardware))
    if attention == "cudnn":
        check_cudnn(hardware)
    check_model_divides(mesh, model)
    check_batch_divides(mesh, config.batch, model)
    check_replies_fit(config)
    return Plan(config, model, hardware, mesh, program_for(config, model, mesh))


def program_for(config: Config, model: ModelConfig, mesh: Mesh) -> Program:
    """What the recipe's stage compiles."""
    match config.stage:
        case "pretrain" | "sft":
            return language_program(config, model, mesh)
        case "reward":
            return reward_program(config, model, mesh)
        case "dpo":
            return dpo_program(config, model, mesh)
        case "ppo":
            check_sampling(config.generation)
            check_batch_divides(mesh, config.batch, model, config.ppo.minibatches)
            return program_of(config, mesh, algorithm_of(config, model, STOP, PAD))
        case "convert":
            raise UserError("a converted model's folder trains nothing; plan a recipe that starts from it")


# --- figures -----------------------------------------------------------------------------------------------


def machine_figures(plan: Plan) -> dict[str, Any]:
    """The machine and the model; `classic_state_bytes` is what all devices together would hold of it in the
    classic recipe (mixed precision, Adam, nothing split)."""
    classic = {"ppo": classic_ppo_bytes, "dpo": classic_dpo_bytes}.get(plan.config.stage, classic_bytes)
    return {
        "hardware": plan.hardware.name,
        "devices": plan.hardware.devices,
        "links": plan.hardware.links,
        "mesh": {axis: int(size) for axis, size in plan.mesh.shape.items()},
        "parameters": parameters_of(plan),
        "compute_optimal_tokens": optimal_tokens(parameters_of(plan)),
        "classic_state_bytes": classic(parameters_of(plan)),
        "attention": plan.model.attention,
        "bubble": bubble_of(plan),
    }


def compiler_figures(plan: Plan, asked: Compiled | TooLarge) -> dict[str, Any]:
    """Memory, time and collectives, by the compiler."""
    limit = plan.hardware.chip.hbm_bytes
    figures = {"hbm_bytes": limit, "peak_bytes": asked.peak_bytes, "compile_seconds": round(asked.seconds, 2)}
    if isinstance(asked, TooLarge):
        nothing = dict.fromkeys(
            ("argument_bytes", "temp_bytes", "host_bytes", "collectives", "matmul_flops", "made_whole")
        )
        return {
            "fits": False,
            **figures,
            **nothing,
            "largest": list(asked.largest) or largest_arguments(plan),
        }
    return {
        "fits": asked.peak_bytes <= limit,
        **figures,
        "argument_bytes": asked.argument_bytes,
        "temp_bytes": asked.temp_bytes,
        "host_bytes": asked.host_bytes,
        "collectives": {
            kind: {"bytes": exchange.bytes, "count": exchange.count}
            for kind, exchange in asked.collectives.items()
        },
        "matmul_flops": asked.matmul_flops,
        "largest": largest_arguments(plan),
        "made_whole": list(asked.made_whole),
    }


def speed_figures(
    plan: Plan, asked: Compiled | TooLarge, tokens: float | None, price: float | None
) -> dict[str, Any]:
    """What the bound allows; None where there is none: a program that does not fit, or PPO, whose decoding is
    bound by other things."""
    batch, model, stage = plan.config.batch, plan.model, plan.config.stage
    per_step = batch.rows * batch.sequence_length * (2 if stage in ("reward", "dpo") else 1)
    flops = train_flops_per_token(model, batch.sequence_length, **counted(plan))
    total = tokens if tokens is not None else float(per_step * plan.config.run.steps)
    figures: dict[str, Any] = {
        "flops_per_token": flops,
        "flops_per_token_full_attention": full_attention(plan, flops),
        "tokens_per_step": per_step,
        "tokens": total,
        "compute_optimal_parameters": optimal_parameters(training_flops(parameters_of(plan), total)),
    }
    names = ("step_seconds_bound", "bound_by", "mfu_bound", "tokens_per_second", "days", "cost", "energy_kwh")
    if isinstance(asked, TooLarge) or stage == "ppo":
        return figures | dict.fromkeys(names)
    bound = bound_of(plan, asked, per_step)
    speed = per_step / bound.seconds
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


def bound_of(plan: Plan, asked: Compiled, tokens: int) -> Bound:
    """The floors of one device's step."""
    config, shape = plan.config, plan.mesh.shape
    trained, frozen = parameters_of(plan), parameter_count(plan.program.frozen) if config.lora else 0
    # Adapters are beside the layers' matrices alone.
    matrices = 1.0 if config.lora else matmul_parameters(plan.model, 0) / trained
    shards = plan.hardware.devices // shape["data"]
    return step_bound(
        plan.hardware.chip,
        model=plan.model,
        sequence_length=plan.config.batch.sequence_length,
        tokens_per_device=tokens / plan.hardware.devices,
        parameter_shard=trained / shards,
        gathered_parameters=(trained + frozen) / (shape["tensor"] * shape["stage"]),
        sent_bytes=sum(exchange.bytes for exchange in asked.collectives.values()),
        passes=(2 if config.lora else 3) + (plan.model.remat != "none"),
        between_nodes_bytes=sum(exchange.between_nodes for exchange in asked.collectives.values()),
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
    width, adapters. PPO, whose speed has no bound, is not asked."""
    stage = plan.config.stage
    return {
        "references": int(stage == "dpo"),
        "head": 1 if stage == "reward" else None,
        "lora": plan.config.lora,
    }


def full_attention(plan: Plan, flops: float) -> float:
    """FLOPs per token by the older convention, which counts the masked half of attention too."""
    model, references = plan.model, counted(plan)["references"]
    masked = 6 * model.n_layers * model.n_heads * model.k_dim * plan.config.batch.sequence_length
    return flops + masked * (1 + references / 3)


def parameters_of(plan: Plan) -> int:
    """Of the model that is trained; of PPO's actor."""
    state = plan.program.abstract_state
    return parameter_count((state.actor if plan.config.stage == "ppo" else state).params)


def largest_arguments(plan: Plan, count: int = 5) -> list[str]:
    """The largest arrays that live through the step, with the bytes of one device's shard."""

    def shard_bytes(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    arrays = {"state": plan.program.abstract_state, "frozen": plan.program.frozen}
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    leaves.sort(key=lambda pair: -shard_bytes(pair[1]))
    return [
        f"{decimal(shard_bytes(leaf))} {name(path)} {leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in leaves[:count]
    ]
