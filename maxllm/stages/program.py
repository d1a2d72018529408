"""The program of each stage that trains: its state, its step and the shape of its batch, without its data.

The stage runs it, `plan` compiles it for machines that are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maxllm.config import Config, ModelConfig
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.records import LmBatch, PairBatch, Params, ReplyPairBatch
from maxllm.steps.dpo import dpo_loss
from maxllm.steps.language import adapters_loss, language_loss
from maxllm.steps.reward import reward_loss
from maxllm.steps.state import TrainState, abstract, init_adapters, init_params, initializer
from maxllm.steps.update import Loss, train_step


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one stage compiles."""

    init: Callable[[jax.Array], Any]
    """key -> a fresh state, boxed."""
    abstract_state: Any
    step: Callable[..., Any]
    """(state, batch, *frozen) -> (state, metrics)."""
    abstract_batch: Any
    """Shapes and types of a batch."""
    frozen: tuple[Params, ...] = ()
    """Abstract trees that the step reads besides."""


@dataclass(frozen=True, kw_only=True)
class Trainer(Program):
    """That of a stage which trains one model."""

    loss_fn: Callable[..., Loss]
    optimizer: optax.GradientTransformation


def language_program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """Pretraining, and SFT of the whole model or, with `lora`, of adapters beside it."""
    llama = Llama(model, config.lora)
    B, T = config.batch.rows, config.batch.sequence_length
    ids, weights = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.float32)
    batch = LmBatch(ids, ids, weights, ids, ids)
    if config.lora is None:
        return trained(config, mesh, llama, partial(language_loss, llama), batch)
    base = abstract(partial(init_params, Llama(model)), mesh)
    return trained(config, mesh, llama, partial(adapters_loss, llama), batch, init_adapters, (base,))


def reward_program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """The reward model, on pairs."""
    scalar = ScalarModel(model)
    batch = pair_batch(config.batch.rows, config.batch.sequence_length)
    return trained(config, mesh, scalar, partial(reward_loss, scalar, config.reward), batch)


def dpo_program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """DPO, on pairs, beside the frozen reference."""
    llama = Llama(model)
    B, T = config.batch.rows, config.batch.sequence_length
    batch = ReplyPairBatch(pair_batch(B, T), jax.ShapeDtypeStruct((B, 2), jnp.int32))
    reference = abstract(partial(init_params, llama), mesh)
    return trained(config, mesh, llama, partial(dpo_loss, llama, config.dpo), batch, frozen=(reference,))


def pair_batch(B: int, T: int) -> PairBatch:
    """Shapes and types of B pairs."""
    return PairBatch(
        jax.ShapeDtypeStruct((B, 2, T), jnp.int32),
        jax.ShapeDtypeStruct((B, 2), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.float32),
    )


def trained(
    config: Config,
    mesh: Mesh,
    model: Any,
    loss_fn: Callable[..., Loss],
    batch: Any,
    init_trained: Callable[[Any, jax.Array], Params] = init_params,
    frozen: tuple[Params, ...] = (),
) -> Trainer:
    """One model, one optimizer, one loss."""
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    init: Callable[[jax.Array], TrainState] = initializer(model, optimizer, init_trained)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        seed=config.run.seed,
        microbatches=config.batch.microbatches,
        gradient_dtype=jnp.dtype(config.optimizer.gradient_dtype),
    )
    return Trainer(
        init=init,
        abstract_state=abstract(init, mesh, config.mesh.zero, config.mesh.offload),
        step=step,
        abstract_batch=batch,
        frozen=frozen,
        loss_fn=loss_fn,
        optimizer=optimizer,
    )
