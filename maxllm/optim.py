"""AdamW, Adafactor or Muon, with a schedule, as optax chains."""

import math
from typing import Any

import flax.linen as nn
import jax
import optax

from maxllm.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup, then cosine, linear or no decay to final_share of the peak."""
    peak, last = config.learning_rate, config.learning_rate * config.final_share
    decay_steps = max(steps - config.warmup_steps, 1)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_share)
        case "linear":
            decay = optax.linear_schedule(peak, last, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
    warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def names(path: tuple[Any, ...]) -> list[str]:
    """The names on the way to a parameter."""
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
    """Weight decay applies to matrices. Names decide, not ndim: scanned norm scales are [L, D]."""
    return not any(name == "scale" or name.endswith("_bias") for name in names(path))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then a step along the optimizer's direction, with decay on matrices.

    Args:
      config: the recipe's section.
      steps: updates over which the schedule runs.
    """
    match config.name:
        case "adamw":
            direction = adam(config)
        case "adafactor":
            direction = adafactor()
        case "muon":
            direction = muon(config)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            direction,
            optax.add_decayed_weights(
                config.weight_decay, lambda params: jax.tree_util.tree_map_with_path(is_matrix, params)
            ),
            optax.scale_by_learning_rate(schedule(config, steps)),
        ),
    )


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


def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embedding, head, norms and biases (Jordan et al. 2024).

    The momentum of each layer's matrix is orthogonalized by itself, and scaled to the root mean square that
    AdamW's updates have, 0.2, so that both go by one learning rate (Liu et al. 2025, "Muon is scalable").
    """

    def dimensions(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(axes_of, tree)

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        axes = axes_of(path, update)
        sides = [math.prod(update.shape[i] for i in side) for side in (axes.reduction_axis, axes.output_axis)]
        return update * (0.2 * max(sides) ** 0.5)

    orthogonal = optax.contrib.scale_by_muon(
        beta=config.momentum, eps=config.eps, weight_dimension_numbers=dimensions
    )
    scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        return "muon" if "layers" in names(path) and is_matrix(path, leaf) else "adam"

    return optax.partition(
        {"muon": optax.chain(kept_in(config.moment_dtype, orthogonal), scaled), "adam": adam(config)},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def axes_of(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    """Which axes of the layers' [L, ...] matrices are contracted with activations, and which are made:
    [L, H, K, D] of wo contracts two, [L, D, H, K] makes two."""
    first = 3 if leaf.ndim == 4 and "wo" in names(path) else 2
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, first)), tuple(range(first, leaf.ndim)))


def adafactor() -> optax.GradientTransformation:
    """Shazeer & Stern 2018, algorithm 4, without momentum: every matrix factored, its update clipped to a
    root mean square of 1 and scaled by the matrix's own."""
    of_matrix = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def label(path: tuple[Any, ...], _: Any) -> str:
        return "layers" if "layers" in names(path) else "others"

    both = optax.partition(
        {"layers": per_layer(of_matrix), "others": of_matrix},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )
    # Rows and columns do not have the axes that a parameter's box names. They are small, and kept whole.
    return optax.GradientTransformation(lambda params: both.init(nn.unbox(params)), both.update)


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on each layer's parameters alone, matrices as [rows, columns] and all others as vectors."""

    def flat(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not is_matrix(path, leaf):
            return leaf.reshape(leaf.shape[0], -1)
        rows = math.prod(leaf.shape[i] for i in axes_of(path, leaf).reduction_axis)
        return leaf.reshape(leaf.shape[0], rows, -1)

    def matrices(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(flat, tree)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        directions, state = jax.vmap(inner.update)(matrices(updates), state, matrices(params))
        return jax.tree.map(lambda flat, leaf: flat.reshape(leaf.shape), directions, updates), state

    return optax.GradientTransformation(lambda params: jax.vmap(inner.init)(matrices(params)), update)
