"""The embedding table looked up on the mesh: its width over TABLES, its vocabulary over tensor (in decoding
over fsdp too, its width whole).

Each device looks up every token of those that share the table, in its part of it: ids travel, not the table.
Then each device's tokens come to it with all of their width. Left to the partitioner, a table that is split
both ways is looked up by way of the whole result on every device ("Involuntary full rematerialization").
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxllm.parallel.sharding import BATCH, CONTEXT, TABLES, TENSOR


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table, [B, T, D] in `dtype`, in which gradients cross the network; they are summed in
    float32."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
    layout = mesh_axes("vocab", "table")
    vocabulary = layout[0] or TENSOR
    # One token of a row that several devices share is looked up by all of them.
    positions = CONTEXT if tokens_BT.shape[1] % mesh.shape[CONTEXT] == 0 else None
    rows = PartitionSpec(mesh_axes("batch")[0] or BATCH, positions)

    def per_device(part_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        split = layout[1] is not None
        if split:
            tokens_BT = jax.lax.all_gather(tokens_BT, TABLES, tiled=True)
        own = tokens_BT - jax.lax.axis_index(vocabulary) * part_VD.shape[0]
        x = jnp.take(part_VD, own, axis=0, mode="fill", fill_value=0)
        x = jnp.where((own >= 0)[..., None], x, 0).astype(dtype)  # negative ones count from the end
        if split:
            x = jax.lax.all_to_all(x, TABLES, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x, vocabulary)

    return jax.shard_map(per_device, in_specs=(layout, rows), out_specs=rows, check_vma=False)(
        table_VD, tokens_BT
    )


def noise(key: jax.Array, x_BTD: jax.Array, segment_ids_BT: jax.Array, alpha: float) -> jax.Array:
    """NEFTune's noise (Jain et al. 2023, algorithm 1), [B, T, D]: uniform in ±alpha / sqrt(L D), where L is
    the number of tokens in the segment that a token belongs to; padding is counted as one segment."""
    B, T, D = x_BTD.shape
    rows_B1 = jnp.arange(B)[:, None]
    lengths_BN = jnp.zeros((B, T + 1), jnp.float32).at[rows_B1, segment_ids_BT].add(1)
    lengths_BT = lengths_BN[rows_B1, segment_ids_BT]
    bound_BT = alpha * jax.lax.rsqrt(lengths_BT * D)
    return jax.random.uniform(key, x_BTD.shape, jnp.float32, -1, 1) * bound_BT[..., None]


def mesh_axes(*names: str) -> PartitionSpec:
    """What logical axes are split over by the rules in force."""
    axes = nn.logical_to_mesh_axes(names)
    assert axes is not None, "None is for names that are None"
    return axes
