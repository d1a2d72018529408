"""The programs of stages that train one model on a batch."""

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
from maxllm.model.llama import Llama
from maxllm.optim import make_optimizer
from maxllm.plan.flops import train_flops_per_token
from maxllm.records import LmBatch, PairBatch, Params
from maxllm.run.program import Program, step_alone
from maxllm.steps.language import adapters_loss, language_loss
from maxllm.steps.state import TrainState, abstract, init_adapters, init_params, initializer
from maxllm.steps.update import Loss, train_step


@dataclass(frozen=True, kw_only=True)
class Trainer(Program):
    """The program of a stage that trains one model."""

    loss_fn: Callable[..., Loss]
    optimizer: optax.GradientTransformation


def language_program(config: Config, model: ModelConfig, mesh: Mesh) -> Trainer:
    """Next-token prediction by the whole model or, with `lora`, by adapters beside it."""
    llama = Llama(model, config.lora)
    B, T = config.batch.rows, config.batch.sequence_length
    ids, weights = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.float32)
    batch = LmBatch(ids, ids, weights, ids, ids)
    if config.lora is None:
        return trainer(config, model, mesh, llama, partial(language_loss, llama), batch)
    base = abstract(partial(init_params, Llama(model)), mesh)
    loss = partial(adapters_loss, llama)
    return trainer(config, model, mesh, llama, loss, batch, init_trained=init_adapters, frozen=(base,))


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
    model: Any,
    loss_fn: Callable[..., Loss],
    batch: Any,
    *,
    sequences: int = 1,
    head: int | None = None,
    references: int = 0,
    init_trained: Callable[[Any, jax.Array], Params] = init_params,
    frozen: tuple[Params, ...] = (),
) -> Trainer:
    """One model, one optimizer, one loss.

    Args:
      config: the recipe.
      shape: the model's configuration.
      mesh: the device mesh.
      model: what is trained, a Flax module.
      loss_fn: (params, batch, dropout key, *frozen) -> Loss.
      batch: shapes and types of a batch.
      sequences: of batch.sequence_length tokens in each row of the batch.
      head: width of the model's output; None for the vocabulary.
      references: models of the same shape that are run beside it.
      init_trained: (model, key) -> what the optimizer moves.
      frozen: abstract trees that the loss reads and that stay.
    """
    optimizer = make_optimizer(config.optimizer, config.updates)
    init: Callable[[jax.Array], TrainState] = initializer(model, optimizer, init_trained)
    step = partial(
        train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        seed=config.run.seed,
        microbatches=config.batch.microbatches,
        gradient_dtype=jnp.dtype(config.optimizer.gradient_dtype),
    )
    state = abstract(init, mesh, config.mesh.zero, config.mesh.offload)
    tokens = sequences * config.batch.rows * config.batch.sequence_length
    per_token = train_flops_per_token(shape, config.batch.sequence_length, head, references)
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
    )
