"""AdamW with a schedule, as an optax chain."""

from typing import Any

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


def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
    """Weight decay applies to matrices. Names decide, not ndim: scanned norm scales are [L, D]."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return not any(name == "scale" or name.endswith("_bias") for name in names)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW with decay on matrices only.

    Args:
      config: the recipe's section.
      steps: updates over which the schedule runs.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
        ),
    )
