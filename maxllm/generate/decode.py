"""Batched decoding with a key/value cache.

    prepared = laid_out(model, weights)                           once
    logits_BV, cache = prefill(model, prepared, prompts, slots)   the prompts
    logits_BV, cache = step(model, prepared, cache, …)            a token more of every row

`generate` is a loop over these in one compiled program, which serves `generate`, `chat`, evaluation and PPO's
rollouts; a server may call them one by one. Prompts are left-padded, so all rows write the same cache slot;
padding has segment id 0 and is never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from maxllm.config.generation import GenerationConfig
from maxllm.generate.sampling import key_at, sample
from maxllm.model.adapters import in_one_stack
from maxllm.model.compressed import made_whole
from maxllm.model.forward import declarations_of
from maxllm.model.layers import dtype_of, in_type
from maxllm.model.llama import Llama, unstack
from maxllm.parallel.memory import fetched
from maxllm.parallel.sharding import decoding
from maxllm.records import Array, PromptBatch, Rollout
from maxllm.weights import Declaration, Kind, Weights

Cache = Any
"""Keys, values and segments of every slot: a collection of variables of the model's."""


# --- the parts of decoding ---------------------------------------------------------------------------------


def decoder_of(model: Llama, platform: str) -> Llama:
    """The model with its layers as a kind of device decodes them fastest: apart on CPU, else in a scan."""
    return model.clone(unstacked=platform == "cpu")


def laid_out(model: Llama, weights: Weights) -> Weights:
    """A model's weights as decoding reads them, at every token: in the compute type, each device with the
    heads, feed-forward and vocabulary that it computes. Left as training has them, FSDP would gather them for
    each token.

    Args:
      model: if it is `unstacked`, so are the results.
      weights: as in training, stacked.
    """
    dtype = dtype_of(model.config)

    def lay(declaration: Declaration, w: jax.Array) -> jax.Array:
        w = fetched(w)
        if declaration.kind not in (Kind.NORM, Kind.BIAS):  # norms are computed in float32
            # Rounded where training has it, for what travels would otherwise be float32.
            w = nn.with_logical_constraint(in_type(w, dtype), declaration.axes)
        with decoding(model.config):
            return nn.with_logical_constraint(w, declaration.axes)

    if model.tuning is not None:
        weights = made_whole(in_one_stack(weights, model.tuning.frozen_layers))
    declared = declarations_of(model.clone(unstacked=False))
    if weights.adapters is None:
        declared = declared.replace(adapters=None)
    weights = jax.tree.map(lay, declared, weights)
    return unstack(weights, model.config.n_layers) if model.unstacked else weights


def prefill(model: Llama, weights: Weights, prompts: PromptBatch, slots: int) -> tuple[jax.Array, Cache]:
    """Feeds the prompts into an empty cache.

    Args:
      model: as `laid_out` had it.
      weights: from `laid_out`.
      prompts: left-padded, [B, P].
      slots: of the cache, for prompts and responses.

    Returns:
      Logits [B, V] of the first token of each response, and the cache.
    """
    return fed(model, weights, {}, slots, prompts.tokens_BP, *places(prompts))


def step(
    model: Llama,
    weights: Weights,
    cache: Cache,
    slots: int,
    tokens_B1: Array,
    real_B1: Array,
    positions_B1: Array,
) -> tuple[jax.Array, Cache]:
    """Feeds one token of each row.

    Args:
      model: as `laid_out` had it.
      weights: from `laid_out`.
      cache: from `prefill` or the step before.
      slots: of the cache.
      tokens_B1: int32 ids.
      real_B1: int32; 0 for a row that has ended, whose token is padding.
      positions_B1: int32 position inside the row's real tokens.

    Returns:
      Logits [B, V] of each row's next token, and the cache with this one.
    """
    return fed(model, weights, cache, slots, tokens_B1, real_B1, positions_B1)


def fed(
    model: Llama,
    weights: Weights,
    cache: Cache,
    slots: int,
    tokens_BT: Array,
    segments_BT: Array,
    positions_BT: Array,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of the last slot fed, and the cache with the new keys and values."""
    rows = rows_laid_out(model, (tokens_BT, segments_BT, positions_BT))
    with decoding(model.config):
        logits_B1V, cache = model.apply(
            {**weights.collections(), **cache},
            *rows,
            cache_length=slots,
            last_only=True,
            mutable=["cache"],
        )
    return logits_B1V[:, 0], cache


def rows_laid_out(model: Llama, tree: Any) -> Any:
    """Arrays of a batch's rows, [B, ...], as decoding splits them over devices."""
    with decoding(model.config):
        return jax.tree.map(
            lambda a: nn.with_logical_constraint(a, ("batch",) + (None,) * (a.ndim - 1)), tree
        )


def places(prompts: PromptBatch) -> tuple[jax.Array, jax.Array]:
    """(segment ids, positions) of the prompts' slots, [B, P] each."""
    P = prompts.tokens_BP.shape[1]
    segments_BP = (jnp.arange(P) >= P - prompts.lengths_B[:, None]).astype(jnp.int32)
    return segments_BP, jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)


# --- the loop ----------------------------------------------------------------------------------------------


class _Progress(struct.PyTreeNode):
    """What the loop carries: the next slot to fill and everything generated so far."""

    slot: jax.Array
    cache: Cache
    done_B: jax.Array
    tokens_BR: jax.Array
    logps_BR: jax.Array
    mask_BR: jax.Array


@dataclass(frozen=True)
class _Sampler:
    """The rules by which tokens are taken."""

    key: jax.Array
    config: GenerationConfig
    stop_tokens: tuple[int, ...]
    pad: int
    never: tuple[int, ...]

    def nothing_yet(self, B: int) -> _Progress:
        """Before the first token."""
        R = self.config.max_new_tokens
        zeros_BR = jnp.zeros((B, R), jnp.float32)
        pads_BR = jnp.full((B, R), self.pad, jnp.int32)
        return _Progress(jnp.int32(0), {}, jnp.zeros(B, bool), pads_BR, zeros_BR, zeros_BR)

    def take(self, progress: _Progress, cache: Any, logits_BV: jax.Array) -> _Progress:
        """Samples the token of this slot and notes it; finished rows get padding."""
        slot, alive_B = progress.slot, ~progress.done_B
        token_B, logp_B = sample(logits_BV, key_at(self.key, slot), self.config, self.never)
        token_B = jnp.where(alive_B, token_B, self.pad)
        stopped_B = jnp.isin(token_B, jnp.array(self.stop_tokens)) & alive_B
        return _Progress(
            slot=slot + 1,
            cache=cache,
            done_B=progress.done_B | stopped_B,
            tokens_BR=progress.tokens_BR.at[:, slot].set(token_B),
            logps_BR=progress.logps_BR.at[:, slot].set(jnp.where(alive_B, logp_B, 0.0)),
            mask_BR=progress.mask_BR.at[:, slot].set(alive_B.astype(jnp.float32)),
        )


def generate(
    model: Llama,
    weights: Weights,
    prompts: PromptBatch,
    key: jax.Array,
    config: GenerationConfig,
    stop_tokens: tuple[int, ...],
    pad: int,
    never: tuple[int, ...] = (),
) -> Rollout:
    """Completes every prompt until a stop token or config.max_new_tokens.

    Args:
      model: in the layout that decodes fastest here (`decoder_of`), or in training's.
      weights: its weights, as in training.
      prompts: left-padded, [B, P].
      key: drives the sampling, one for all rows or one a row, [B]; slot i uses fold_in(key, i).
      config: R = max_new_tokens, and the sampling rule.
      stop_tokens: ids that end a response (they belong to it).
      pad: id written after the end.
      never: ids that are never sampled, because no token has them.

    Returns:
      A Rollout with T = P + R.
    """
    B, P = prompts.tokens_BP.shape
    R = config.max_new_tokens
    slots = P + R
    sampler = _Sampler(key, config, stop_tokens, pad, never)
    prepared = laid_out(model, weights)

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.slot < R) & ~jnp.all(progress.done_B)

    def advance(progress: _Progress) -> _Progress:
        """Feeds the token before this slot and takes the next."""
        before = progress.slot - 1
        tokens_B1 = jax.lax.dynamic_slice_in_dim(progress.tokens_BR, before, 1, axis=1)
        real_B1 = jax.lax.dynamic_slice_in_dim(progress.mask_BR, before, 1, axis=1)
        positions_B1 = prompts.lengths_B[:, None] + before
        token = tokens_B1, real_B1.astype(jnp.int32), positions_B1
        logits_BV, cache = step(model, prepared, progress.cache, slots, *token)
        return sampler.take(progress, cache, logits_BV)

    logits_BV, cache = prefill(model, prepared, prompts, slots)
    first = sampler.take(sampler.nothing_yet(B), cache, logits_BV)
    end = jax.lax.while_loop(unfinished, advance, first)

    segments_BP, positions_BP = places(prompts)
    segments_BR = end.mask_BR.astype(jnp.int32)
    positions_BR = (prompts.lengths_B[:, None] + jnp.arange(R)) * segments_BR
    return Rollout(
        tokens_BT=jnp.concatenate([prompts.tokens_BP, end.tokens_BR], axis=1),
        segment_ids_BT=jnp.concatenate([segments_BP, segments_BR], axis=1),
        positions_BT=jnp.concatenate([positions_BP, positions_BR], axis=1),
        logps_BR=end.logps_BR,
        mask_BR=end.mask_BR,
        finished_B=end.done_B,
        row_B=prompts.row_B,
    )
