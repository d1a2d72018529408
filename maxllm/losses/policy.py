"""The arithmetic of PPO: KL in the reward, GAE, whitening, clipped losses. No model, no sampling.

Every `_BR` array is float32 over response slots; `mask_BR` is 1 on response tokens, the stop token included.
"""

import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +- this before exp, so that one odd token cannot overflow a batch."""


def masked_mean(x_BR: jax.Array, mask_BR: jax.Array) -> jax.Array:
    """Mean over the tokens of the mask; 0 when there are none."""
    return jnp.sum(x_BR * mask_BR) / jnp.maximum(jnp.sum(mask_BR), 1.0)


def kl_k1(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k1 = log pi - log ref: unbiased, signed (Schulman 2020, "Approximating KL divergence")."""
    return jnp.clip(logps - ref_logps, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_k3(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k3 = exp(-k1) - 1 + k1: unbiased and never negative (Schulman 2020)."""
    k1 = kl_k1(logps, ref_logps)
    return jnp.exp(-k1) - 1.0 + k1


def shaped_rewards(
    scores_B: jax.Array, logps_BR: jax.Array, ref_logps_BR: jax.Array, mask_BR: jax.Array, kl_coef: float
) -> jax.Array:
    """r_t = -kl_coef * k1_t, plus the score on the last response token (index L - 1).

    A row without response tokens gets no reward at all. Ziegler et al. 2019, eq. 2.
    """
    slots = mask_BR.shape[-1]
    last_B = jnp.sum(mask_BR, -1).astype(jnp.int32) - 1
    at_end_BR = (jnp.arange(slots) == last_B[:, None]).astype(jnp.float32)
    return -kl_coef * kl_k1(logps_BR, ref_logps_BR) * mask_BR + scores_B[:, None] * at_end_BR


def gae(
    rewards_BR: jax.Array, values_BR: jax.Array, mask_BR: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) and returns = advantages + values.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    Slots outside the mask are carried over: they neither receive nor pass on anything, wherever they stand.
    Both results are 0 there.
    """

    def backward(carry: tuple[jax.Array, jax.Array], slot: tuple[jax.Array, jax.Array, jax.Array]):
        next_value_B, next_advantage_B = carry
        reward_B, value_B, mask_B = slot
        advantage_B = reward_B + gamma * next_value_B - value_B + gamma * lam * next_advantage_B
        inside_B = mask_B > 0
        carry = (
            jnp.where(inside_B, value_B, next_value_B),
            jnp.where(inside_B, advantage_B, next_advantage_B),
        )
        return carry, jnp.where(inside_B, advantage_B, 0.0)

    zeros_B = jnp.zeros_like(rewards_BR[:, 0])
    _, advantages_RB = jax.lax.scan(
        backward, (zeros_B, zeros_B), (rewards_BR.T, values_BR.T, mask_BR.T), reverse=True
    )
    advantages_BR = advantages_RB.T
    return advantages_BR, (advantages_BR + values_BR) * mask_BR


def whiten(x_BR: jax.Array, mask_BR: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(population variance + 1e-8) over the mask."""
    mean = masked_mean(x_BR, mask_BR)
    variance = masked_mean(jnp.square(x_BR - mean), mask_BR)
    return (x_BR - mean) * jax.lax.rsqrt(variance + 1e-8) * mask_BR


def policy_loss(
    logps_BR: jax.Array, old_logps_BR: jax.Array, advantages_BR: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) per token (Schulman et al. 2017, eq. 7).

    Returns:
      loss_BR, whether the clipped term was the larger one (float), rho_BR.
    """
    ratio_BR = jnp.exp(kl_k1(logps_BR, old_logps_BR))
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * jnp.clip(ratio_BR, 1.0 - clip, 1.0 + clip)
    return jnp.maximum(plain_BR, clipped_BR), (clipped_BR > plain_BR).astype(jnp.float32), ratio_BR


def value_loss(
    values_BR: jax.Array, old_values_BR: jax.Array, returns_BR: jax.Array, clip: float
) -> jax.Array:
    """1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2) per token (Schulman et al. 2017's code)."""
    clipped_BR = old_values_BR + jnp.clip(values_BR - old_values_BR, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values_BR - returns_BR), jnp.square(clipped_BR - returns_BR))
