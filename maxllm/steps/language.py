"""Next-token prediction: the loss of pretraining and of SFT (which differ only in their loss weights).

`steps/update.py` turns it into a step.
"""

from __future__ import annotations

import jax

from maxllm.model.forward import forward
from maxllm.model.llama import Llama, head_weight
from maxllm.records import LmBatch
from maxllm.steps.head import head_loss
from maxllm.steps.update import Loss
from maxllm.weights import Weights


def language_loss(model: Llama, weights: Weights, batch: LmBatch, key: jax.Array | None) -> Loss:
    """Cross-entropy in nats over the weighted targets. Without a key, dropout is off."""
    inputs = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    x_BTD = forward(model, weights, *inputs, key, method="hidden")
    sums = head_loss(x_BTD, head_weight(model, weights), batch.targets_BT, batch.loss_weights_BT)
    return Loss(sums.total, sums.weight, {"accuracy": (sums.right, sums.weight)})
