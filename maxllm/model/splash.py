"""TPU's attention kernel, Pallas splash: it skips blocks above the diagonal and holds no scores."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from maxllm.errors import UserError
from maxllm.model import ring
from maxllm.model.visible import Keys
from maxllm.parallel import context
from maxllm.parallel.sharding import CONTEXT, MICROBATCH, TENSOR

BLOCK = 1024
"""Queries or keys that splash holds at once, at most: 1024 x 1024 scores in float32 are 4 MB of VMEM."""


def attend(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, keys: Keys, window: int | None
) -> jax.Array:
    """The Pallas kernel that skips blocks above the diagonal; each device its rows, heads and queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mesh = jax.sharding.get_abstract_mesh()
    _, T, H, K = q_BTHK.shape
    heads = H if mesh.empty else H // mesh.shape[TENSOR]
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    # Each device has its places' queries and all keys, in the order of the row.
    mask.q_sequence = context.slots(T, keys.shards)
    kernel = make_kernel(mask, heads, keys.shards)

    def per_device(kernel, q_BTHK, k_BTGK, v_BTGK, segments_BT):
        k_BSGK, v_BSGK, key_segments_BS = (
            context.whole_row(a, keys.shards) for a in (k_BTGK, v_BTGK, segments_BT)
        )

        def one_row(q_THK, k_SGK, v_SGK, query_segments_T, key_segments_S):
            segments = kernels.SegmentIds(query_segments_T, key_segments_S)
            heads_first = (a.swapaxes(0, 1) for a in (q_THK * K**-0.5, k_SGK, v_SGK))
            return kernel(*heads_first, segment_ids=segments).swapaxes(0, 1)

        return jax.vmap(one_row)(q_BTHK, k_BSGK, v_BSGK, segments_BT, key_segments_BS)

    arrays = (q_BTHK, k_BTGK, v_BTGK, keys.query_segments_BT)
    if mesh.empty:
        return per_device(kernel, *arrays)
    rows, heads_of = PartitionSpec(MICROBATCH, CONTEXT), PartitionSpec(MICROBATCH, CONTEXT, TENSOR)
    outside = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # in a pipeline, `mesh` is that of one stage
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(outside, PartitionSpec(None, CONTEXT)))
    return jax.shard_map(
        per_device,
        in_specs=(kernel_spec, heads_of, heads_of, heads_of, rows),
        out_specs=heads_of,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,  # Pallas kernels do not say what varies over which axis
    )(kernel, *arrays)


def make_kernel(mask: Any, heads: int, shards: int = 1, with_logsumexp: bool = False) -> Any:
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


# --- one block of a ring -----------------------------------------------------------------------------------


def block_forward(causal: bool, arrays: ring.Arrays) -> tuple[jax.Array, jax.Array]:
    """One block of a ring."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = block_kernel(causal, arrays)

    def one_row(q_HTK, k_GSK, v_GSK, query_segments_T, key_segments_S):
        segments = kernels.SegmentIds(query_segments_T, key_segments_S)
        return kernel(q_HTK, k_GSK, v_GSK, segment_ids=segments)

    o_BHTK, (lse_BHT,) = jax.vmap(one_row)(*heads_first(arrays))
    return o_BHTK.swapaxes(1, 2), lse_BHT.swapaxes(1, 2)


def block_backward(
    causal: bool, arrays: ring.Arrays, o_BTHK: jax.Array, lse_BTH: jax.Array, do_BTHK: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients of a block of the ring with respect to queries, keys and values.

    JAX differentiates the kernel by its own logsumexp only; the function that it calls for that takes any, so
    the logsumexp of the whole row too.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    kernel = block_kernel(causal, arrays)

    def one_row(q_HTK, k_GSK, v_GSK, query_segments_T, key_segments_S, o_HTK, lse_HT, do_HTK):
        segments = kernels.SegmentIds(query_segments_T, key_segments_S)
        kept = (q_HTK, k_GSK, v_GSK, segments, None, o_HTK, lse_HT, kernel.dq_mask_info, kernel.dkv_mask_info)
        return kernels._splash_attention_bwd(**kernel.kwargs, res=kept, do=do_HTK)[3:6]

    own = (a.swapaxes(1, 2) for a in (o_BTHK, lse_BTH, do_BTHK))
    dq, dk, dv = (a.swapaxes(1, 2) for a in jax.vmap(one_row)(*heads_first(arrays), *own))
    return dq * q_scale(arrays), dk, dv


BLOCK_OF_RING = ring.Block(block_forward, block_backward)


def block_kernel(causal: bool, arrays: ring.Arrays) -> Any:
    """The kernel of one block of a ring."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, T, H, _), S = arrays[0].shape, arrays[1].shape[1]
    mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    return make_kernel(mask, H, with_logsumexp=True)


def heads_first(arrays: ring.Arrays) -> tuple[jax.Array, ...]:
    """As the kernel wants them: scaled queries [B, H, T, K], keys and values [B, G, S, K], segments."""
    q, k, v, *segments = arrays
    return *(a.swapaxes(1, 2) for a in (q * q_scale(arrays), k, v)), *segments


def q_scale(arrays: ring.Arrays) -> float:
    """1 / sqrt(K)"""
    return arrays[0].shape[-1] ** -0.5
