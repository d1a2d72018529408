"""The optimizer and its schedule."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from maxllm.config.section import Section


class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adafactor", "muon"] = Field(
        "adamw",
        description="AdamW; Adafactor, whose second moment is a row and a column of each matrix and which "
        "has no first; or Muon for the layers' matrices with AdamW for the rest.",
    )
    learning_rate: float = Field(
        3e-4,
        gt=0,
        description="Peak learning rate; adafactor's is a share of each matrix's root mean square (1e-2).",
    )
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        "cosine",
        description="Decay after warmup; inverse_sqrt goes with the root of warmup / updates; wsd (warmup, "
        "stable, decay) stays at the peak until the last decay_steps. Runs of constant and inverse_sqrt, and "
        "of wsd before it decays, can be given more run.steps later.",
    )
    decay_steps: int | None = Field(
        None, gt=0, description="Updates of wsd's linear decay at the end; a tenth of the run when absent."
    )
    warmup_steps: float = Field(
        0, ge=0, description="Updates of linear warmup from 0; below 1 a share of all of the run's."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The head's learning rate times this is the last layer's, times this again that of the "
        "layer below it, down to the embedding's (layer-wise decay: 0.75 to 0.95).",
    )
    final_share: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, on matrices only.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's decay of its one moment.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which AdamW's two moments and Muon's one are kept; updates are computed in "
        "float32. With bfloat16, beta2 is 0.98 at most: above that, rounding undoes the decay.",
    )
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the layers' gradients until they are summed or clipped; bfloat16 halves them.",
    )

    def warmup_of(self, updates: int) -> int:
        """Updates of warmup in a run of so many."""
        return round(self.warmup_steps * updates) if self.warmup_steps < 1 else int(self.warmup_steps)

    def decay_of(self, updates: int) -> int:
        """Updates of wsd's decay in a run of so many."""
        return self.decay_steps or max(1, updates // 10)

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise ValueError(f"warmup_steps={self.warmup_steps} is neither whole nor a share below 1")
        return self

    @model_validator(mode="after")
    def _decay(self) -> Self:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps is of the schedule wsd, not of {self.schedule}")
        return self

    @model_validator(mode="after")
    def _moments(self) -> Self:
        if self.moment_dtype == "float32":
            return self
        if self.name == "adafactor":
            raise ValueError("adafactor keeps no moment that moment_dtype=bfloat16 could halve; leave it out")
        if self.beta2 > 0.98:
            raise ValueError(
                f"moment_dtype=bfloat16 rounds the decay of beta2={self.beta2} away; give beta2=0.98 or less"
            )
        return self
