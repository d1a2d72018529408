"""PPO: from scored rollouts to advantages to updates of actor and critic.

The parts of one iteration, in order (stages/ppo.py compiles them, and puts the rollout in front):

    scores(...)     judge: the reward model's opinion of every response
    learn(...)      the rest, of these two
      experience(...)       log-probabilities and values, the KL per token in the reward, GAE, whiten
      update_epochs(...)    several passes of clipped policy and value updates over that experience

Nothing here holds the logits of more than some rows: log-probabilities come from the head that never makes
[B, T, V].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from maxllm.config.ppo import PpoConfig
from maxllm.losses import policy
from maxllm.losses.token import Shaping
from maxllm.model.forward import forward
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama, head_weight
from maxllm.optim import Optimizer
from maxllm.parallel import context
from maxllm.parallel.pipeline import undeal
from maxllm.records import Array, Experience, Metrics, Params, Rollout
from maxllm.steps.head import head_chosen, head_logps
from maxllm.steps.reward import score
from maxllm.steps.state import TrainState, partition_of
from maxllm.steps.update import FLOAT32, Loss, LossFn, split, update
from maxllm.weights import Weights

Model = TypeVar("Model", Llama, ScalarModel)


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
        """The state with the policy's parameters put back."""
        return self.replace(actor=self.actor.attach(params))


class Frozen(struct.PyTreeNode):
    """What PPO reads and never changes."""

    reference: Weights
    """The SFT policy that the KL is measured against. The actor began as it, and has all that is not trained
    from it."""
    reward: Weights
    """The reward model, which is the same to the critic."""


@dataclass(frozen=True)
class Learner(Generic[Model]):
    """A model that learns from experience, and how."""

    model: Model
    optimizer: Optimizer
    microbatches: int = 1
    """Parts that the rows of an update are split into."""
    gradient_dtype: jnp.dtype = FLOAT32
    """Type of the gradients of the layers' matrices; see `accumulate`."""

    def weights(self, params: Params, start: Weights) -> Weights:
        """All weights, from those that are trained and those that training began from."""
        return partition_of(self.model).joined(params, start)

    def update(
        self, state: TrainState, batch: Experience, key: jax.Array, loss_fn: LossFn, start: Weights
    ) -> tuple[TrainState, Metrics]:
        """One update; see `update` for what it returns."""
        return update(
            state,
            batch,
            key,
            loss_fn=loss_fn,
            optimizer=self.optimizer,
            partition=partition_of(self.model),
            microbatches=self.microbatches,
            gradient_dtype=self.gradient_dtype,
            kept=start,
        )


@dataclass(frozen=True)
class Ppo:
    """The parts of the algorithm that are not data."""

    config: PpoConfig
    actor: Learner[Llama]
    critic: Learner[ScalarModel]
    shaping: Shaping
    """How logits become the policy's distribution, wherever a log-probability is computed, as in sampling."""
    stop_tokens: tuple[int, ...]
    """Ids that end a response."""
    pad: int
    """Id written after it."""

    @property
    def parts(self) -> int:
        """Parts that the rows of a batch are split into: an update has as many rows at a time."""
        return self.config.minibatches * self.actor.microbatches


# --- responses ---------------------------------------------------------------------------------------------


def at_responses(
    model: Llama | ScalarModel,
    weights: Weights,
    rollout: Rollout,
    key: jax.Array | None = None,
    method: str = "__call__",
) -> jax.Array:
    """A model's outputs where each response token was chosen, that is, one slot before it: [B, R, ...].

    Without a key, dropout is off.
    """
    R = rollout.mask_BR.shape[1]
    inputs = rollout.tokens_BT, rollout.segment_ids_BT, rollout.positions_BT
    return forward(model, weights, *inputs, key, method=method)[:, -R - 1 : -1]


def response_tokens(rollout: Rollout) -> Array:
    """The response slots of a rollout, [B, R]."""
    return rollout.tokens_BT[:, -rollout.mask_BR.shape[1] :]


def head_inputs(
    model: Llama, weights: Weights, rollout: Rollout, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden states, head, ids) of a rollout's responses, as the head's log-probabilities take them.

    Where the positions of a row are split over devices, R is filled up to a multiple of them.
    """
    x_BRD = at_responses(model, weights, rollout, key, method="hidden")
    short = -x_BRD.shape[1] % context.shards_here()
    x_BRD = jnp.pad(x_BRD, ((0, 0), (0, short), (0, 0)))
    return x_BRD, head_weight(model, weights), jnp.pad(response_tokens(rollout), ((0, 0), (0, short)))


def response_logps(
    model: Llama, shaping: Shaping, weights: Weights, rollout: Rollout, key: jax.Array | None = None
) -> jax.Array:
    """log p(token) of every response slot under the policy, [B, R] float32; it has a gradient."""
    logps_BR = head_logps(*head_inputs(model, weights, rollout, key), shaping)
    return logps_BR[:, : rollout.mask_BR.shape[1]]


def response_logps_and_entropy(
    model: Llama, shaping: Shaping, weights: Weights, rollout: Rollout
) -> tuple[jax.Array, jax.Array]:
    """`response_logps` and the entropy of each distribution in nats, both [B, R] float32, without a
    gradient."""
    chosen = head_chosen(*head_inputs(model, weights, rollout), shaping)
    R = rollout.mask_BR.shape[1]
    return chosen.logps[:, :R], chosen.entropy[:, :R]


def in_parts(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """function(rows), some rows at a time; both are trees of arrays with rows first."""
    if parts == 1:
        return function(rows)
    return jax.tree.map(undeal, jax.lax.map(function, split(rows, parts)))


# --- judge -------------------------------------------------------------------------------------------------


def scores(ppo: Ppo, reward: Weights, rollout: Rollout) -> jax.Array:
    """The reward model's score of prompt + response, [B] float32.

    Rows are turned to right padding first, the layout the reward model is trained in.
    """

    def judge(rollout: Rollout) -> jax.Array:
        lengths_B = jnp.sum(rollout.segment_ids_BT, 1)
        first_B = jnp.argmax(rollout.segment_ids_BT, axis=1)
        slots_T = jnp.arange(rollout.tokens_BT.shape[1])
        source_BT = (slots_T + first_B[:, None]) % rollout.tokens_BT.shape[1]
        tokens_BT = jnp.take_along_axis(rollout.tokens_BT, source_BT, axis=1)
        return score(ppo.critic.model, reward, tokens_BT, lengths_B)

    return in_parts(judge, rollout, ppo.parts)


# --- learn -------------------------------------------------------------------------------------------------


def learn(
    ppo: Ppo, state: PpoState, rollout: Rollout, scores_B: jax.Array, frozen: Frozen, key: jax.Array
) -> tuple[PpoState, Metrics]:
    """The state after all updates on one batch of rollouts and their scores."""
    batch, metrics = experience(ppo, state, frozen, rollout, scores_B)
    state, update_metrics = update_epochs(ppo, state, frozen, batch, key)
    return state.replace(step=state.step + 1), metrics | update_metrics


def experience(
    ppo: Ppo, state: PpoState, frozen: Frozen, rollout: Rollout, raw_scores_B: jax.Array
) -> tuple[Experience, Metrics]:
    """Log-probabilities of a scored rollout, its shaped rewards, returns and whitened advantages."""
    config, mask_BR = ppo.config, rollout.mask_BR
    unfinished_B = 1.0 - rollout.finished_B.astype(jnp.float32)
    scores_B = jnp.clip(raw_scores_B, -config.score_clip, config.score_clip)
    scores_B = scores_B - config.missing_eos_penalty * unfinished_B

    def passes(rollout: Rollout) -> tuple[jax.Array, ...]:
        policy_model, actor = ppo.actor.model, ppo.actor.weights(state.actor.params, frozen.reference)
        logps_BR, entropy_BR = response_logps_and_entropy(policy_model, ppo.shaping, actor, rollout)
        ref_logps_BR = response_logps(policy_model, ppo.shaping, frozen.reference, rollout)
        critic = ppo.critic.weights(state.critic.params, frozen.reward)
        values_BR = at_responses(ppo.critic.model, critic, rollout)
        return logps_BR, entropy_BR, ref_logps_BR, values_BR

    logps_BR, entropy_BR, ref_logps_BR, values_BR = in_parts(passes, rollout, ppo.parts)
    rewards_BR = policy.shaped_rewards(scores_B, logps_BR, ref_logps_BR, mask_BR, config.kl_coef)
    advantages_BR, returns_BR = policy.gae(rewards_BR, values_BR, mask_BR, config.gamma, config.gae_lambda)

    rows, tokens = jnp.float32(mask_BR.shape[0]), jnp.sum(mask_BR)
    spread_BR = jnp.square(advantages_BR - policy.masked_mean(advantages_BR, mask_BR))
    metrics: Metrics = {
        "score": (jnp.sum(raw_scores_B), rows),
        "kl": (jnp.sum(policy.kl_k1(logps_BR, ref_logps_BR) * mask_BR), rows),
        "kl_k3": (jnp.sum(policy.kl_k3(logps_BR, ref_logps_BR) * mask_BR), rows),
        "entropy": (jnp.sum(entropy_BR * mask_BR), tokens),
        "response_tokens": (tokens, rows),
        "advantage_std": (jnp.sqrt(policy.masked_mean(spread_BR, mask_BR)), jnp.float32(1)),
        "finished": (rows - jnp.sum(unfinished_B), rows),
    }
    whitened_BR = policy.whiten(advantages_BR, mask_BR)
    return Experience(rollout, logps_BR, values_BR, whitened_BR, returns_BR), metrics


def actor_loss(ppo: Ppo, weights: Weights, batch: Experience, key: jax.Array | None) -> Loss:
    """Clipped policy loss over response tokens."""
    mask_BR = batch.rollout.mask_BR
    logps_BR = response_logps(ppo.actor.model, ppo.shaping, weights, batch.rollout, key)
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


def critic_loss(ppo: Ppo, weights: Weights, batch: Experience, key: jax.Array | None) -> Loss:
    """Clipped value loss over response tokens."""
    mask_BR = batch.rollout.mask_BR
    values_BR = at_responses(ppo.critic.model, weights, batch.rollout, key)
    losses_BR = policy.value_loss(values_BR, batch.old_values_BR, batch.returns_BR, ppo.config.value_clip)
    return Loss(jnp.sum(losses_BR * mask_BR), jnp.sum(mask_BR), {})


def update_minibatch(
    ppo: Ppo, state: PpoState, frozen: Frozen, batch: Experience, key: jax.Array
) -> tuple[PpoState, Metrics]:
    """One update of the actor and one of the critic, on the same minibatch."""
    losses = partial(actor_loss, ppo), partial(critic_loss, ppo)
    actor, actor_metrics = ppo.actor.update(state.actor, batch, key, losses[0], frozen.reference)
    critic, critic_metrics = ppo.critic.update(state.critic, batch, key, losses[1], frozen.reward)
    skipped = tuple(
        jnp.maximum(a, c) for a, c in zip(actor_metrics["skipped"], critic_metrics["skipped"], strict=True)
    )
    metrics = actor_metrics | {"value_loss": critic_metrics["loss"], "skipped": (skipped[0], skipped[1])}
    return PpoState(state.step, actor, critic), metrics


def update_epochs(
    ppo: Ppo, state: PpoState, frozen: Frozen, batch: Experience, key: jax.Array
) -> tuple[PpoState, Metrics]:
    """All epochs over one batch of experience; rows are reshuffled into minibatches each epoch."""
    rows, parts = batch.returns_BR.shape[0], ppo.config.minibatches

    def epoch(state: PpoState, key: jax.Array) -> tuple[PpoState, Metrics]:
        order_B = jax.random.permutation(key, rows)
        minibatches = jax.tree.map(lambda x: x[order_B].reshape(parts, rows // parts, *x.shape[1:]), batch)
        return jax.lax.scan(lambda s, part: update_minibatch(ppo, s, frozen, part, key), state, minibatches)

    state, metrics = jax.lax.scan(epoch, state, jax.random.split(key, ppo.config.epochs))
    return state, jax.tree.map(jnp.sum, metrics)
