"""Batched decoding with a key/value cache, one compiled program: prefill, then a while loop.

The same function serves `generate`, `chat`, evaluation and PPO's rollouts. Prompts are left-padded, so all
rows write the same cache slot; padding has segment id 0 and is never seen.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from maxllm.config import GenerationConfig
from maxllm.generate.sampling import sample
from maxllm.records import Array, Params, PromptBatch, Rollout


class _Progress(struct.PyTreeNode):
    """What the loop carries: the next slot to fill and everything generated so far."""

    slot: jax.Array
    cache: Any
    done_B: jax.Array
    tokens_BR: jax.Array
    logps_BR: jax.Array
    mask_BR: jax.Array


def generate(
    model: nn.Module,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    config: GenerationConfig,
    stop_tokens: tuple[int, ...],
    pad: int,
) -> Rollout:
    """Completes every prompt until a stop token or config.max_new_tokens.

    Args:
      model: a `Llama`.
      params: its parameters.
      prompts: left-padded, [B, P].
      key: drives the sampling; slot i uses fold_in(key, i).
      config: R = max_new_tokens, and the sampling rule.
      stop_tokens: ids that end a response (they belong to it).
      pad: id written after the end.

    Returns:
      A Rollout with T = P + R.
    """
    B, P = prompts.tokens_BP.shape
    R = config.max_new_tokens
    prompt_segments_BP = (jnp.arange(P) >= P - prompts.lengths_B[:, None]).astype(jnp.int32)
    prompt_positions_BP = jnp.maximum(jnp.cumsum(prompt_segments_BP, axis=1) - 1, 0)

    def forward(cache: Any, tokens: Array, segments: Array, positions: Array) -> tuple[jax.Array, Any]:
        logits, cache = model.apply(
            {"params": params, **cache},
            tokens,
            segments,
            positions,
            cache_length=P + R,
            last_only=True,
            mutable=["cache"],
        )
        return logits[:, 0], cache

    def take(progress: _Progress, cache: Any, logits_BV: jax.Array) -> _Progress:
        """Samples the token of this slot and notes it; finished rows get padding."""
        slot, alive_B = progress.slot, ~progress.done_B
        token_B, logp_B = sample(logits_BV, jax.random.fold_in(key, slot), config)
        token_B = jnp.where(alive_B, token_B, pad)
        stopped_B = jnp.isin(token_B, jnp.array(stop_tokens)) & alive_B
        return _Progress(
            slot=slot + 1,
            cache=cache,
            done_B=progress.done_B | stopped_B,
            tokens_BR=progress.tokens_BR.at[:, slot].set(token_B),
            logps_BR=progress.logps_BR.at[:, slot].set(jnp.where(alive_B, logp_B, 0.0)),
            mask_BR=progress.mask_BR.at[:, slot].set(alive_B.astype(jnp.float32)),
        )

    def advance(progress: _Progress) -> _Progress:
        """Feeds the token before this slot and takes the next."""
        before = progress.slot - 1
        tokens_B1 = jax.lax.dynamic_slice_in_dim(progress.tokens_BR, before, 1, axis=1)
        real_B1 = jax.lax.dynamic_slice_in_dim(progress.mask_BR, before, 1, axis=1)
        positions_B1 = prompts.lengths_B[:, None] + before
        logits_BV, cache = forward(progress.cache, tokens_B1, real_B1.astype(jnp.int32), positions_B1)
        return take(progress, cache, logits_BV)

    zeros_BR = jnp.zeros((B, R), jnp.float32)
    logits_BV, cache = forward({}, prompts.tokens_BP, prompt_segments_BP, prompt_positions_BP)
    start = _Progress(
        jnp.int32(0), {}, jnp.zeros(B, bool), jnp.full((B, R), pad, jnp.int32), zeros_BR, zeros_BR
    )
    end = jax.lax.while_loop(
        lambda progress: (progress.slot < R) & ~jnp.all(progress.done_B),
        advance,
        take(start, cache, logits_BV),
    )
    segments_BR = end.mask_BR.astype(jnp.int32)
    positions_BR = prompts.lengths_B[:, None] + jnp.arange(R)
    return Rollout(
        tokens_BT=jnp.concatenate([prompts.tokens_BP, end.tokens_BR], axis=1),
        segment_ids_BT=jnp.concatenate([prompt_segments_BP, segments_BR], axis=1),
        positions_BT=jnp.concatenate([prompt_positions_BP, positions_BR * segments_BR], axis=1),
        logps_BR=end.logps_BR,
        mask_BR=end.mask_BR,
        finished_B=end.done_B,
    )
