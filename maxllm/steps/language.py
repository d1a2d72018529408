"""Next-token prediction: the step of pretraining and of SFT (which differ only in their loss weights)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maxllm.losses import token
from maxllm.model.forward import forward
from maxllm.records import LmBatch, Metrics, Params
from maxllm.steps.state import TrainState
from maxllm.steps.update import Loss, update


def language_loss(
    model: nn.Module, params: Params, batch: LmBatch, key: jax.Array | None, adapters: Params | None = None
) -> Loss:
    """Cross-entropy in nats over the weighted targets. Without a key, dropout is off."""
    inputs = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    logits_BTV = forward(model, params, *inputs, key, adapters)
    total, weight = token.cross_entropy(logits_BTV, batch.targets_BT, batch.loss_weights_BT)
    right_BT = (jnp.argmax(logits_BTV, -1) == batch.targets_BT) * batch.loss_weights_BT
    return Loss(total, weight, {"accuracy": (jnp.sum(right_BT), weight)})


def train_step(
    state: TrainState,
    batch: LmBatch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    microbatches: int,
) -> tuple[TrainState, Metrics]:
    """One update of a language model."""
    return update(
        state,
        batch,
        jax.random.fold_in(jax.random.key(seed), state.step),
        loss_fn=lambda params, part, key: language_loss(model, params, part, key),
        optimizer=optimizer,
        microbatches=microbatches,
    )


def train_adapters(
    state: TrainState,
    batch: LmBatch,
    base: Params,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    microbatches: int,
) -> tuple[TrainState, Metrics]:
    """One update of a model's adapters (state.params); `base` are its parameters, which stay as they are."""
    return update(
        state,
        batch,
        jax.random.fold_in(jax.random.key(seed), state.step),
        loss_fn=lambda adapters, part, key: language_loss(model, base, part, key, adapters),
        optimizer=optimizer,
        microbatches=microbatches,
    )


def eval_step(params: Params, batch: LmBatch, *, model: nn.Module) -> Metrics:
    """Loss (nats, weighted targets) and next-token accuracy, as (sum, count)."""
    loss = language_loss(model, params, batch, None)
    return loss.metrics | {"loss": (loss.total, loss.weight)}
