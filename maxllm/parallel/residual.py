"""The residual stream on the mesh: between attention and feed-forward its positions are split over context
and tensor, so that norms are computed once and what a layer keeps is kept once.

Attention and feed-forward split heads and width over `tensor`, and read all positions (Korthikanti et al.
2022, "sequence parallelism"): `collected` leads into them, `summed` out of them.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from maxllm.parallel.sharding import CONTEXT, TENSOR


def shards_here() -> int:
    """Devices over which positions are split on the mesh in force; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT] * mesh.shape[TENSOR]


def split(x_BTD: jax.Array) -> jax.Array:
    """The stream laid out so; where positions do not divide, only over context."""
    _, residual = layouts(x_BTD)
    return laid_out(x_BTD, residual, residual)


def collected(x_BTD: jax.Array) -> jax.Array:
    """The stream, or a norm of it, the same on all devices of `tensor`: an all-gather, whose gradient is
    reduce-scattered."""
    return laid_out(x_BTD, *layouts(x_BTD))


def summed(x_BTD: jax.Array) -> jax.Array:
    """What each device of `tensor` has of a result, summed into the stream: a reduce-scatter, whose gradient
    is gathered."""
    return laid_out(x_BTD, *reversed(layouts(x_BTD)))


def layouts(x_BTD: jax.Array) -> tuple[PartitionSpec | None, PartitionSpec | None]:
    """Of what attention and feed-forward read, and of the stream; None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None, None
    positions = "length" if x_BTD.shape[1] % shards_here() else "residual_length"
    whole, residual = (
        nn.logical_to_mesh_axes(("batch", name, "act_embed")) for name in ("length", positions)
    )
    return whole, residual


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def laid_out(x_BTD: jax.Array, layout: PartitionSpec | None, of_gradient: PartitionSpec | None) -> jax.Array:
    """Said for both directions, because the partitioner otherwise gathers what single matmuls result in."""
    return x_BTD if layout is None else jax.lax.with_sharding_constraint(x_BTD, layout)


laid_out.defvjp(
    lambda x_BTD, layout, of_gradient: (laid_out(x_BTD, layout, of_gradient), None),
    lambda layout, of_gradient, _, gradient_BTD: (laid_out(gradient_BTD, of_gradient, layout),),
)
