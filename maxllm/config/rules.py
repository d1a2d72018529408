"""What a stage asks of its recipes beyond what every field says of itself; written beside its section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxllm.config.root import Config


def one_per_step(recipe: Config) -> int:
    """Optimizer updates of a run whose every step is one."""
    return recipe.run.steps


def needs_policy(recipe: Config) -> None:
    """A stage that goes on from another.

    Raises:
      ValueError: the recipe does not say from which run.
    """
    if recipe.start.policy is None:
        raise ValueError(f"a {recipe.stage} recipe needs start.policy, the run folder it starts from")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of one stage."""

    check: Callable[[Config], None]
    """Raises ValueError, naming the first thing that is wrong."""
    updates: Callable[[Config], int] = one_per_step
    """Optimizer updates of the whole run, which the learning rate's schedule is stretched over."""
    replies: bool = False
    """Whether the model replies in training or evaluation: a prompt and its reply then share
    batch.sequence_length."""
    next_token: bool = False
    """Whether it trains next-token prediction and nothing beside it, which `plan --estimate` can add up."""
    adapters: bool = False
    """Whether `lora` may train adapters instead of the model."""
