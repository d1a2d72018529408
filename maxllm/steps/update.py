"""From a loss to a step: token-exact gradient accumulation and the guard against non-finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from maxllm.optim import Optimizer
from maxllm.parallel.memory import in_host, in_turns
from maxllm.parallel.pipeline import deal
from maxllm.records import Metrics, Params
from maxllm.steps.state import TrainState
from maxllm.weights import EVERYTHING, Kind, Partition, Weights

FLOAT32 = jnp.dtype("float32")


class Loss(struct.PyTreeNode):
    """What a loss function returns for a (micro)batch: sums, never means."""

    total: jax.Array
    """Sum of the weighted losses; its gradient is accumulated."""
    weight: jax.Array
    """Sum of the weights it will be divided by, once, over the global batch."""
    metrics: Metrics


LossFn = Callable[[Weights, Any, jax.Array], Loss]
"""(weights, batch, dropout key) -> Loss."""


def split(batch: Any, microbatches: int) -> Any:
    """[B, …] -> [microbatches, B / microbatches, …] for every array of the batch.

    Rows are dealt out in turn, so that a batch sharded over devices stays where it is.
    """
    return jax.tree.map(partial(deal, parts=microbatches), batch)


def accumulate(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    key: jax.Array,
    microbatches: int,
    dtype: jnp.dtype = FLOAT32,
    partition: Partition = EVERYTHING,
    kept: Weights | None = None,
) -> tuple[Params, Loss]:
    """Gradient of sum(losses) / sum(weights) over all microbatches, and the summed Loss.

    Args:
      loss_fn: the loss of a microbatch.
      params: the trained part of the weights, of which the gradient is.
      batch: arrays [B, …].
      key: dropout's.
      microbatches: the batch is split into as many.
      dtype: the gradients of the layers' matrices have it as they are made; what is summed and returned is
        float32.
      partition: what `params` are of all weights.
      kept: the other part.
    """

    def total_and_loss(
        params: Params, slots: Params | None, part: Any, key: jax.Array
    ) -> tuple[jax.Array, Loss]:
        loss = loss_fn(partition.joined(params, kept).replace(slots=slots), part, key)
        return loss.total, loss

    gradient_fn = partial(slotted_gradient, total_and_loss, dtype, partition.declared)
    if microbatches == 1:
        sums, loss = gradient_fn(params, batch, key)
    else:
        parts = split(batch, microbatches)
        keys = jax.random.split(key, microbatches)
        first = jax.eval_shape(gradient_fn, params, jax.tree.map(lambda x: x[0], parts), keys[0])
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, FLOAT32)), first
        )

        def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_fn(params, *part)), None

        (sums, loss), _ = jax.lax.scan(add, zeros, (parts, keys))
    # A product, because XLA's CPU backend keeps the result of a division for those who read it, and computes
    # a product anew in each.
    share = 1 / jnp.maximum(loss.weight, 1e-9)
    gradients = jax.tree.map(lambda g: g.astype(FLOAT32) * share, sums)
    return gradients, loss


def slotted_gradient(
    function: Callable[..., tuple[jax.Array, Loss]],
    dtype: jnp.dtype,
    declared: Any,
    params: Params,
    batch: Any,
    key: jax.Array,
) -> tuple[Params, Loss]:
    """The gradient of `function(params, slots, batch, key)`, and what the function returns besides.

    The gradients of the layers' matrices are of type `dtype`, and on the device wherever the matrices are.
    """
    if dtype == FLOAT32 and not in_host(params):
        return jax.grad(function, has_aux=True)(params, None, batch, key)
    assert declared is not None, "whoever wants such gradients says which of the parameters are matrices"
    flat, declarations = flatten_dict(params), flatten_dict(declared)
    matrices = {path: leaf for path, leaf in flat.items() if declarations[path].kind is Kind.MATRIX}
    others = {path: leaf for path, leaf in flat.items() if path not in matrices}
    slots = {path: jnp.zeros(leaf.shape, dtype) for path, leaf in matrices.items()}

    def of_slots(slots: Any, others: Any) -> tuple[jax.Array, Loss]:
        return function(unflatten_dict(matrices | others), unflatten_dict(slots), batch, key)

    (first, second), loss = jax.grad(of_slots, (0, 1), has_aux=True)(slots, others)
    return unflatten_dict(first | second), loss


def update(
    state: TrainState,
    batch: Any,
    key: jax.Array,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    microbatches: int = 1,
    gradient_dtype: jnp.dtype = FLOAT32,
    partition: Partition = EVERYTHING,
    kept: Weights | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step. A non-finite loss or gradient leaves parameters and optimizer as they were.

    Metrics: those of the loss, `loss`, `gradient_norm` before clipping, `skipped` (1 if not finite), and
    `learning_rate`, `update_norm` and `parameter_norm`: the schedule's rate for this update, the global norm
    of what it added to the parameters (0 if skipped), and that of the parameters after it.
    """
    gradients, loss = accumulate(
        loss_fn, state.params, batch, key, microbatches, gradient_dtype, partition, kept
    )
    chex.assert_trees_all_equal_shapes(gradients, state.params)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)

    def updated(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState, Any]:
        updates, new_opt_state = optimizer.update(gradients, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))
        return params, opt_state, jax.tree.map(squares, updates, params)

    old = state.params, state.opt_state
    # Of optimizers, only the clipping looks at more than one parameter, and it looks at gradients alone.
    params, opt_state, sums = in_turns(updated, *old, after=norm) if in_host(old) else updated(*old)
    update_norm, parameter_norm = jnp.sqrt(sum(jax.tree.leaves(sums)))
    one = jnp.float32(1)
    metrics: Metrics = loss.metrics | {
        "loss": (loss.total, loss.weight),
        "gradient_norm": (norm, one),
        "skipped": (1 - finite.astype(jnp.float32), one),
        "learning_rate": (jnp.asarray(optimizer.learning_rate(state.opt_state), FLOAT32), one),
        "update_norm": (jnp.where(finite, update_norm, 0.0), one),
        "parameter_norm": (parameter_norm, one),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def squares(*arrays: jax.Array) -> jax.Array:
    """The sum of each array's squares, float32."""
    return jnp.stack([jnp.sum(jnp.square(array.astype(FLOAT32))) for array in arrays])


def train_step(
    state: TrainState,
    batch: Any,
    *frozen: Weights,
    loss_fn: Callable[..., Loss],
    optimizer: Optimizer,
    seed: int,
    microbatches: int,
    gradient_dtype: jnp.dtype = FLOAT32,
    partition: Partition = EVERYTHING,
    compares: bool = False,
) -> tuple[TrainState, Metrics]:
    """The step of every stage that trains one model on a batch: pretrain, SFT, reward, DPO.

    Args:
      state: what is trained.
      batch: arrays [B, …].
      *frozen: weights that nobody changes, in one tree: those that `partition` keeps, or, where the loss
        compares with them, all that training began from.
      loss_fn: (weights, batch, dropout key, *frozen if it compares) -> Loss.
      optimizer: its state is in `state`.
      seed: the dropout key is a function of it and of the step.
      microbatches: the batch is split into as many.
      gradient_dtype: of the layers' matrices; see `accumulate`.
      partition: what of the weights is in `state`.
      compares: whether the loss reads the weights that training began from.
    """
    others = frozen if compares else ()
    return update(
        state,
        batch,
        jax.random.fold_in(jax.random.key(seed), state.step),
        loss_fn=lambda weights, part, key: loss_fn(weights, part, key, *others),
        optimizer=optimizer,
        microbatches=microbatches,
        gradient_dtype=gradient_dtype,
        partition=partition,
        kept=frozen[0] if frozen else None,
    )


def eval_step(weights: Weights, batch: Any, *others: Weights, loss_fn: Callable[..., Loss]) -> Metrics:
    """The loss without dropout, and the metrics that come with it, as (sum, count)."""
    loss = loss_fn(weights, batch, None, *others)
    return loss.metrics | {"loss": (loss.total, loss.weight)}
