"""The reward model: Bradley-Terry on completions of one prompt."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from maxllm.config.reward import RewardConfig
from maxllm.losses import preference
from maxllm.model.forward import forward
from maxllm.records import PairBatch
from maxllm.steps.update import Loss
from maxllm.weights import Weights


def right_padded(tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens, segment ids, positions) of rows that are one sequence each, with padding after it."""
    slots_T = jnp.arange(tokens_BT.shape[1])
    segment_ids_BT = (slots_T < lengths_B[:, None]).astype(jnp.int32)
    return tokens_BT, segment_ids_BT, jnp.broadcast_to(slots_T, tokens_BT.shape)


def score(
    model: nn.Module,
    weights: Weights,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array | None = None,
) -> jax.Array:
    """Score of right-padded sequences, read at their last real token, [B] float32."""
    scores_BT = forward(model, weights, *right_padded(tokens_BT, lengths_B), key)
    return jnp.take_along_axis(scores_BT, jnp.maximum(lengths_B - 1, 0)[:, None], axis=1)[:, 0]


def reward_loss(
    model: nn.Module, config: RewardConfig, weights: Weights, batch: PairBatch, key: jax.Array | None
) -> Loss:
    """Pairwise loss, averaged over prompts. All completions of a prompt go through one forward pass."""
    B, C, T = batch.tokens_BCT.shape
    flat_B = score(model, weights, batch.tokens_BCT.reshape(B * C, T), batch.lengths_BC.reshape(B * C), key)
    scores_BC = flat_B.reshape(B, C)
    losses_B = preference.pairwise(scores_BC, config.margin, config.centering)
    first_is_best_B = jnp.all(scores_BC[:, :1] > scores_BC[:, 1:], axis=1).astype(jnp.float32)
    weight = jnp.sum(batch.weights_B)

    def weighted(x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(x_B * batch.weights_B), weight

    return Loss(
        *weighted(losses_B),
        {
            "accuracy": weighted(first_is_best_B),
            "score_chosen": weighted(scores_BC[:, 0]),
            "score_rejected": weighted(jnp.mean(scores_BC[:, 1:], axis=1)),
        },
    )
