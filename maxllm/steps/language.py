"""Next-token prediction: the loss of pretraining and of SFT (which differ only in their loss weights).

`steps/update.py` turns it into a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from maxllm.losses.token import UNREGULARIZED, Regularization
from maxllm.model.forward import forward
from maxllm.model.llama import Llama, head_weight
from maxllm.records import Array, LmBatch, Metrics
from maxllm.steps.head import head_chosen, head_loss
from maxllm.steps.update import Loss
from maxllm.weights import Weights


def language_loss(
    model: Llama,
    weights: Weights,
    batch: LmBatch,
    key: jax.Array | None,
    regularization: Regularization = UNREGULARIZED,
) -> Loss:
    """Cross-entropy in nats over the weighted targets.

    Without a key, as in evaluation, dropout is off and nothing is added to the cross-entropy. Where something
    is, the metric `cross_entropy` has it alone.
    """
    inputs = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    x_BTD = forward(model, weights, *inputs, key, method="hidden")
    added = UNREGULARIZED if key is None else regularization
    sums = head_loss(x_BTD, head_weight(model, weights), batch.targets_BT, batch.loss_weights_BT, added)
    metrics: Metrics = {"accuracy": (sums.right, sums.weight)}
    if added != UNREGULARIZED:
        metrics["cross_entropy"] = (sums.plain, sums.weight)
    return Loss(sums.total, sums.weight, metrics)


def origin_losses(
    model: Llama,
    present: Mapping[str, Sequence[int]],
    weights: Weights,
    batch: tuple[LmBatch, Mapping[str, Array]],
) -> Metrics:
    """The held-out loss and accuracy over all weighted targets, and the loss over those of each origin.

    Args:
      model: without dropout.
      present: kind of origin -> the numbers of that kind that are measured, "loss/KIND NUMBER" each.
      weights: the model's.
      batch: rows, and for each kind the number that every target has, int32 [B, T].
    """
    rows, origins = batch
    x_BTD = forward(model, weights, rows.tokens_BT, rows.segment_ids_BT, rows.positions_BT, method="hidden")
    chosen = head_chosen(x_BTD, head_weight(model, weights), rows.targets_BT)
    counted_BT = rows.loss_weights_BT

    def mean(values_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(values_BT * weights_BT), jnp.sum(weights_BT)

    metrics = {"loss": mean(-chosen.logps, counted_BT), "accuracy": mean(chosen.right, counted_BT)}
    for kind, numbers in present.items():
        for number in numbers:
            metrics[f"loss/{kind} {number}"] = mean(-chosen.logps, counted_BT * (origins[kind] == number))
    return metrics
