"""The training state, and the one abstract description of it that everything else is fed from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from maxllm.config.mesh import Offload
from maxllm.config.tuning import Tuning
from maxllm.errors import UserError
from maxllm.model.forward import declarations_of, init_weights
from maxllm.model.heads import ScalarModel
from maxllm.model.llama import Llama
from maxllm.optim import Optimizer
from maxllm.parallel import sharding
from maxllm.records import Params
from maxllm.weights import Partition


class TrainState(struct.PyTreeNode):
    """What a step changes and a checkpoint holds. Randomness is not in it: keys are folded from the step."""

    step: jax.Array
    """int32, steps taken; it advances also when an update is skipped."""
    params: Params
    """The trained part of the weights; see `Partition`."""
    opt_state: optax.OptState

    def detach(self) -> tuple[Params, TrainState]:
        """(parameters, the state without them): the two items of a checkpoint."""
        return self.params, self.replace(params=None)

    def attach(self, params: Params) -> TrainState:
        """The state with its parameters put back."""
        return self.replace(params=params)


@cache
def partition_of(model: Llama | ScalarModel) -> Partition:
    """What of a model is trained, from its weights' own declarations.

    Raises:
      UserError: every layer is frozen.
    """
    tuning, layers = model.tuning or Tuning(), model.config.n_layers
    if tuning.frozen_layers >= layers:
        raise UserError(
            f"freeze.layers={tuning.frozen_layers} leaves none of the model's {layers} layers to train"
        )
    return Partition.of(declarations_of(model), tuning.frozen_layers, tuning.frozen_embeddings)


def init_params(model: nn.Module, key: jax.Array) -> Params:
    """The trained part of fresh weights, still boxed: all parameters, or a model's adapters."""
    return partition_of(model).split(init_weights(model, key))[0]


def initializer(model: nn.Module, optimizer: Optimizer) -> Callable[[jax.Array], TrainState]:
    """A pure function key -> boxed TrainState."""

    def init(key: jax.Array) -> TrainState:
        params = init_params(model, key)
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return init


def abstract(init: Callable[[jax.Array], Any], mesh: Mesh, zero: int = 3, offload: Offload = "none") -> Any:
    """Shapes, types and shardings of what `init` makes, without making it; of every `TrainState` in it the
    optimizer's arrays go by rules of their own."""

    def describe(node: Any) -> Any:
        if not isinstance(node, TrainState):
            return sharding.abstract_weights(node, mesh, zero, offload)
        return node.replace(
            step=sharding.abstract_weights(node.step, mesh),
            params=sharding.abstract_weights(node.params, mesh, zero, offload),
            opt_state=sharding.abstract_moments(node.opt_state, mesh, zero, offload),
        )

    return jax.tree.map(
        describe,
        jax.eval_shape(init, jax.random.key(0)),
        is_leaf=lambda node: isinstance(node, TrainState) or sharding.is_boxed(node),
    )


def create(init: Callable[[jax.Array], Any], abstract_state: Any, key: jax.Array) -> Any:
    """Runs `init` straight into its shardings: no unsharded array ever exists."""
    shardings = sharding.shardings_of(abstract_state)
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(key)


def parameter_count(params: Params) -> int:
    """Number of parameters in a (possibly abstract) tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))
