"""Which keys a query sees: those of its own segment up to its own slot, or of a window that ends there.

Padding (segment 0) sees nothing that matters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from maxllm.parallel import context

SHARED = -1
"""The segment of keys that stand before all others and that every segment sees."""


class Keys(struct.PyTreeNode):
    """What decides which keys a query sees."""

    query_segments_BT: jax.Array
    key_segments_BS: jax.Array
    first_slot: jax.Array
    """Index among the keys of the first query; 0 without a cache."""
    shards: int = struct.field(pytree_node=False, default=1)
    """Positions are in the order of parallel/context.py for so many devices; 1 is the order of the row."""
    shared: bool = struct.field(pytree_node=False, default=False)
    """Whether some keys are of the segment `SHARED`."""

    def preceded(self, count: int) -> Keys:
        """With so many shared keys in front of the others."""
        before = jnp.full((self.key_segments_BS.shape[0], count), SHARED, self.key_segments_BS.dtype)
        segments_BS = jnp.concatenate([before, self.key_segments_BS], axis=1)
        return self.replace(key_segments_BS=segments_BS, first_slot=self.first_slot + count, shared=True)


def visible(keys: Keys, window: int | None) -> jax.Array:
    """[B, T, S] bool, at the places of all queries and keys."""
    segments = keys.query_segments_BT, keys.key_segments_BS
    seen_BTS = seen(*slots_of(keys), *segments, window)
    if not keys.shared:
        return seen_BTS
    query_slots_T, key_slots_S = slots_of(keys)
    shared_B1S = (keys.key_segments_BS == SHARED)[:, None]
    return seen_BTS | (shared_B1S & (key_slots_S <= query_slots_T[:, None]) & (segments[0] != 0)[:, :, None])


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
