"""PPO: its section, and what its recipes must say."""

from __future__ import annotations

from typing import Protocol

from pydantic import Field

from maxllm.config.rules import Recipe, Rules, needs_policy
from maxllm.config.section import Section


class PpoConfig(Section):
    """PPO on a reward model (Schulman 2017; Ziegler 2019; Ouyang 2022)."""

    epochs: int = Field(2, gt=0, description="Passes over each batch of rollouts.")
    minibatches: int = Field(1, gt=0, description="Updates per pass.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    clip: float = Field(0.2, gt=0, description="Half-width of the ratio clip.")
    value_clip: float = Field(0.2, gt=0, description="Half-width of the value clip.")
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty (k1) in the reward.")
    score_clip: float = Field(10.0, gt=0, description="Scores of the reward model are clipped to +- this.")
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a response that never stops."
    )
    critic_learning_rate: float = Field(
        1e-4, gt=0, description="Peak learning rate of the critic; its other settings are the optimizer's."
    )


class PpoRecipe(Recipe, Protocol):
    """What PPO's rules read."""

    @property
    def ppo(self) -> PpoConfig: ...


def check(recipe: PpoRecipe) -> None:
    """Two runs to start from, and a batch that divides into minibatches.

    Raises:
      ValueError: naming what is missing, or the numbers.
    """
    needs_policy(recipe)
    if recipe.start.reward is None:
        raise ValueError("a ppo recipe needs start.reward, the reward model's run folder")
    if recipe.mesh.offload != "none":
        raise ValueError("ppo keeps its four models on the device: give mesh.offload=none")
    if recipe.batch.rows % (recipe.ppo.minibatches * recipe.batch.microbatches):
        raise ValueError(
            f"ppo.minibatches={recipe.ppo.minibatches} x batch.microbatches={recipe.batch.microbatches} "
            f"does not divide batch.rows={recipe.batch.rows}"
        )


def updates(recipe: PpoRecipe) -> int:
    """Optimizer updates of the whole run: a step makes one of each minibatch in each epoch."""
    return recipe.run.steps * recipe.ppo.epochs * recipe.ppo.minibatches


RULES = Rules(check=check, updates=updates, replies=True)
