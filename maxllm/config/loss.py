"""The loss of next-token prediction: what counts, and what is added to it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from maxllm.config.section import Section


class LossConfig(Section):
    """The loss of pretraining and SFT. Held-out figures are the plain cross-entropy."""

    mean: Literal["tokens", "samples"] = Field(
        "tokens",
        description="Every trained token of a batch counts alike, or every sample of SFT does, however long.",
    )
    thoughts: float = Field(
        1.0,
        ge=0,
        description="Weight of the tokens that a reply of SFT says between <think> and </think>, and of both "
        "marks, when that of its other tokens is 1.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target's probability that all tokens are given equally."
    )
    z: float = Field(
        0.0, ge=0, description="Weight of the squared log of softmax's denominator (z-loss; PaLM: 1e-4)."
    )
