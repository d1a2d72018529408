"""Attention by XLA's matmuls, on any hardware: a block of queries at a time, whose scores are not kept.

The backward pass computes them again from the logsumexp (Dao et al. 2022, algorithm 4). A block leaves out
the keys behind it, which none of its queries sees: 4 blocks compute 0.62 of all scores.

Q is the queries that share a key head, H = G Q; heads come before positions here, which is the order in which
XLA multiplies.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxllm.model import ring
from maxllm.model.visible import Keys, distances, visible

BLOCKS = 4
"""Of queries in a row; 2 and 8 are slower on CPU."""
SHORTEST = 64
"""Positions of a block below which its matmuls are too small to be worth the keys that it skips."""


class Pattern(NamedTuple):
    """What is known before any row is."""

    window: int | None
    """How many keys a query sees at most, its own included; None for all."""
    dropout: float
    """Share of the probabilities that become 0."""


class Block(NamedTuple):
    """Queries from `start` to `end`, and the keys from `first` to `last`, which are all that they may see."""

    start: int
    end: int
    first: int
    last: int


class Scoring(NamedTuple):
    """What a score is besides q k^T / sqrt(K)."""

    seen_BTS: jax.Array
    """Whether a query sees a key."""
    biases_GQTS: jax.Array | None = None
    """Subtracted."""
    kept_BGQTS: jax.Array | None = None
    """Multiplied with the probability: 0 where it is dropped."""


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    keys: Keys,
    pattern: Pattern,
    slopes_H: np.ndarray | None,
    key: jax.Array | None,
) -> jax.Array:
    """[B, T, H, K] in q's type; 0 for a query that sees no key.

    Args:
      q_BTHK: queries.
      k_BSGK: keys.
      v_BSGK: values.
      keys: who sees whom.
      pattern: the window and dropout.
      slopes_H: of ALiBi, None without it.
      key: a random key for dropout, None without it.
    """
    arrays = queries_first(q_BTHK, k_BSGK.shape[2]), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    return positions_first(attention(pattern, *arrays, keys, slopes_H, key))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(pattern: Pattern, *arrays: Any) -> jax.Array:
    """[B, G, Q, T, K], of q [B, G, Q, T, K], k and v [B, G, S, K], keys, slopes and random key."""
    return attention_forward(pattern, *arrays)[0]


def attention_forward(pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
    """The outputs, and what the backward pass needs."""
    done = []
    for block in blocks(q, k, rest[0], pattern.window):
        start, end, first, last = block
        own = q[..., start:end, :], k[:, :, first:last], v[:, :, first:last]
        done.append(block_forward(*own, scoring(block, pattern, q.shape[1:3], *rest)))
    o, lse = (jnp.concatenate(parts, axis=3) for parts in zip(*done, strict=True))
    return o, (q, k, v, *rest, o, lse)


def attention_backward(pattern: Pattern, kept: Any, do: jax.Array) -> Any:
    """The gradients of each block's queries; of keys and values, the sums over blocks."""
    q, k, v, *rest, o, lse = kept
    # Without a barrier XLA would find that it had the scores before, and keep them.
    q, k, do = jax.lax.optimization_barrier((q, k, do))
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in blocks(q, k, rest[0], pattern.window):
        start, end, first, last = block
        own = q[..., start:end, :], k[:, :, first:last], v[:, :, first:last]
        out = o[..., start:end, :], lse[..., start:end], do[..., start:end, :]
        dq_block, dk_block, dv_block = block_backward(
            *own, *out, scoring(block, pattern, q.shape[1:3], *rest)
        )
        others = (0, 0), (0, 0), (first, k.shape[2] - last), (0, 0)
        dq.append(dq_block)
        dk += jnp.pad(dk_block, others)
        dv += jnp.pad(dv_block, others)
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


attention.defvjp(attention_forward, attention_backward)


def blocks(q: jax.Array, k: jax.Array, keys: Keys, window: int | None) -> list[Block]:
    """The queries in blocks; all in one where they are few, or look at a cache, or beyond their
    window, or lie in balanced order."""
    T, S = q.shape[3], k.shape[2]
    cut = window is not None and keys.shared
    if T != S or keys.shards > 1 or cut or T % BLOCKS or T < BLOCKS * SHORTEST:
        return [Block(0, T, 0, S)]
    size = T // BLOCKS
    firsts = [max(0, start - window + 1) if window else 0 for start in range(0, T, size)]
    return [Block(i * size, (i + 1) * size, first, (i + 1) * size) for i, first in enumerate(firsts)]


def scoring(
    block: Block,
    pattern: Pattern,
    heads: tuple[int, ...],
    keys: Keys,
    slopes_H: jax.Array | None,
    key: jax.Array | None,
) -> Scoring:
    """What masks, biases and dropout make of one block's scores, for G x Q heads; alike in both passes."""
    start, end, first, last = block
    segments = keys.query_segments_BT[:, start:end], keys.key_segments_BS[:, first:last]
    keys = Keys(*segments, keys.first_slot + (start - first), keys.shards, keys.shared)
    seen_BTS = visible(keys, pattern.window)
    biases_GQTS = kept_BGQTS = None
    if slopes_H is not None:
        biases_GQTS = slopes_H.reshape(*heads, 1, 1) * distances(keys)
    if key is not None:
        B, T, S = seen_BTS.shape
        share = 1 - pattern.dropout
        kept_BGQTS = jax.random.bernoulli(jax.random.fold_in(key, start), share, (B, *heads, T, S)) / share
    return Scoring(seen_BTS, biases_GQTS, kept_BGQTS)


def block_forward(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, G, Q, T, K], logsumexp [B, G, Q, T] float32; 0 and -inf for a query that sees nothing."""
    scores_BGQTS = scores(q, k, scoring)
    largest_BGQT = jnp.maximum(jnp.max(scores_BGQTS, -1), jnp.finfo(jnp.float32).min)
    exp_BGQTS = jnp.exp(scores_BGQTS - largest_BGQT[..., None])
    sum_BGQT = jnp.sum(exp_BGQTS, -1)
    if scoring.kept_BGQTS is not None:
        exp_BGQTS *= scoring.kept_BGQTS
    o = jnp.einsum("bgqts,bgsk->bgqtk", exp_BGQTS.astype(q.dtype), v, preferred_element_type=jnp.float32)
    o /= jnp.maximum(sum_BGQT, jnp.finfo(jnp.float32).tiny)[..., None]
    return o.astype(q.dtype), jnp.log(sum_BGQT) + largest_BGQT


def block_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o: jax.Array,
    lse_BGQT: jax.Array,
    do: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, ...]:
    """dv = p^T do; ds = p (do v^T - sum(o do)); dq = ds k; dk = ds^T q (Dao et al. 2022, appendix B.2).

    dq is in q's type, dk and dv are float32.
    """
    p_BGQTS = jnp.exp(scores(q, k, scoring) - lse_BGQT[..., None])
    p_BGQTS = jnp.where(scoring.seen_BTS[:, None, None], p_BGQTS, 0.0)
    dp_BGQTS = jnp.einsum("bgqtk,bgsk->bgqts", do, v, preferred_element_type=jnp.float32)
    dropped_BGQTS = p_BGQTS
    if scoring.kept_BGQTS is not None:
        dp_BGQTS *= scoring.kept_BGQTS
        dropped_BGQTS *= scoring.kept_BGQTS
    sums_BGQT = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1)
    ds_BGQTS = (p_BGQTS * (dp_BGQTS - sums_BGQT[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bgqts,bgsk->bgqtk", ds_BGQTS, k)
    # In float32, because those of other blocks are added to them.
    add = partial(jnp.einsum, "bgqts,bgqtk->bgsk", preferred_element_type=jnp.float32)
    return dq, add(ds_BGQTS, q), add(dropped_BGQTS.astype(do.dtype), do)


def scores(q: jax.Array, k: jax.Array, scoring: Scoring) -> jax.Array:
    """[B, G, Q, T, S] float32; -inf where a query does not see a key."""
    scores_BGQTS = jnp.einsum("bgqtk,bgsk->bgqts", q, k, preferred_element_type=jnp.float32)
    scores_BGQTS *= q.shape[-1] ** -0.5
    if scoring.biases_GQTS is not None:
        scores_BGQTS -= scoring.biases_GQTS
    return jnp.where(scoring.seen_BTS[:, None, None], scores_BGQTS, -jnp.inf)


def queries_first(a_BTHK: jax.Array, G: int) -> jax.Array:
    """[B, T, H, …] -> [B, G, Q, T, …]"""
    B, T, H = a_BTHK.shape[:3]
    return jnp.moveaxis(a_BTHK.reshape(B, T, G, H // G, *a_BTHK.shape[3:]), 1, 3)


def positions_first(a_BGQT: jax.Array) -> jax.Array:
    """[B, G, Q, T, …] -> [B, T, H, …]"""
    B, G, Q, T = a_BGQT.shape[:4]
    return jnp.moveaxis(a_BGQT, 3, 1).reshape(B, T, G * Q, *a_BGQT.shape[4:])


# --- one block of a ring -----------------------------------------------------------------------------------


def ring_forward(causal: bool, arrays: ring.Arrays) -> tuple[jax.Array, jax.Array]:
    """One block of a ring."""
    q, k, v, seen_BTS = heads_first(causal, arrays)
    o, lse = block_forward(q, k, v, Scoring(seen_BTS))
    return positions_first(o), positions_first(lse)


def ring_backward(
    causal: bool, arrays: ring.Arrays, o_BTHK: jax.Array, lse_BTH: jax.Array, do_BTHK: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients of a block of the ring with respect to queries, keys and values."""
    q, k, v, seen_BTS = heads_first(causal, arrays)
    o, lse, do = (queries_first(a, k.shape[1]) for a in (o_BTHK, lse_BTH, do_BTHK))
    dq, dk, dv = block_backward(q, k, v, o, lse, do, Scoring(seen_BTS))
    return positions_first(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


BLOCK_OF_RING = ring.Block(ring_forward, ring_backward)


def heads_first(causal: bool, arrays: ring.Arrays) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q [B, G, Q, T, K], k and v [B, G, S, K], and which keys a query sees, [B, T, S]."""
    q_BTHK, k_BSGK, v_BSGK, query_segments_BT, key_segments_BS = arrays
    seen_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    if causal:
        seen_BTS &= jnp.arange(seen_BTS.shape[2]) <= jnp.arange(seen_BTS.shape[1])[:, None]
    k, v = k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    return queries_first(q_BTHK, k.shape[1]), k, v, seen_BTS
