"""PPO: from rollouts to advantages to updates of actor and critic.

The whole of one iteration, in order (stages/ppo.py puts the rollout in front):

    experience(...)   score the responses, put the per-token KL into the reward, GAE, whiten
    update_epochs(...)   several passes of clipped policy and value updates over that experience
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from maxllm.config import PpoConfig
from maxllm.losses import policy, token
from maxllm.model.forward import forward
from maxllm.model.llama import Llama
from maxllm.records import Array, Experience, Metrics, Params, Rollout
from maxllm.steps.reward import score
from maxllm.steps.state import TrainState, partition_of
from maxllm.steps.update import Loss, update
from maxllm.weights import Weights


class PpoState(struct.PyTreeNode):
    """Two trained models. The reference policy and the reward model are frozen and stand outside."""

    step: jax.Array
    """int32, iterations taken."""
    actor: TrainState
    critic: TrainState

    def detach(self) -> tuple[Params, PpoState]:
        """(the policy's parameters, the state without them): the two items of a checkpoint."""
        params, actor = self.actor.detach()
        return params, self.replace(actor=actor)

    def attach(self, params: Params) -> PpoState:
        """Undoes `detach`."""
        return self.replace(actor=self.actor.attach(params))


class Frozen(struct.PyTreeNode):
    """What PPO reads and never changes."""

    reference: Weights
    """The SFT policy that the KL is measured against."""
    reward: Weights
    """The reward model."""


@dataclass(frozen=True)
class Ppo:
    """The parts of the algorithm that are not data."""

    config: PpoConfig
    policy_model: Llama
    scalar_model: nn.Module
    actor_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation
    temperature: float
    """Logits are divided by it wherever a log-probability of the policy is computed, as in sampling."""
    stop_tokens: tuple[int, ...]
    """Ids that end a response."""
    pad: int
    """Id written after it."""
    microbatches: int = 1
    never: tuple[int, ...] = ()
    """Ids that are not sampled, because no token has them; the policy is a distribution over the others."""


def at_responses(model: nn.Module, weights: Weights, rollout: Rollout) -> jax.Array:
    """A model's outputs where each response token was chosen, that is, one slot before it: [B, R, ...]."""
    R = rollout.mask_BR.shape[1]
    outputs = forward(model, weights, rollout.tokens_BT, rollout.segment_ids_BT, rollout.positions_BT)
    return outputs[:, -R - 1 : -1]


def response_logits(ppo: Ppo, weights: Weights, rollout: Rollout) -> jax.Array:
    """Logits that predicted each response token, divided by the temperature, [B, R, V] float32."""
    logits_BRV = token.without(at_responses(ppo.policy_model, weights, rollout), ppo.never)
    return logits_BRV / ppo.temperature


def response_tokens(rollout: Rollout) -> Array:
    """The response slots of a rollout, [B, R]."""
    return rollout.tokens_BT[:, -rollout.mask_BR.shape[1] :]


def scores(ppo: Ppo, reward: Weights, rollout: Rollout) -> jax.Array:
    """The reward model's score of prompt + response, [B] float32.

    Rows are turned to right padding first, the layout the reward model is trained in.
    """
    lengths_B = jnp.sum(rollout.segment_ids_BT, 1)
    first_B = jnp.argmax(rollout.segment_ids_BT, axis=1)
    slots_T = jnp.arange(rollout.tokens_BT.shape[1])
    source_BT = (slots_T + first_B[:, None]) % rollout.tokens_BT.shape[1]
    tokens_BT = jnp.take_along_axis(rollout.tokens_BT, source_BT, axis=1)
    return score(ppo.scalar_model, reward, tokens_BT, lengths_B)


def experience(ppo: Ppo, state: PpoState, frozen: Frozen, rollout: Rollout) -> tuple[Experience, Metrics]:
    """Scores and log-probabilities of a rollout, its shaped rewards, returns and whitened advantages."""
    config, mask_BR = ppo.config, rollout.mask_BR
    raw_scores_B = scores(ppo, frozen.reward, rollout)
    unfinished_B = 1.0 - rollout.finished_B.astype(jnp.float32)
    scores_B = jnp.clip(raw_scores_B, -config.score_clip, config.score_clip)
    scores_B = scores_B - config.missing_eos_penalty * unfinished_B

    targets_BR = response_tokens(rollout)
    logits_BRV = response_logits(ppo, Weights(state.actor.params), rollout)
    ref_logits_BRV = response_logits(ppo, frozen.reference, rollout)
    logps_BR, ref_logps_BR = (
        token.token_logps(logits_BRV, targets_BR),
        token.token_logps(ref_logits_BRV, targets_BR),
    )
    values_BR = at_responses(ppo.scalar_model, Weights(state.critic.params), rollout)

    rewards_BR = policy.shaped_rewards(scores_B, logps_BR, ref_logps_BR, mask_BR, config.kl_coef)
    advantages_BR, returns_BR = policy.gae(rewards_BR, values_BR, mask_BR, config.gamma, config.gae_lambda)

    rows, tokens = jnp.float32(mask_BR.shape[0]), jnp.sum(mask_BR)
    spread_BR = jnp.square(advantages_BR - policy.masked_mean(advantages_BR, mask_BR))
    metrics: Metrics = {
        "score": (jnp.sum(raw_scores_B), rows),
        "kl": (jnp.sum(policy.kl_k1(logps_BR, ref_logps_BR) * mask_BR), rows),
        "kl_k3": (jnp.sum(policy.kl_k3(logps_BR, ref_logps_BR) * mask_BR), rows),
        "entropy": (jnp.sum(token.entropy(logits_BRV) * mask_BR), tokens),
        "response_tokens": (tokens, rows),
        "advantage_std": (jnp.sqrt(policy.masked_mean(spread_BR, mask_BR)), jnp.float32(1)),
        "finished": (rows - jnp.sum(unfinished_B), rows),
    }
    whitened_BR = policy.whiten(advantages_BR, mask_BR)
    return Experience(rollout, logps_BR, values_BR, whitened_BR, returns_BR), metrics


def actor_loss(ppo: Ppo, weights: Weights, batch: Experience, key: jax.Array) -> Loss:
    """Clipped policy loss over response tokens."""
    mask_BR = batch.rollout.mask_BR
    logits_BRV = response_logits(ppo, weights, batch.rollout)
    logps_BR = token.token_logps(logits_BRV, response_tokens(batch.rollout))
    losses_BR, clipped_BR, ratio_BR = policy.policy_loss(
        logps_BR, batch.old_logps_BR, batch.advantages_BR, ppo.config.clip
    )
    tokens = jnp.sum(mask_BR)
    half_square_BR = 0.5 * jnp.square(logps_BR - batch.old_logps_BR)
    return Loss(
        jnp.sum(losses_BR * mask_BR),
        tokens,
        {
            "clip_fraction": (jnp.sum(clipped_BR * mask_BR), tokens),
            "approx_kl": (jnp.sum(half_square_BR * mask_BR), tokens),
            "ratio": (jnp.sum(ratio_BR * mask_BR), tokens),
        },
    )


def critic_loss(ppo: Ppo, weights: Weights, batch: Experience, key: jax.Array) -> Loss:
    """Clipped value loss over response tokens."""
    mask_BR = batch.rollout.mask_BR
    values_BR = at_responses(ppo.scalar_model, weights, batch.rollout)
    losses_BR = policy.value_loss(values_BR, batch.old_values_BR, batch.returns_BR, ppo.config.value_clip)
    return Loss(jnp.sum(losses_BR * mask_BR), jnp.sum(mask_BR), {})


def update_minibatch(
    ppo: Ppo, state: PpoState, batch: Experience, key: jax.Array
) -> tuple[PpoState, Metrics]:
    """One update of actor and critic on the same minibatch."""
    actor, actor_metrics = update(
        state.actor,
        batch,
        key,
        loss_fn=lambda weights, part, key: actor_loss(ppo, weights, part, key),
        optimizer=ppo.actor_optimizer,
        partition=partition_of(ppo.policy_model),
        microbatches=ppo.microbatches,
    )
    critic, critic_metrics = update(
        state.critic,
        batch,
        key,
        loss_fn=lambda weights, part, key: critic_loss(ppo, weights, part, key),
        optimizer=ppo.critic_optimizer,
        partition=partition_of(ppo.scalar_model),
        microbatches=ppo.microbatches,
    )
    metrics = {name: actor_metrics[name] for name in ("clip_fraction", "approx_kl", "ratio")}
    metrics |= {"loss": actor_metrics["loss"], "gradient_norm": actor_metrics["gradient_norm"]}
    metrics |= {"value_loss": critic_metrics["loss"]}
    skipped = tuple(
        jnp.maximum(a, c) for a, c in zip(actor_metrics["skipped"], critic_metrics["skipped"], strict=True)
    )
    metrics["skipped"] = (skipped[0], skipped[1])
    return PpoState(state.step, actor, critic), metrics


def update_epochs(ppo: Ppo, state: PpoState, batch: Experience, key: jax.Array) -> tuple[PpoState, Metrics]:
    """All epochs over one batch of experience; rows are reshuffled into minibatches each epoch."""
    rows, parts = batch.returns_BR.shape[0], ppo.config.minibatches

    def epoch(state: PpoState, key: jax.Array) -> tuple[PpoState, Metrics]:
        order_B = jax.random.permutation(key, rows)
        minibatches = jax.tree.map(lambda x: x[order_B].reshape(parts, rows // parts, *x.shape[1:]), batch)
        return jax.lax.scan(lambda s, part: update_minibatch(ppo, s, part, key), state, minibatches)

    state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, ppo.config.epochs))
    return state, jax.tree.map(jnp.sum, metrics)
