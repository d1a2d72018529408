"""Gradient descent, whose updates are the gradients themselves."""

import jax.numpy as jnp
import optax

from maxllm.optim import Optimizer


def sgd(rate: float, momentum: float | None = None) -> Optimizer:
    """optax's, with its learning rate."""
    rule = optax.sgd(rate, momentum)
    return Optimizer(rule.init, rule.update, lambda _: jnp.float32(rate))
