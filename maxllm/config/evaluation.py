"""How replies to held-out questions are measured."""

from __future__ import annotations

from pydantic import Field

from maxllm.config.section import Name, Section


class EvaluationConfig(Section):
    """Held-out questions, beside the loss."""

    scorer: Name | None = Field(
        None,
        description="FILE.py:FUNCTION of (reply, row) that scores a reply, larger is better; its mean is the "
        "figure `score`, which then ranks checkpoints in place of the loss.",
    )
    shots: int = Field(
        0, ge=0, description="Training conversations that stand before each question as examples (SFT)."
    )
