"""The reward model: its section, and what its recipes must say."""

from __future__ import annotations

from pydantic import Field

from maxllm.config.rules import Rules, needs_policy
from maxllm.config.section import Section


class RewardConfig(Section):
    """Reward-model training."""

    margin: float = Field(
        0.0, ge=0, description="Subtracted from every score difference inside the pairwise loss."
    )
    centering: float = Field(
        0.0, ge=0, description="Weight of (r_chosen + r_rejected)^2, which keeps scores near 0."
    )


RULES = Rules(check=needs_policy)
