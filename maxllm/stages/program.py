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
from maxllm.records import LmBatch, PairBatch, ReplyPairBatch
from maxllm.steps.dpo import dpo_loss
from maxllm.steps.language import language_loss
from maxllm.steps.reward import reward_loss
from maxllm.steps.state import abstract, init_params, initializer, partition_of
from maxllm.steps.update import Loss, train_step
from maxllm.weights import Partition, Weights


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
    frozen: tuple[Any, ...] = ()
    """Abstract trees that the step reads besides."""


@dataclass(frozen=True, kw_only=True)
class Trainer(Program):
    """That of a stage which trains one model."""

    loss_fn: Callable[..., Loss]
    optimizer: optax.GradientTransformation
    partition: Partition
    """What of the model's weights is in the state."""


def language_program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """Pretraining, and SFT of the whole model or, with `lora`, of adapters beside it."""
    llama = Llama(model, config.lora)
    B, T = config.batch.rows, config.batch.sequence_length
    ids, weights = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.float32)
    batch = LmBatch(ids, ids, weights, ids, ids)
    frozen = () if config.lora is None else (abstract_base(Llama(model), mesh),)
    return trained(config, mesh, llama, partial(language_loss, llama), batch, frozen)


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
    loss_fn = partial(dpo_loss, llama, config.dpo)
    return trained(config, mesh, llama, loss_fn, batch, (abstract_base(llama, mesh),))


def abstract_base(model: Any, mesh: Mesh) -> Weights:
    """Shapes and shardings of a model's weights where they are frozen."""
    return Weights(abstract(partial(init_params, model), mesh))


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
    frozen: tuple[Weights, ...] = (),
) -> Trainer:
    """One model, one optimizer, one loss."""
    partition = partition_of(model)
    optimizer = make_optimizer(config.optimizer, config.run.steps, partition.declared)
    init = initializer(model, optimizer)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        seed=config.run.seed,
        microbatches=config.batch.microbatches,
        gradient_dtype=jnp.dtype(config.optimizer.gradient_dtype),
        partition=partition,
    )
    return Trainer(
        init=init,
        abstract_state=abstract(init, mesh, config.mesh.zero, config.mesh.offload),
        step=step,
        abstract_batch=batch,
        frozen=frozen,
        loss_fn=loss_fn,
        optimizer=optimizer,
        partition=partition,
    )
