"""Which keys a query sees: those of its own segment up to its own slot, or of a window that ends there.

Padding (segment 0) sees nothing that matters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from maxllm.parallel import context


class Keys(struct.PyTreeNode):
    """What decides which keys a query sees."""

    query_segments_BT: jax.Array
    key_segments_BS: jax.Array
    first_slot: jax.Array
    """Index among the keys of the first query; 0 without a cache."""
    shards: int = struct.field(pytree_node=False, default=1)
    """Positions are in the order of parallel/context.py for so many devices; 1 is the order of the row."""


def visible(keys: Keys, window: int | None) -> jax.Array:
    """[B, T, S] bool, at the places of all queries and keys."""
    return seen(*slots_of(keys), keys.query_segments_BT, keys.key_segments_BS, window)


def distances(keys: Keys) -> jax.Array:
    """[T, S] float32: how many slots a key lies before a query; negative where it lies behind."""
    query_slots_T, key_slots_S = slots_of(keys)
    return (query_slots_T[:, None] - key_slots_S).astype(jnp.float32)


def slots_of(keys: Keys) -> tuple[jax.Array, jax.Array]:
    """The slots in the row of all queries, [T], and keys, [S]."""
    query_slots_T = keys.first_slot + context.slots(keys.query_segments_BT.shape[1], keys.shards)
    return query_slots_T, jnp.asarray(context.slots(keys.key_segments_BS.shape[1], keys.shards))


def seen(
    query_slots_T: jax.Array,
    key_slots_S: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """[B, T, S] bool, from slots in the row and segments."""
    causal_TS = key_slots_S <= query_slots_T[:, None]
    if window is not None:
        causal_TS &= key_slots_S > query_slots_T[:, None] - window
    same_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return same_BTS & causal_TS & (query_segments_BT != 0)[:, :, None]
