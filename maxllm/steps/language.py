"""Next-token prediction: the loss of pretraining and of SFT (which differ only in their loss weights).

`steps/update.py` turns it into a step.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from maxllm.losses import token
from maxllm.model.forward import forward
from maxllm.records import LmBatch, Params
from maxllm.steps.update import Loss


def language_loss(
    model: nn.Module, params: Params, batch: LmBatch, key: jax.Array | None, adapters: Params | None = None
) -> Loss:
    """Cross-entropy in nats over the weighted targets. Without a key, dropout is off."""
    inputs = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    logits_BTV = forward(model, params, *inputs, key, adapters)
    total, weight = token.cross_entropy(logits_BTV, batch.targets_BT, batch.loss_weights_BT)
    right_BT = (jnp.argmax(logits_BTV, -1) == batch.targets_BT) * batch.loss_weights_BT
    return Loss(total, weight, {"accuracy": (jnp.sum(right_BT), weight)})


def adapters_loss(
    model: nn.Module, adapters: Params, batch: LmBatch, key: jax.Array | None, base: Params
) -> Loss:
    """The same with adapters (LoRA) to train, beside `base`, the model's own parameters, which stay."""
    return language_loss(model, base, batch, key, adapters)
