"""The language-model head and its loss on the mesh: rows over all axes but tensor, vocabulary over tensor.

Each device multiplies its rows with its columns. The head's gradient is summed over rows on the device, part
after part, and crosses the network once; left to the partitioner it would be summed over the devices at every
part.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from maxllm.losses.linear import Chosen, Sums, cross_entropy, target_logps
from maxllm.losses.token import PLAIN, UNREGULARIZED, Regularization, Shaping
from maxllm.parallel.sharding import BATCH, CONTEXT, TABLES, TENSOR

ROWS = (*BATCH, CONTEXT)
X = PartitionSpec(BATCH, CONTEXT)


class Split(NamedTuple):
    """What of the head is split over TABLES: see ZeRO in parallel/sharding.py."""

    parameters: bool
    gradients: bool


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_loss(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    regularization: Regularization = UNREGULARIZED,
) -> Sums:
    """Cross-entropy of x w against targets, summed over all rows of all devices; only `total` has a gradient.

    Args:
      x_BTD: hidden states after the final norm.
      w_DV: the output projection.
      targets_BT: int32 ids.
      weights_BT: float32; 0 where the target does not count.
      regularization: what is added to each token's loss.
    """
    return on_mesh(False, PLAIN, regularization, x_BTD, w_DV, targets_BT, weights_BT)[0]


def on_mesh(
    gradients: bool, shaping: Shaping, regularization: Regularization, *arrays: jax.Array
) -> tuple[Sums, jax.Array | None, jax.Array | None]:
    """`cross_entropy` of each device's rows and columns, summed over all; without a mesh, of everything."""
    if jax.sharding.get_abstract_mesh().empty:
        return block(gradients, shaping, regularization, None, *arrays)
    w, dw = spec("table"), spec("gradient_table")
    split = Split(parameters=w[0] is not None, gradients=dw[0] is not None)
    return jax.shard_map(
        partial(block, gradients, shaping, regularization, split),
        in_specs=(X, w, X, X),
        out_specs=(PartitionSpec(), X, dw) if gradients else (PartitionSpec(), None, None),
        check_vma=False,
    )(*arrays)


def spec(first: str) -> PartitionSpec:
    """How the head is laid out, by the rules in force."""
    return nn.logical_to_mesh_axes((first, "vocab")) or PartitionSpec(None, TENSOR)


def block(
    gradients: bool,
    shaping: Shaping,
    regularization: Regularization,
    split: Split | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, jax.Array | None, jax.Array | None]:
    """One device's share; `split` is None where there are no other devices."""
    B, T, D = x_BTD.shape
    kind = w_DV.dtype
    sums, dx, dw = cross_entropy(
        x_BTD.reshape(B * T, D),
        whole_columns(w_DV, x_BTD.dtype, split is not None and split.parameters),
        targets_BT.reshape(B * T),
        weights_BT.reshape(B * T),
        vocab_axis=TENSOR if split else None,
        gradients=gradients,
        shaping=shaping,
        regularization=regularization,
    )
    if dx is not None and dw is not None:
        dx, dw = dx.reshape(B, T, D), dw.astype(kind)
    if split:
        sums = jax.lax.psum(sums, ROWS)
        if dw is not None and split.gradients:
            dw = jax.lax.psum_scatter(dw, TABLES, scatter_dimension=0, tiled=True)
            dw = jax.lax.psum(dw, tuple(axis for axis in ROWS if axis not in TABLES))
        elif dw is not None:
            dw = jax.lax.psum(dw, ROWS)
    return sums, dx, dw


def whole_columns(w_DV: jax.Array, dtype: Any, split: bool) -> jax.Array:
    """The device's columns of the head, in full; they change type before they cross the network."""
    w_DV = w_DV.astype(dtype)
    return jax.lax.all_gather(w_DV, TABLES, axis=0, tiled=True) if split else w_DV


def loss_forward(
    x_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    regularization: Regularization = UNREGULARIZED,
    shaping: Shaping = PLAIN,
) -> tuple[Sums, tuple[jax.Array | None, jax.Array | None]]:
    """The loss, and its gradients as what the backward pass needs."""
    sums, dx_BTD, dw_DV = on_mesh(True, shaping, regularization, x_BTD, w_DV, targets_BT, weights_BT)
    # Together: the head's gradient is summed and split before dx goes on to the layers. Left alone, XLA keeps
    # the whole of it on every device until their backward pass is over.
    return sums, jax.lax.optimization_barrier((dx_BTD, dw_DV))


def loss_backward(
    regularization: Regularization, gradients: tuple[jax.Array, jax.Array], cotangent: Sums
) -> tuple[Any, Any, None, None]:
    """The gradients times that of `total`; counts have none."""
    dx_BTD, dw_DV = gradients
    g = cotangent.total
    return (dx_BTD * g).astype(dx_BTD.dtype), (dw_DV * g).astype(dw_DV.dtype), None, None


head_loss.defvjp(loss_forward, loss_backward)


# --- log-probabilities -------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_logps(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, shaping: Shaping = PLAIN
) -> jax.Array:
    """log p(target) at every position, [B, T] float32, for losses that are no weighted sum of them."""
    return head_chosen(x_BTD, w_DV, targets_BT, shaping).logps


def head_chosen(x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, shaping: Shaping = PLAIN) -> Chosen:
    """What is made of the logits at every position, [B, T], without a gradient.

    Args:
      x_BTD: hidden states after the final norm.
      w_DV: the output projection.
      targets_BT: int32 ids.
      shaping: how logits become the distribution.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return logps_block(False, None, shaping, x_BTD, w_DV, targets_BT)
    w = spec("table")
    return jax.shard_map(
        partial(logps_block, w[0] is not None, TENSOR, shaping),
        in_specs=(X, w, X),
        out_specs=X,
        check_vma=False,
    )(x_BTD, w_DV, targets_BT)


def logps_block(
    split: bool,
    vocab_axis: str | None,
    shaping: Shaping,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
) -> Chosen:
    """One device's rows; `split` says whether the head is split over TABLES."""
    B, T, D = x_BTD.shape
    w_DV = whole_columns(w_DV, x_BTD.dtype, split)
    chosen = target_logps(x_BTD.reshape(B * T, D), w_DV, targets_BT.reshape(B * T), vocab_axis, shaping)
    return Chosen(*(each.reshape(B, T) for each in chosen))


def logps_forward(
    x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, shaping: Shaping
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The log-probabilities, and what they were made of: the backward pass makes logits again."""
    return head_logps(x_BTD, w_DV, targets_BT, shaping), (x_BTD, w_DV, targets_BT)


def logps_backward(shaping: Shaping, arrays: tuple[jax.Array, ...], g_BT: jax.Array) -> tuple[Any, Any, None]:
    """The gradient of the cross-entropy that weighs each position with minus its cotangent."""
    x_BTD, w_DV, targets_BT = arrays
    _, (dx_BTD, dw_DV) = loss_forward(x_BTD, w_DV, targets_BT, -g_BT, shaping=shaping)
    return dx_BTD, dw_DV, None


head_logps.defvjp(logps_forward, logps_backward)
