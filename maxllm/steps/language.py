"""Next-token prediction: the loss of pretraining and of SFT (which differ only in their loss weights).

`steps/update.py` turns it into a step.
"""

from __future__ import annotations

import jax

from maxllm.model.forward import forward
from maxllm.model.llama import Llama, head_weight
from maxllm.records import LmBatch, Params
from maxllm.steps.head import head_loss
from maxllm.steps.update import Loss


def language_loss(
    model: Llama, params: Params, batch: LmBatch, key: jax.Array | None, adapters: Params | None = None
) -> Loss:
    """Cross-entropy in nats over the weighted targets. Without a key, dropout is off."""
    inputs = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    x_BTD = forward(model, params, *inputs, key, adapters, method="hidden")
    sums = head_loss(x_BTD, head_weight(model, params), batch.targets_BT, batch.loss_weights_BT)
    return Loss(sums.total, sums.weight, {"accuracy": (sums.right, sums.weight)})


def adapters_loss(
    model: Llama, adapters: Params, batch: LmBatch, key: jax.Array | None, base: Params
) -> Loss:
    """The same with adapters (LoRA) to train, beside `base`, the model's own parameters, which stay."""
    return language_loss(model, base, batch, key, adapters)
