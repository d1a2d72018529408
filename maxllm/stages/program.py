"""The programs of stages that train one model on a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxllm.config.model import ModelConfig
from maxllm.config.root import Config
from maxllm.losses.token import Regularization
from maxllm.model.compressed import compress
from maxllm.model.forward import declarations_of, init_weights
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import Optimizer, make_optimizer
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import LmBatch, PairBatch
from maxllm.run.program import Program, step_alone
from maxllm.steps.language import language_loss
from maxllm.steps.state import abstract, initializer, parameter_count, partition_of
from maxllm.steps.update import Loss, train_step
from maxllm.weights import Partition, Weights


@dataclass(frozen=True, kw_only=True)
class Trainer(Program):
    """The program of a stage that trains one model."""

    loss_fn: Callable[..., Loss]
    optimizer: Optimizer
    model: Llama | ScalarModel
    partition: Partition
    """What of the model's weights is in the state. `frozen` has the others, or, where there are `references`,
    all weights that training began from."""


def language_program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """Next-token prediction."""
    llama = Llama(model, config.tuning)
    B, T = config.batch.rows, config.batch.sequence_length
    ids, weights = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.float32)
    batch = LmBatch(ids, ids, weights, ids, ids)
    added = Regularization(config.loss.label_smoothing, config.loss.z)
    loss = partial(language_loss, llama, regularization=added)
    return trainer(config, model, mesh, llama, loss, batch)


def abstract_start(config: Config, model: Llama | ScalarModel, mesh: Mesh) -> Weights:
    """Shapes and shardings of all weights that training begins from."""

    def start(key: jax.Array) -> Weights:
        weights = init_weights(model, key)
        continued = config.start.adapters == "continue"
        return frozen_type(model, weights if continued else weights.replace(adapters=None))

    weights: Weights = abstract(start, mesh)
    return weights


def abstract_kept(model: Llama | ScalarModel, mesh: Mesh) -> Weights:
    """Shapes and shardings of the weights that are not trained."""
    partition = partition_of(model)

    def stays(key: jax.Array) -> Weights:
        kept = partition.split(init_weights(model, key))[1]
        assert kept is not None, "something is kept"
        return frozen_type(model, kept)

    kept: Weights = abstract(stays, mesh)
    return kept


def frozen_type(model: Llama | ScalarModel, weights: Weights) -> Weights:
    """Weights that stay, in boxes or not, in the type in which they are kept."""
    if model.tuning is None:
        return weights
    return compress(weights, declarations_of(model).base, model.tuning.frozen_dtype)


def kept_parameters(model: Llama | ScalarModel) -> int:
    """Parameters of a model that are not trained."""
    partition = partition_of(model)
    kept = jax.eval_shape(lambda key: partition.split(init_weights(model, key))[1], jax.random.key(0))
    return parameter_count(kept)


def pair_batch(B: int, T: int) -> PairBatch:
    """Shapes and types of B pairs."""
    return PairBatch(
        jax.ShapeDtypeStruct((B, 2, T), jnp.int32),
        jax.ShapeDtypeStruct((B, 2), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.float32),
    )


def trainer(
    config: Config,
    shape: ModelConfig,
    mesh: Mesh,
    model: Llama | ScalarModel,
    loss_fn: Callable[..., Loss],
    batch: Any,
    *,
    sequences: int = 1,
    head: int | None = None,
    references: int = 0,
) -> Trainer:
    """One model, one optimizer, one loss.

    Args:
      config: the recipe.
      shape: the model's configuration.
      mesh: the device mesh.
      model: what is trained, a Flax module.
      loss_fn: (weights, batch, dropout key) -> Loss; with `references`, the weights that training began from
        are a fourth argument.
      batch: shapes and types of a batch.
      sequences: of batch.sequence_length tokens in each row of the batch.
      head: width of the model's output; None for the vocabulary.
      references: models of the same shape that are run beside it: 1 where the loss compares with where
        training began.
    """
    partition = partition_of(model)
    if references:
        frozen: tuple[Weights, ...] = (abstract_start(config, model, mesh),)
    else:
        frozen = (abstract_kept(model, mesh),) if partition.keeps else ()
    optimizer = make_optimizer(config.optimizer, config.updates, partition.declared)
    init = initializer(model, optimizer)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        seed=config.run.seed,
        microbatches=config.batch.microbatches,
        gradient_dtype=jnp.dtype(config.optimizer.gradient_dtype),
        partition=partition,
        compares=references > 0,
    )
    state = abstract(init, mesh, config.mesh.zero, config.mesh.offload)
    tokens = sequences * config.batch.rows * config.batch.sequence_length
    per_token = train_flops_per_token(shape, config.batch.sequence_length, head, references, config.tuning)
    return Trainer(
        init=init,
        abstract_state=state,
        abstract_batch=batch,
        frozen=frozen,
        **step_alone(step, state, batch, frozen),
        tokens_per_step=tokens,
        flops_per_step=tokens * per_token,
        references=references,
        head=head,
        loss_fn=loss_fn,
        optimizer=optimizer,
        model=model,
        partition=partition,
        declared=partition.declared,
        kept_parameters=kept_parameters(model),
    )
