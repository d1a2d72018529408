"""Calling a model: its fresh weights, what they are, and what it computes with them."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp

from maxllm.model.adapters import COLLECTION
from maxllm.records import Array
from maxllm.weights import Weights, declarations


def init_weights(model: nn.Module, key: jax.Array) -> Weights:
    """Fresh weights, still boxed; with adapters where the model's `tuning` has them."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    variables = model.init(key, tokens_BT, jnp.ones_like(tokens_BT), tokens_BT)
    return Weights(variables["params"], variables.get(COLLECTION))


@cache
def declarations_of(model: nn.Module) -> Weights:
    """A `Declaration` of each of a model's weights."""
    return declarations(jax.eval_shape(lambda key: init_weights(model, key), jax.random.key(0)))


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
