"""AdamW, Adafactor or Muon, with a schedule, as optax chains."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from maxllm.config.optimizer import OptimizerConfig
from maxllm.weights import Declaration


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup, then cosine, linear or no decay to final_share of the peak; one
    with the inverse square root of the step (Vaswani et al. 2017, equation 3), which goes on for ever; or a
    linear one in the last steps alone (wsd; Hu et al. 2024, MiniCPM, equation 1)."""
    peak, last = config.learning_rate, config.learning_rate * config.final_share
    warmup_steps = config.warmup_of(steps)
    decay_steps = max(steps - warmup_steps, 1)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_share)
        case "linear":
            decay = optax.linear_schedule(peak, last, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
        case "inverse_sqrt":
            first = max(warmup_steps, 1)

            def decay(count: jax.typing.ArrayLike) -> jax.Array:
                return peak * jnp.sqrt(first / (first + jnp.asarray(count, jnp.float32)))

        case "wsd":
            falling = config.decay_of(steps)
            stable, fall = optax.constant_schedule(peak), optax.linear_schedule(peak, last, falling)
            decay = optax.join_schedules([stable, fall], [decay_steps - falling])
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


class Optimizer(NamedTuple):
    """An optax transformation that also says by which learning rate it goes."""

    init: Callable[[Any], Any]
    """Parameters -> a fresh state."""
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    """(gradients, state, parameters) -> (what is added to the parameters, the next state)."""
    learning_rate: Callable[[Any], jax.Array]
    """State -> the learning rate of the update that is made from it."""


def by_declaration(function: Callable[[Declaration, Any], Any], declared: Any, tree: Any) -> Any:
    """`function(declaration, leaf)` on every leaf of a tree of parameters, or of arrays like them.

    A leaf may be in a box, and where optax leaves a parameter to another optimizer there is none.
    """
    return jax.tree.map(
        lambda declaration, node: jax.tree.map(partial(function, declaration), node), declared, tree
    )


def make_optimizer(config: OptimizerConfig, steps: int, declared: Any) -> Optimizer:
    """Gradient clipping by global norm, then a step along the optimizer's direction, with decay on what is
    neither a norm nor a bias.

    Args:
      config: the recipe's section.
      steps: updates over which the schedule runs.
      declared: what the parameters are, a tree of `Declaration`.
    """
    match config.name:
        case "adamw":
            direction = adam(config)
        case "adafactor":
            direction = adafactor(declared)
        case "muon":
            direction = muon(config, declared)
    decayed = optax.add_decayed_weights(
        config.weight_decay, partial(by_declaration, lambda d, _: d.kind.decayed, declared)
    )
    rates = schedule(config, steps)
    by_layer = [slower_below(config.layer_decay, declared)] if config.layer_decay < 1 else []
    whole = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(direction, decayed, *by_layer, optax.scale_by_learning_rate(rates)),
    )
    # The rate goes by the count of the last link's own state, which skipped updates do not advance.
    return Optimizer(whole.init, whole.update, lambda state: rates(state[-1][-1].count))


def slower_below(share: float, declared: Any) -> optax.GradientTransformation:
    """Layer-wise rates: what is n layers below the head goes by share^n (Howard & Ruder 2018, section 3.2;
    Clark et al. 2020, ELECTRA, appendix A). The last layer is 1 below; the embedding table, tied or not, is
    below the lowest layer that is trained; the final norm and the head are 0 below."""

    def below(declaration: Declaration, layers: int, leaf: jax.Array) -> jax.Array | int:
        if declaration.stacked:
            down_L = jnp.arange(leaf.shape[0], 0, -1)
            return down_L.reshape(-1, *(1,) * (leaf.ndim - 1))
        return layers + 1 if declaration.is_embedding else 0

    def update(updates: Any, _: Any) -> Any:
        stacked = by_declaration(lambda d, leaf: leaf.shape[0] if d.stacked else 0, declared, updates)
        layers = max(jax.tree.leaves(stacked), default=0)
        return by_declaration(lambda d, leaf: leaf * share ** below(d, layers, leaf), declared, updates)

    return optax.stateless(update)


# --- directions --------------------------------------------------------------------------------------------


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Kingma & Ba 2015."""
    return kept_in(config.moment_dtype, optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps))


def kept_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computed in float32, with its moments rounded to `dtype` between steps.

    To nearest: what changes a moment by less than 2^-9 to 2^-8 of it is lost. The square root of the second
    is then right in the mean to 0.5 % at beta2 = 0.98, and 7 % too large at 0.99 (as in tests/test_optim.py),
    which `OptimizerConfig` refuses.
    """
    if dtype == "float32":
        return inner

    def cast(state: Any, dtype: str) -> Any:
        moments = [name for name in ("mu", "nu") if name in state._fields]
        return state._replace(**{name: optax.tree.cast(getattr(state, name), dtype) for name in moments})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def muon(config: OptimizerConfig, declared: Any) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embedding, head, norms and biases (Jordan et al. 2024).

    The momentum of each layer's matrix is orthogonalized by itself, and scaled to the root mean square that
    AdamW's updates have, 0.2, so that both go by one learning rate (Liu et al. 2025, "Muon is scalable").
    """

    def scale(declaration: Declaration, update: jax.Array) -> jax.Array:
        axes = axes_of(declaration, update)
        sides = [math.prod(update.shape[i] for i in side) for side in (axes.reduction_axis, axes.output_axis)]
        return update * (0.2 * max(sides) ** 0.5)

    orthogonal = optax.contrib.scale_by_muon(
        beta=config.momentum,
        eps=config.eps,
        weight_dimension_numbers=partial(by_declaration, axes_of, declared),
    )
    scaled = optax.stateless(lambda updates, _: by_declaration(scale, declared, updates))

    def label(declaration: Declaration, _: Any) -> str:
        return "muon" if declaration.stacked and declaration.kind.decayed else "adam"

    return optax.partition(
        {"muon": optax.chain(kept_in(config.moment_dtype, orthogonal), scaled), "adam": adam(config)},
        partial(by_declaration, label, declared),
    )


def axes_of(declaration: Declaration, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    """Which axes of the layers' [L, ...] matrices are contracted with activations, and which are made:
    [L, H, K, D] of attention's output contracts two, [L, D, H, K] makes two."""
    first = 1 + declaration.inputs
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, first)), tuple(range(first, leaf.ndim)))


def adafactor(declared: Any) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, algorithm 4, without momentum: every matrix factored, its update clipped to a
    root mean square of 1 and scaled by the matrix's own."""
    of_matrix = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def label(declaration: Declaration, _: Any) -> str:
        return "layers" if declaration.stacked else "others"

    both = optax.partition(
        {"layers": per_layer(of_matrix, declared), "others": of_matrix},
        partial(by_declaration, label, declared),
    )
    # Rows and columns do not have the axes that a parameter's box names. They are small, and kept whole.
    return optax.GradientTransformation(lambda params: both.init(nn.unbox(params)), both.update)


def per_layer(inner: optax.GradientTransformation, declared: Any) -> optax.GradientTransformation:
    """`inner` on each layer's parameters alone, matrices as [rows, columns] and all others as vectors."""

    def flat(declaration: Declaration, leaf: jax.Array) -> jax.Array:
        if not declaration.kind.decayed:
            return leaf.reshape(leaf.shape[0], -1)
        rows = math.prod(leaf.shape[i] for i in axes_of(declaration, leaf).reduction_axis)
        return leaf.reshape(leaf.shape[0], rows, -1)

    def matrices(tree: Any) -> Any:
        return by_declaration(flat, declared, tree)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        directions, state = jax.vmap(inner.update)(matrices(updates), state, matrices(params))
        return jax.tree.map(lambda flat, leaf: flat.reshape(leaf.shape), directions, updates), state

    return optax.GradientTransformation(lambda params: jax.vmap(inner.init)(matrices(params)), update)
