"""Calling a model."""

import flax.linen as nn
import jax

from maxllm.records import Array
from maxllm.weights import Weights


def forward(
    model: nn.Module,
    weights: Weights,
    tokens_BT: Array,
    segment_ids_BT: Array,
    positions_BT: Array,
    dropout_key: jax.Array | None = None,
    method: str = "__call__",
) -> jax.Array:
    """What a `Llama` (logits [B, T, V]) or a `ScalarModel` (numbers [B, T]) says, in float32.

    Without a dropout key, dropout is off. With method="hidden" it is what the head of a `Llama` reads,
    [B, T, D] in the compute type.
    """
    output = model.apply(
        weights.collections(),
        tokens_BT,
        segment_ids_BT,
        positions_BT,
        deterministic=dropout_key is None,
        method=method,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    assert isinstance(output, jax.Array), "no collection is mutable, so the output stands alone"
    return output
