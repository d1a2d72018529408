"""Optimizers of one rate, without clipping or decay."""

import jax.numpy as jnp
import optax

from maxllm.optim import Optimizer


def sgd(rate: float, momentum: float | None = None) -> Optimizer:
    """Gradient descent, whose updates are the gradients themselves."""
    return told(optax.sgd(rate, momentum), rate)


def adam(rate: float) -> Optimizer:
    """Kingma & Ba 2015."""
    return told(optax.adam(rate), rate)


def told(rule: optax.GradientTransformation, rate: float) -> Optimizer:
    """optax's rule, with its learning rate."""
    return Optimizer(rule.init, rule.update, lambda _: jnp.float32(rate))
