"""Batched decoding with a key/value cache, one compiled program: prefill, then a while loop.

The same function serves `generate`, `chat`, evaluation and PPO's rollouts. Prompts are left-padded, so all
rows write the same cache slot; padding has segment id 0 and is never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from maxllm.config import GenerationConfig
from maxllm.generate.sampling import sample
from maxllm.model.llama import Llama, unstack
from maxllm.records import Array, PromptBatch, Rollout
from maxllm.weights import Weights


class _Progress(struct.PyTreeNode):
    """What the loop carries: the next slot to fill and everything generated so far."""

    slot: jax.Array
    cache: Any
    done_B: jax.Array
    tokens_BR: jax.Array
    logps_BR: jax.Array
    mask_BR: jax.Array


@dataclass(frozen=True)
class _Decoder:
    """The rules of one decoding; `generate` reads as the algorithm."""

    model: Llama
    weights: Weights
    key: jax.Array
    config: GenerationConfig
    stop_tokens: tuple[int, ...]
    pad: int
    never: tuple[int, ...]

    def forward(
        self, cache: Any, cache_length: int, tokens: Array, segments: Array, positions: Array
    ) -> tuple[jax.Array, Any]:
        """Logits [B, V] of the last slot fed, and the cache with the new keys and values."""
        logits, cache = self.model.apply(
            {**self.weights.collections(), **cache},
            tokens,
            segments,
            positions,
            cache_length=cache_length,
            last_only=True,
            mutable=["cache"],
        )
        return logits[:, 0], cache

    def nothing_yet(self, B: int) -> _Progress:
        """Before the first token."""
        R = self.config.max_new_tokens
        zeros_BR = jnp.zeros((B, R), jnp.float32)
        pads_BR = jnp.full((B, R), self.pad, jnp.int32)
        return _Progress(jnp.int32(0), {}, jnp.zeros(B, bool), pads_BR, zeros_BR, zeros_BR)

    def take(self, progress: _Progress, cache: Any, logits_BV: jax.Array) -> _Progress:
        """Samples the token of this slot and notes it; finished rows get padding."""
        slot, alive_B = progress.slot, ~progress.done_B
        key = jax.random.fold_in(self.key, slot)
        token_B, logp_B = sample(logits_BV, key, self.config, self.never)
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
      model: with scan_unroll = n_layers, its layers are taken apart first, which is fastest on CPU.
      weights: its weights.
      prompts: left-padded, [B, P].
      key: drives the sampling; slot i uses fold_in(key, i).
      config: R = max_new_tokens, and the sampling rule.
      stop_tokens: ids that end a response (they belong to it).
      pad: id written after the end.
      never: ids that are never sampled, because no token has them.

    Returns:
      A Rollout with T = P + R.
    """
    B, P = prompts.tokens_BP.shape
    R = config.max_new_tokens
    if model.config.scan_unroll == model.config.n_layers:
        model, weights = unstack(model, weights)
    decoder = _Decoder(model, weights, key, config, stop_tokens, pad, never)
    segments_BP = (jnp.arange(P) >= P - prompts.lengths_B[:, None]).astype(jnp.int32)
    positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.slot < R) & ~jnp.all(progress.done_B)

    def advance(progress: _Progress) -> _Progress:
        """Feeds the token before this slot and takes the next."""
        before = progress.slot - 1
        tokens_B1 = jax.lax.dynamic_slice_in_dim(progress.tokens_BR, before, 1, axis=1)
        real_B1 = jax.lax.dynamic_slice_in_dim(progress.mask_BR, before, 1, axis=1)
        positions_B1 = prompts.lengths_B[:, None] + before
        fed = (tokens_B1, real_B1.astype(jnp.int32), positions_B1)
        logits_BV, cache = decoder.forward(progress.cache, P + R, *fed)
        return decoder.take(progress, cache, logits_BV)

    logits_BV, cache = decoder.forward({}, P + R, prompts.tokens_BP, segments_BP, positions_BP)
    first = decoder.take(decoder.nothing_yet(B), cache, logits_BV)
    end = jax.lax.while_loop(unfinished, advance, first)

    segments_BR = end.mask_BR.astype(jnp.int32)
    positions_BR = (prompts.lengths_B[:, None] + jnp.arange(R)) * segments_BR
    return Rollout(
        tokens_BT=jnp.concatenate([prompts.tokens_BP, end.tokens_BR], axis=1),
        segment_ids_BT=jnp.concatenate([segments_BP, segments_BR], axis=1),
        positions_BT=jnp.concatenate([positions_BP, positions_BR], axis=1),
        logps_BR=end.logps_BR,
        mask_BR=end.mask_BR,
        finished_B=end.done_B,
    )
