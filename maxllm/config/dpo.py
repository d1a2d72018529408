"""DPO: its section, and what its recipes must say."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from maxllm.config.rules import Rules, needs_policy
from maxllm.config.section import Section


class DpoConfig(Section):
    """DPO, which needs no reward model (Rafailov et al. 2023)."""

    beta: float = Field(0.1, gt=0, description="How dearly departing from the reference is paid for.")
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="Loss of a pair: DPO's, or IPO's square, which has a margin of 1 / (2 beta) to reach.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs thought to be labelled the wrong way round (sigmoid)."
    )
    nll: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen completion's negative log-likelihood, a mean over its tokens: it "
        "keeps that from becoming less likely (Pang et al. 2024).",
    )

    @model_validator(mode="after")
    def _smoothing(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("loss=ipo has no label_smoothing; leave it at 0, or give loss=sigmoid")
        return self


RULES = Rules(check=needs_policy, replies=True)
