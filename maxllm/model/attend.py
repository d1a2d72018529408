"""softmax(q k^T / sqrt(K)) v by two kernels with one meaning: XLA's matmuls, and TPU splash.

Key and value heads are never repeated: G of them serve H query heads. A query sees the keys of its own
segment up to its own slot; padding (segment 0) sees nothing that matters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from maxllm.errors import UserError
from maxllm.model import ring
from maxllm.parallel import context
from maxllm.parallel.sharding import CONTEXT, MICROBATCH, TENSOR

Backend = Literal["auto", "xla", "splash"]

HARDWARE: dict[str, Backend] = {"tpu": "splash", "gpu": "xla", "cuda": "xla", "rocm": "xla", "cpu": "xla"}
"""`jax.Device.platform` -> the kernel made for it."""

BLOCK = 1024
"""Queries or keys that splash holds at once, at most: 1024 x 1024 scores in float32 are 4 MB of VMEM."""


class Keys(struct.PyTreeNode):
    """What decides which keys a query sees."""

    query_segments_BT: jax.Array
    key_segments_BS: jax.Array
    first_slot: jax.Array
    """Index among the keys of the first query; 0 without a cache."""
    shards: int = struct.field(pytree_node=False, default=1)
    """Positions are in the order of parallel/context.py for so many devices; 1 is the order of the row."""


def resolve(backend: Backend, platform: str) -> Backend:
    """The kernel that `auto` means on a platform.

    Raises:
      UserError: the one asked for does not run there.
    """
    best = HARDWARE[platform]
    if backend not in ("auto", "xla", best):
        raise UserError(f"model.attention={backend} does not run on {platform}; give auto or xla")
    return best if backend == "auto" else backend


def attend(
    backend: Backend,
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    keys: Keys,
    window: int | None,
    dropout: Callable[[jax.Array], jax.Array],
    travelling: bool = False,
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
      travelling: every device has its own keys, which go around; else all have all keys.
    """
    if backend == "auto":
        backend = HARDWARE[jax.default_backend()]
    if travelling:
        return around(backend, q_BTHK, k_BSGK, v_BSGK, keys)
    if backend == "splash":
        return splash(q_BTHK, k_BSGK, v_BSGK, keys, window)
    return xla(q_BTHK, k_BSGK, v_BSGK, keys, window, dropout)


# --- XLA ---------------------------------------------------------------------------------------------------


def visible(keys: Keys, window: int | None) -> jax.Array:
    """[B, T, S] bool: which keys a query sees."""
    query_slots_T = keys.first_slot + context.slots(keys.query_segments_BT.shape[1], keys.shards)
    key_slots_S = context.slots(keys.key_segments_BS.shape[1], keys.shards)
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
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mesh = jax.sharding.get_abstract_mesh()
    (_, T, H, K), S = q_BTHK.shape, k_BSGK.shape[1]
    heads = H if mesh.empty else H // mesh.shape[TENSOR]
    mask = masks.CausalMask((T, S)) if window is None else masks.LocalMask((T, S), (window - 1, 0), 0)
    # Each device has its places' queries and all keys, in the order of the row.
    mask.q_sequence = context.slots(T, keys.shards)
    k_BSGK, v_BSGK, key_segments_BS = (
        context.unbalanced(a, keys.shards) for a in (k_BSGK, v_BSGK, keys.key_segments_BS)
    )
    kernel = splash_kernel(mask, heads, keys.shards)

    def per_device(kernel, q_BTHK, k_BSGK, v_BSGK, query_segments_BT, key_segments_BS):
        def one_row(q_THK, k_SGK, v_SGK, query_segments_T, key_segments_S):
            segments = kernels.SegmentIds(query_segments_T, key_segments_S)
            heads_first = (a.swapaxes(0, 1) for a in (q_THK * K**-0.5, k_SGK, v_SGK))
            return kernel(*heads_first, segment_ids=segments).swapaxes(0, 1)

        return jax.vmap(one_row)(q_BTHK, k_BSGK, v_BSGK, query_segments_BT, key_segments_BS)

    arrays = (q_BTHK, k_BSGK, v_BSGK, keys.query_segments_BT, key_segments_BS)
    if mesh.empty:
        return per_device(kernel, *arrays)
    queries, all_keys = PartitionSpec(MICROBATCH, CONTEXT, TENSOR), PartitionSpec(MICROBATCH, None, TENSOR)
    outside = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # in a pipeline, `mesh` is that of one stage
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(outside, PartitionSpec(None, CONTEXT)))
    return jax.shard_map(
        per_device,
        in_specs=(
            kernel_spec,
            queries,
            all_keys,
            all_keys,
            PartitionSpec(MICROBATCH, CONTEXT),
            PartitionSpec(MICROBATCH),
        ),
        out_specs=queries,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,  # Pallas kernels do not say what varies over which axis
    )(kernel, *arrays)


def splash_kernel(mask: Any, heads: int, shards: int = 1, with_logsumexp: bool = False) -> Any:
    """The kernel of `heads` heads; over `shards` devices that each have T / shards of the queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_kv = block_size(mask.shape[0] // shards), block_size(mask.shape[1])
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
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        save_residuals=with_logsumexp,
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


# --- ring --------------------------------------------------------------------------------------------------


def around(
    backend: Backend, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, keys: Keys
) -> jax.Array:
    """Attention whose keys and values travel, see model/ring.py; `keys.shards` is the context of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = PartitionSpec(MICROBATCH, CONTEXT), PartitionSpec(MICROBATCH, CONTEXT, TENSOR)
    return jax.shard_map(
        partial(ring.ring, SPLASH if backend == "splash" else ring.XLA),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(q_BTHK, k_BTGK, v_BTGK, keys.query_segments_BT)


def splash_forward(causal: bool, arrays: ring.Arrays) -> tuple[jax.Array, jax.Array]:
    """One block of a ring."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = splash_block(causal, arrays)

    def one_row(q_HTK, k_GSK, v_GSK, query_segments_T, key_segments_S):
        segments = kernels.SegmentIds(query_segments_T, key_segments_S)
        return kernel(q_HTK, k_GSK, v_GSK, segment_ids=segments)

    o_BHTK, (lse_BHT,) = jax.vmap(one_row)(*heads_first(arrays))
    return o_BHTK.swapaxes(1, 2), lse_BHT.swapaxes(1, 2)


def splash_backward(
    causal: bool, arrays: ring.Arrays, o_BTHK: jax.Array, lse_BTH: jax.Array, do_BTHK: jax.Array
) -> tuple[jax.Array, ...]:
    """Its gradients. JAX differentiates the kernel by its own logsumexp only; the function that it calls for
    that takes any, so that of the whole row too."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = splash_block(causal, arrays)

    def one_row(q_HTK, k_GSK, v_GSK, query_segments_T, key_segments_S, o_HTK, lse_HT, do_HTK):
        segments = kernels.SegmentIds(query_segments_T, key_segments_S)
        kept = (q_HTK, k_GSK, v_GSK, segments, None, o_HTK, lse_HT, kernel.dq_mask_info, kernel.dkv_mask_info)
        return kernels._splash_attention_bwd(**kernel.kwargs, res=kept, do=do_HTK)[3:6]

    own = (a.swapaxes(1, 2) for a in (o_BTHK, lse_BTH, do_BTHK))
    dq, dk, dv = (a.swapaxes(1, 2) for a in jax.vmap(one_row)(*heads_first(arrays), *own))
    return dq * q_scale(arrays), dk, dv


SPLASH = ring.Block(splash_forward, splash_backward)


def splash_block(causal: bool, arrays: ring.Arrays) -> Any:
    """The kernel of one block of a ring."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, T, H, _), S = arrays[0].shape, arrays[1].shape[1]
    mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    return splash_kernel(mask, H, with_logsumexp=True)


def heads_first(arrays: ring.Arrays) -> tuple[jax.Array, ...]:
    """As the kernel wants them: scaled queries [B, H, T, K], keys and values [B, G, S, K], segments."""
    q, k, v, *segments = arrays
    return *(a.swapaxes(1, 2) for a in (q * q_scale(arrays), k, v)), *segments


def q_scale(arrays: ring.Arrays) -> float:
    """1 / sqrt(K)"""
    return arrays[0].shape[-1] ** -0.5
