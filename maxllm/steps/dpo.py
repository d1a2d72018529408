"""DPO: the policy learns from preferences by itself, held near a frozen reference, without a reward model.

What a reward model would say of a completion is beta log(pi / ref), up to a number that depends on the prompt
alone (Rafailov et al. 2023, eq. 5). So the Bradley-Terry loss of two completions is a loss of the policy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxllm.config.dpo import DpoConfig
from maxllm.losses import preference
from maxllm.model.forward import forward
from maxllm.model.llama import Llama, head_weight
from maxllm.records import ReplyPairBatch
from maxllm.steps.head import head_logps
from maxllm.steps.reward import right_padded
from maxllm.steps.update import Loss
from maxllm.weights import Weights


def reply_logps(
    model: Llama, weights: Weights, batch: ReplyPairBatch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """log p(completion | prompt), summed over its tokens, and how many these are, both [B, C] float32.

    The token that ends the completion is one of them. All completions go through one forward pass; without a
    key, dropout is off.
    """
    B, C, T = batch.pairs.tokens_BCT.shape
    tokens_BT, lengths_B = batch.pairs.tokens_BCT.reshape(B * C, T), batch.pairs.lengths_BC.reshape(B * C)
    x_BTD = forward(model, weights, *right_padded(tokens_BT, lengths_B), key, method="hidden")
    logps_BT = head_logps(x_BTD, head_weight(model, weights), jnp.roll(tokens_BT, -1, axis=1))
    target_T = jnp.arange(T) + 1  # the slot of what is predicted
    counts_BT = (target_T >= batch.starts_BC.reshape(B * C, 1)) & (target_T < lengths_B[:, None])
    logps_B = jnp.sum(jnp.where(counts_BT, logps_BT, 0.0), axis=1)
    return logps_B.reshape(B, C), jnp.sum(counts_BT, axis=1, dtype=jnp.float32).reshape(B, C)


def dpo_loss(
    model: Llama,
    config: DpoConfig,
    weights: Weights,
    batch: ReplyPairBatch,
    key: jax.Array | None,
    reference: Weights | None = None,
) -> Loss:
    """Loss of the pairs, averaged over prompts.

    Args:
      model: the policy's.
      config: the recipe's section.
      weights: the policy's.
      batch: the pairs.
      key: of the policy's dropout; None switches it off. The reference is without dropout.
      reference: stays as it is. Where adapters are trained there is no need of one: it is the policy with
        its adapters off.
    """
    if reference is None:
        reference = weights.replace(adapters=None, slots=None)
    logps_BC, tokens_BC = reply_logps(model, weights, batch, key)
    ratios_BC = logps_BC - jax.lax.stop_gradient(reply_logps(model, reference, batch, None)[0])
    delta_B = ratios_BC[:, 0] - ratios_BC[:, 1]
    if config.loss == "ipo":
        losses_B = preference.ipo(delta_B, config.beta)
    else:
        losses_B = preference.dpo(delta_B, config.beta, config.label_smoothing)
    losses_B -= config.nll * logps_BC[:, 0] / jnp.maximum(tokens_BC[:, 0], 1.0)
    weights_B = batch.pairs.weights_B
    weight = jnp.sum(weights_B)

    def weighted(x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(x_B * weights_B), weight

    return Loss(
        *weighted(losses_B),
        {
            "accuracy": weighted((delta_B > 0).astype(jnp.float32)),
            "margin": weighted(config.beta * delta_B),
            "reward_chosen": weighted(config.beta * ratios_BC[:, 0]),
            "reward_rejected": weighted(config.beta * ratios_BC[:, 1]),
            "logp_chosen": weighted(logps_BC[:, 0]),
            "logp_rejected": weighted(logps_BC[:, 1]),
        },
    )
