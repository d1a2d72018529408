"""Context parallelism: the positions of a row over the mesh axis `context`, in an order that shares the work.

Causal attention does more for later queries. A row is cut in 2 C chunks for C devices, and device d takes
chunk d and chunk 2 C - 1 - d, so that all have equally much (Brandon et al. 2023, "Striped attention";
Llama 3's report, §3.3.2). The place of a position among the devices' is not its slot in the row; `slots` says
which it is.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import PartitionSpec

from maxllm.parallel.sharding import BATCH, CONTEXT


def shards_here() -> int:
    """Devices that share a row on the mesh in force; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def chunks(shards: int) -> np.ndarray:
    """The number of the chunk at each place, [2 C]: 0, 2 C - 1, 1, 2 C - 2, …"""
    first = np.arange(shards)
    return np.stack([first, 2 * shards - 1 - first], axis=1).reshape(-1)


def slots(length: int, shards: int) -> np.ndarray:
    """The slot in the row of what is at each place, [T] int32."""
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    within = np.arange(length // (2 * shards))
    return (chunks(shards)[:, None] * len(within) + within).reshape(-1).astype(np.int32)


def balanced(row_BT: jax.Array, shards: int) -> jax.Array:
    """[B, T, …] in the order of the row -> in the order of places; every device must have all of it."""
    return rearranged(row_BT, chunks(shards))


def unbalanced(row_BT: jax.Array, shards: int) -> jax.Array:
    """[B, T, …] in the order of places -> in the order of the row; every device must have all of it."""
    return rearranged(row_BT, np.argsort(chunks(shards)))


def whole_row(row_BT: jax.Array, shards: int) -> jax.Array:
    """Inside `shard_map`: the places of all devices that share a row, in its order, from each one's own. Its
    transpose sums gradients and leaves each device its own, a reduce-scatter."""
    if shards == 1:
        return row_BT
    return unbalanced(jax.lax.all_gather(row_BT, CONTEXT, axis=1, tiled=True), shards)


def rearranged(row_BT: jax.Array, order: np.ndarray) -> jax.Array:
    """[B, T, …] with its chunks in another order."""
    if len(order) == 2:
        return row_BT  # one device: there is no other order
    B, T = row_BT.shape[:2]
    parts = row_BT.reshape(B, len(order), T // len(order), *row_BT.shape[2:])
    return parts[:, order].reshape(row_BT.shape)


def unbalanced_shards(x_BTD: jax.Array) -> jax.Array:
    """[B, T, …] from the order of places to the order of the row, where each device has its places only: two
    chunks of each go to their neighbours.

    Of chunks c and 2 C - 1 - c, which a device has, one is even: so the even chunks are one permutation of
    the devices, and the odd ones another.
    """
    C = shards_here()
    if C == 1:
        return x_BTD
    home = {c: min(c, 2 * C - 1 - c) for c in range(2 * C)}

    def exchange(x_BtD: jax.Array) -> jax.Array:
        d = jax.lax.axis_index(CONTEXT)
        first, last = jax.numpy.split(x_BtD, 2, axis=1)
        even, odd = jax.lax.cond(d % 2 == 0, lambda: (first, last), lambda: (last, first))
        even = jax.lax.ppermute(even, CONTEXT, [(home[c], c // 2) for c in range(0, 2 * C, 2)])
        odd = jax.lax.ppermute(odd, CONTEXT, [(home[c], c // 2) for c in range(1, 2 * C, 2)])
        return jax.numpy.concatenate([even, odd], axis=1)

    layout = PartitionSpec(BATCH, CONTEXT)
    return jax.shard_map(exchange, in_specs=layout, out_specs=layout, check_vma=False)(x_BTD)
