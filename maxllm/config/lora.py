"""Low-rank adapters."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from maxllm.config.section import Section

LoraTarget = Literal["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"]


class LoraConfig(Section):
    """Low-rank adapters: SFT trains them alone, the model stays as it is (Hu et al. 2021)."""

    rank: int = Field(16, gt=0, description="Rank r of every adapter.")
    alpha: float = Field(32.0, gt=0, description="Adapters are scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget), min_length=1, description="Weights that have one; all linear layers by default."
    )

    @property
    def scale(self) -> float:
        """alpha / r"""
        return self.alpha / self.rank
