"""Ring attention (Liu et al. 2023): keys and values travel around the devices that share a row.

Every device keeps its queries; blocks of keys and values pass by, one a step, while the last is worked on.
Outputs of blocks are joined by their logsumexp, and the backward pass, which sends the blocks around once
more with their gradients, needs no more than it: memory is that of one block, however long the row.

Places are in balanced order (parallel/context.py): device d has chunks d and 2 C - 1 - d. Of a block that
started on another device, its queries see either the first half of the keys, all of them, or the last half of
its queries see all keys; each step does half a block's work, on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxllm.parallel.sharding import CONTEXT

Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""q [B, T, H, K], k and v [B, S, G, K], segment ids of the queries [B, T] and of the keys [B, S]."""


class Block(NamedTuple):
    """Attention of some queries to some keys of their segments: to earlier ones (causal) or to all."""

    forward: Callable[[bool, Arrays], tuple[jax.Array, jax.Array]]
    """(causal, arrays) -> output [B, T, H, K], logsumexp of the scores [B, T, H] float32."""
    backward: Callable[[bool, Arrays, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]
    """(causal, arrays, output, logsumexp, the output's gradient), of all keys there are -> gradients of q, k,
    v that come from these keys."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(
    block: Block, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """One device's outputs, inside `shard_map`; T is its share of the row."""
    return ring_forward(block, q_BTHK, k_BTGK, v_BTGK, segments_BT)[0]


def ring_forward(
    block: Block, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, Any]:
    """The outputs, and what the backward pass needs."""
    half = q_BTHK.shape[1] // 2
    C, d = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT)
    o, lse = block.forward(True, (q_BTHK, k_BTGK, v_BTGK, segments_BT, segments_BT))

    def earlier(k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A block of a device before: its first chunk is before ours, its last behind."""
        arrays = q_BTHK, k[:, :half], v[:, :half], segments_BT, segments[:, :half]
        o, lse = block.forward(False, arrays)
        return o.astype(jnp.float32), lse

    def later(k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A block of a device behind: both its chunks lie between ours."""
        o, lse = block.forward(False, (q_BTHK[:, half:], k, v, segments_BT[:, half:], segments))
        nothing = jnp.zeros_like(o, jnp.float32), jnp.full_like(lse, -jnp.inf)
        return jnp.concatenate([nothing[0], o], 1), jnp.concatenate([nothing[1], lse], 1)

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        o, lse, passing = carry
        following = onward(passing)  # under way while this one is worked on
        here = jax.lax.cond(number <= d, earlier, later, *passing)
        return (*joined((o, lse), here), following), None

    start = o.astype(jnp.float32), lse, onward((k_BTGK, v_BTGK, segments_BT))
    (o, lse, _), _ = jax.lax.scan(step, start, jnp.arange(1, C))
    o = o.astype(q_BTHK.dtype)
    return o, (q_BTHK, k_BTGK, v_BTGK, segments_BT, o, lse)


def ring_backward(block: Block, kept: Any, do: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Blocks go around with the gradients of their keys and values, which are complete when they are home."""
    q_BTHK, k_BTGK, v_BTGK, segments_BT, o, lse = kept
    half = q_BTHK.shape[1] // 2
    C, d = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT)

    def float32(arrays: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.float32), arrays)

    def earlier(k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
        arrays = q_BTHK, k[:, :half], v[:, :half], segments_BT, segments[:, :half]
        dq, dk, dv = float32(block.backward(False, arrays, o, lse, do))
        return dq, *(jnp.concatenate([g, jnp.zeros_like(g)], 1) for g in (dk, dv))

    def later(k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
        arrays = q_BTHK[:, half:], k, v, segments_BT[:, half:], segments
        dq, dk, dv = float32(block.backward(False, arrays, o[:, half:], lse[:, half:], do[:, half:]))
        return jnp.concatenate([jnp.zeros_like(dq), dq], 1), dk, dv

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        dq, dk, dv, passing = carry
        following, (dk, dv) = onward(passing), onward((dk, dv))
        here = jax.lax.cond(number <= d, earlier, later, *passing)
        return (*jax.tree.map(jnp.add, (dq, dk, dv), here), following), None

    own = block.backward(True, (q_BTHK, k_BTGK, v_BTGK, segments_BT, segments_BT), o, lse, do)
    start = *float32(own), onward((k_BTGK, v_BTGK, segments_BT))
    (dq, dk, dv, _), _ = jax.lax.scan(step, start, jnp.arange(1, C))
    dk, dv = onward((dk, dv))
    return dq.astype(q_BTHK.dtype), dk.astype(k_BTGK.dtype), dv.astype(v_BTGK.dtype), None


ring.defvjp(ring_forward, ring_backward)


def onward(arrays: Any) -> Any:
    """Each device's to the next."""
    C = jax.lax.axis_size(CONTEXT)
    return jax.lax.ppermute(arrays, CONTEXT, [(d, (d + 1) % C) for d in range(C)])


def joined(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Softmax over two sets of keys, from the softmax over each: outputs weighted by their sums of exp."""
    (o, lse), (o_other, lse_other) = one, other
    total = jnp.logaddexp(lse, lse_other)
    shares = jnp.exp(lse - total)[..., None], jnp.exp(lse_other - total)[..., None]
    return shares[0] * o + shares[1] * o_other, total
