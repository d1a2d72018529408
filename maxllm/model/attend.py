"""softmax(q k^T / sqrt(K)) v by several kernels with one meaning: XLA's matmuls, TPU's splash, cuDNN's.

Key and value heads are never repeated: G of them serve H query heads.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maxllm.errors import UserError
from maxllm.model import cudnn, ring, splash, xla
from maxllm.model.visible import Keys
from maxllm.parallel.sharding import CONTEXT, MICROBATCH, TENSOR

Backend = Literal["auto", "xla", "splash", "cudnn"]

HARDWARE: dict[str, Backend] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "xla", "cpu": "xla"}
"""`jax.Device.platform` -> the kernel made for it."""


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
    travelling: bool = False,
    slopes_H: np.ndarray | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """[B, T, H, K] in q's type.

    Args:
      backend: the kernel; "auto" is what this process computes on, see `resolve`.
      q_BTHK: queries.
      k_BSGK: keys.
      v_BSGK: values.
      keys: who sees whom.
      window: how many keys a query sees at most, its own included; None for all.
      travelling: each device's keys go around the others of its row; else every device gathers all of them.
      slopes_H: of ALiBi, None without it; only XLA's kernel has it.
      dropout: the share of probabilities that become 0; only XLA's kernel has it.
      dropout_key: says which; None for none of them.
    """
    if backend == "auto":
        backend = resolve(backend, jax.default_backend(), q_BTHK.dtype)
    if travelling:
        return around(backend, q_BTHK, k_BSGK, v_BSGK, keys)
    if backend == "splash":
        return splash.attend(q_BTHK, k_BSGK, v_BSGK, keys, window)
    if backend == "cudnn":
        return cudnn.attend(q_BTHK, k_BSGK, v_BSGK, keys, window)
    k_BSGK, v_BSGK = (
        nn.with_logical_constraint(a, ("batch", "keys", "act_heads", None)) for a in (k_BSGK, v_BSGK)
    )
    pattern = xla.Pattern(window, dropout)
    return xla.attend(q_BTHK, k_BSGK, v_BSGK, keys, pattern, slopes_H, dropout_key)


def around(
    backend: Backend, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, keys: Keys
) -> jax.Array:
    """Attention whose keys and values travel, see model/ring.py; `keys.shards` is the context of the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = PartitionSpec(MICROBATCH, CONTEXT), PartitionSpec(MICROBATCH, CONTEXT, TENSOR)
    return jax.shard_map(
        partial(ring.ring, splash.BLOCK_OF_RING if backend == "splash" else xla.BLOCK_OF_RING),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(q_BTHK, k_BTGK, v_BTGK, keys.query_segments_BT)
