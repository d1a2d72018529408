"""How replies to held-out questions are measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from maxllm.config.section import Effect, Name, Section


class EvaluationConfig(Section):
    """Held-out questions, beside the loss."""

    scorer: Annotated[Name | None, Effect.RECORD] = Field(
        None,
        description="FILE.py:FUNCTION of (reply, row) that scores a reply, larger is better; its mean is the "
        "figure `score`, which then ranks checkpoints in place of the loss.",
    )
    shots: int = Field(
        0, ge=0, description="Training conversations that stand before each question as examples (SFT)."
    )
