"""softmax(q k^T / sqrt(K)) v by three kernels with one meaning: XLA's matmuls, TPU splash, and cuDNN's.

Key and value heads are never repeated: G of them serve H query heads. A query sees the keys of its own
segment up to its own slot; padding (segment 0) sees nothing that matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from maxllm.errors import UserError
from maxllm.parallel.sharding import BATCH, CONTEXT, TENSOR

Backend = Literal["auto", "xla", "splash", "cudnn"]

HARDWARE: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "xla", "cpu": "xla"}
"""`jax.Device.platform` -> the kernel made for it."""

BLOCK = 1024
"""Queries or keys that splash holds at once, at most: 1024 x 1024 scores in float32 are 4 MB of VMEM."""


class Keys(struct.PyTreeNode):
    """What decides which keys a query sees."""

    query_segments_BT: jax.Array
    key_segments_BS: jax.Array
    first_slot: jax.Array
    """Index among the keys of the first query; 0 without a cache."""


def resolve(backend: Backend, platform: str, dtype: jax.typing.DTypeLike) -> Backend:
    """The kernel that a backend is on a platform, for queries of a type.

    Raises:
      UserError: the one asked for does not run there.
    """
    best = HARDWARE[platform]
    if backend not in ("auto", "xla", best):
        raise UserError(f"model.attention={backend} does not run on {platform}; give auto or xla")
    if backend == "auto":
        # cuDNN's kernel knows half precision alone.
        return "xla" if best == "cudnn" and jnp.dtype(dtype) == jnp.float32 else best
    return backend


def attend(
    backend: Backend,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    keys: Keys,
    window: int | None,
    dropout: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[B, T, H, K] in q's type.

    Args:
      backend: the kernel; "auto" is what this process computes on, see `resolve`.
      q_BTHK: queries.
      k_BSGK: keys.
      v_BSGK: values.
      keys: who sees whom.
      window: how many keys a query sees at most, its own included; None for all.
      dropout: of the probabilities; only XLA's kernel has them.
    """
    if backend == "auto":
        backend = resolve(backend, jax.default_backend(), q_BTHK.dtype)
    if backend == "splash":
        return splash(q_BTHK, k_BSGK, v_BSGK, keys, window)
    if backend == "cudnn":
        return cudnn(q_BTHK, k_BSGK, v_BSGK, keys, window)
    return xla(q_BTHK, k_BSGK, v_BSGK, keys, window, dropout)


# --- XLA ---------------------------------------------------------------------------------------------------


def visible(keys: Keys, window: int | None) -> jax.Array:
    """[B, T, S] bool: which keys a query sees."""
    query_slots_T = keys.first_slot + jnp.arange(keys.query_segments_BT.shape[1])
    key_slots_S = jnp.arange(keys.key_segments_BS.shape[1])
    causal_TS = key_slots_S <= query_slots_T[:, None]
    if window is not None:
        causal_TS &= key_slots_S > query_slots_T[:, None] - window
    same_BTS = keys.query_segments_BT[:, :, None] == keys.key_segments_BS[:, None, :]
    return same_BTS & causal_TS & (keys.query_segments_BT != 0)[:, :, None]


def xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    keys: Keys,
    window: int | None,
    dropout: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Holds all scores, [B, H, T, S] in float32."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGQK = q_BTHK.reshape(B, T, G, H // G, K)
    scores_BGQTS = jnp.einsum("btgqk,bsgk->bgqts", q_BTGQK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BGQTS *= K**-0.5
    seen_BTS = visible(keys, window)
    scores_BGQTS = jnp.where(seen_BTS[:, None, None], scores_BGQTS, jnp.finfo(jnp.float32).min)
    probs_BGQTS = dropout(jax.nn.softmax(scores_BGQTS, axis=-1).astype(q_BTHK.dtype))
    o_BTGQK = jnp.einsum("bgqts,bsgk->btgqk", probs_BGQTS, v_BSGK)
    return o_BTGQK.reshape(B, T, H, K)


# --- TPU ---------------------------------------------------------------------------------------------------


def splash(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, keys: Keys, window: int | None
) -> jax.Array:
    """The Pallas kernel that skips blocks above the diagonal; each device its rows, heads and queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    mesh = jax.sharding.get_abstract_mesh()
    (_, T, H, K), S = q_BTHK.shape, k_BSGK.shape[1]
    shards, heads = (1, H) if mesh.empty else (mesh.shape[CONTEXT], H // mesh.shape[TENSOR])
    kernel = splash_kernel(T, S, heads, window, shards)

    def per_device(kernel, q_BTHK, k_BSGK, v_BSGK, query_segments_BT, key_segments_BS):
        def one_row(q_THK, k_SGK, v_SGK, query_segments_T, key_segments_S):
            segments = kernels.SegmentIds(query_segments_T, key_segments_S)
            heads_first = (a.swapaxes(0, 1) for a in (q_THK * K**-0.5, k_SGK, v_SGK))
            return kernel(*heads_first, segment_ids=segments).swapaxes(0, 1)

        return jax.vmap(one_row)(q_BTHK, k_BSGK, v_BSGK, query_segments_BT, key_segments_BS)

    arrays = (q_BTHK, k_BSGK, v_BSGK, keys.query_segments_BT, keys.key_segments_BS)
    if mesh.empty:
        return per_device(kernel, *arrays)
    queries, all_keys = PartitionSpec(BATCH, CONTEXT, TENSOR), PartitionSpec(BATCH, None, TENSOR)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, CONTEXT)))
    return jax.shard_map(
        per_device,
        in_specs=(
            kernel_spec,
            queries,
            all_keys,
            all_keys,
            PartitionSpec(BATCH, CONTEXT),
            PartitionSpec(BATCH),
        ),
        out_specs=queries,
        check_vma=False,  # Pallas kernels do not say what varies over which axis
    )(kernel, *arrays)


def splash_kernel(T: int, S: int, heads: int, window: int | None, shards: int) -> Any:
    """The kernel of `heads` heads; over `shards` devices that each have T / shards of the queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_kv = block_size(T // shards), block_size(S)
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=min(512, block_kv),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=min(512, block_kv),
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    mask = masks.CausalMask((T, S)) if window is None else masks.LocalMask((T, S), (window - 1, 0), 0)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=shards
    )


def block_size(length: int) -> int:
    """The largest power of two up to BLOCK that divides a length.

    Raises:
      UserError: it is not a multiple of 128, the width of a TPU's lanes.
    """
    if length % 128:
        raise UserError(
            "TPU's attention kernel needs sequences of a multiple of 128 positions per device, "
            f"not {length}: give another batch.sequence_length, or model.attention=xla"
        )
    return int(np.gcd(length, BLOCK))


# --- GPU ---------------------------------------------------------------------------------------------------


def cudnn(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, keys: Keys, window: int | None
) -> jax.Array:
    """cuDNN's flash attention, bfloat16; each device its rows, heads and queries.

    Who sees whom is a mask of 2 B T S bytes per device, and as much again for its gradient, which cuDNN
    writes and nobody reads; of one layer at a time, without heads. cuDNN's own layout for packed documents
    (offsets) needs a bound on the documents of a row and a Hopper, and JAX 0.10.2 computes the offsets of
    grouped keys wrongly (jax-ml/jax#39521).

    Raises:
      UserError: the heads have a width that cuDNN does not know.
    """
    K = q_BTHK.shape[-1]
    if K % 8 or K > 128:
        raise UserError(
            f"cuDNN's attention kernel needs heads of a multiple of 8, up to 128, not {K}: "
            "give another model.head_dim, or model.attention=xla"
        )
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape[CONTEXT]

    def per_device(q_BTHK, k_BSGK, v_BSGK, query_segments_BT, key_segments_BS):
        first_slot = 0 if shards == 1 else jax.lax.axis_index(CONTEXT) * q_BTHK.shape[1]
        seen_BTS = visible(Keys(query_segments_BT, key_segments_BS, jnp.int32(first_slot)), window)
        # To skip what is above the diagonal, cuDNN takes query and key 0 to be the same slot. Its own window
        # it does not take beside a mask, before 9.10.2.
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, mask=seen_BTS[:, None], is_causal=shards == 1, implementation="cudnn"
        )

    arrays = (q_BTHK, k_BSGK, v_BSGK, keys.query_segments_BT, keys.key_segments_BS)
    if mesh.empty:
        return per_device(*arrays)
    queries, all_keys = PartitionSpec(BATCH, CONTEXT, TENSOR), PartitionSpec(BATCH, None, TENSOR)
    return jax.shard_map(
        per_device,
        in_specs=(queries, all_keys, all_keys, PartitionSpec(BATCH, CONTEXT), PartitionSpec(BATCH)),
        out_specs=queries,
        check_vma=False,  # as splash
    )(*arrays)
