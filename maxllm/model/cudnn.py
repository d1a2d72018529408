"""NVIDIA's attention kernel, cuDNN's flash attention, for half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxllm.errors import UserError
from maxllm.model.visible import Keys, seen
from maxllm.parallel import context
from maxllm.parallel.sharding import CONTEXT, MICROBATCH, TENSOR


def attend(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, keys: Keys, window: int | None
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
    slots_T = jnp.asarray(context.slots(q_BTHK.shape[1], keys.shards))

    def per_device(q_BTHK, k_BTGK, v_BTGK, segments_BT, slots_T):
        k_BSGK, v_BSGK, key_segments_BS = (
            context.whole_row(a, keys.shards) for a in (k_BTGK, v_BTGK, segments_BT)
        )
        slots_S = jnp.arange(k_BSGK.shape[1])
        seen_BTS = seen(slots_T, slots_S, segments_BT, key_segments_BS, window)
        # To skip what is above the diagonal, cuDNN takes query and key 0 to be the same slot. Its own window
        # it does not take beside a mask, before 9.10.2.
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, mask=seen_BTS[:, None], is_causal=keys.shards == 1, implementation="cudnn"
        )

    arrays = (q_BTHK, k_BTGK, v_BTGK, keys.query_segments_BT, slots_T)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return per_device(*arrays)
    rows, heads = PartitionSpec(MICROBATCH, CONTEXT), PartitionSpec(MICROBATCH, CONTEXT, TENSOR)
    return jax.shard_map(
        per_device,
        in_specs=(heads, heads, heads, rows, PartitionSpec(CONTEXT)),
        out_specs=heads,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,  # as splash
    )(*arrays)
