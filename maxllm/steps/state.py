"""The training state, and the one abstract description of it that everything else is fed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from maxllm.config import Offload
from maxllm.parallel import sharding
from maxllm.records import Params


class TrainState(struct.PyTreeNode):
    """What a step changes and a checkpoint holds. Randomness is not in it: keys are folded from the step."""

    step: jax.Array
    """int32, steps taken; it advances also when an update is skipped."""
    params: Params
    opt_state: optax.OptState

    def detach(self) -> tuple[Params, TrainState]:
        """(parameters, the state without them): the two items of a checkpoint."""
        return self.params, self.replace(params=None)

    def attach(self, params: Params) -> TrainState:
        """Undoes `detach`."""
        return self.replace(params=params)


def init_params(model: nn.Module, key: jax.Array) -> Params:
    """Fresh parameters, still boxed with their logical axis names."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, tokens_BT, jnp.ones_like(tokens_BT), tokens_BT)["params"]


def init_adapters(model: nn.Module, key: jax.Array) -> Params:
    """Fresh LoRA adapters of a `Llama` that has them, still boxed with their logical axis names."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, tokens_BT, jnp.ones_like(tokens_BT), tokens_BT)["lora"]


def initializer(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    init_trained: Callable[[nn.Module, jax.Array], Params] = init_params,
) -> Callable[[jax.Array], TrainState]:
    """A pure function key -> boxed TrainState of what is trained: the parameters, or `init_adapters`."""

    def init(key: jax.Array) -> TrainState:
        params = init_trained(model, key)
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return init


def abstract(init: Callable[[jax.Array], Any], mesh: Mesh, zero: int = 3, offload: Offload = "none") -> Any:
    """Shapes, types and shardings of what `init` makes, without making it."""
    return sharding.abstract_tree(jax.eval_shape(init, jax.random.key(0)), mesh, zero, offload)


def create(init: Callable[[jax.Array], Any], abstract_state: Any, key: jax.Array) -> Any:
    """Runs `init` straight into its shardings: no unsharded array ever exists."""
    shardings = sharding.shardings_of(abstract_state)
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(key)


def parameter_count(params: Params) -> int:
    """Number of parameters in a (possibly abstract) tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))
