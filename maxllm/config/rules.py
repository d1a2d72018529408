"""What a stage asks of its recipes beyond what every field says of itself; written beside its section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from maxllm.config.data import BatchConfig, DataConfig, TokenizerConfig
from maxllm.config.loss import LossConfig
from maxllm.config.mesh import MeshConfig
from maxllm.config.model import ModelConfig
from maxllm.config.run import RunConfig, StartConfig


class Recipe(Protocol):
    """The sections of a `Config` that rules read; a stage with a section of its own adds it."""

    @property
    def stage(self) -> str: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def start(self) -> StartConfig: ...
    @property
    def model(self) -> ModelConfig | None: ...
    @property
    def tokenizer(self) -> TokenizerConfig | None: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def loss(self) -> LossConfig: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def mesh(self) -> MeshConfig: ...


def one_per_step(recipe: Recipe) -> int:
    """Optimizer updates of a run whose every step is one."""
    return recipe.run.steps


def needs_policy(recipe: Recipe) -> None:
    """A stage that goes on from another.

    Raises:
      ValueError: the recipe does not say from which run.
    """
    if recipe.start.policy is None:
        raise ValueError(f"a {recipe.stage} recipe needs start.policy, the run folder it starts from")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of one stage."""

    check: Callable[[Any], None]
    """Takes a `Recipe`; raises ValueError, naming the first thing that is wrong."""
    updates: Callable[[Any], int] = one_per_step
    """Optimizer updates of a whole run, which the learning rate's schedule is stretched over."""
    replies: bool = False
    """Whether the model replies in training or evaluation: a prompt and its reply then share
    batch.sequence_length."""
    next_token: bool = False
    """Whether it trains next-token prediction and nothing beside it, which `plan --estimate` can add up."""
