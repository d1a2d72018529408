"""Decoding."""

from __future__ import annotations

from pydantic import Field, field_validator

from maxllm.config.section import Section


class GenerationConfig(Section):
    """Decoding."""

    max_new_tokens: int = Field(
        64,
        gt=0,
        description="Most tokens generated (R); the prompt may take the rest of batch.sequence_length.",
    )
    context: int | None = Field(
        None,
        gt=1,
        description="Tokens of a prompt and its reply together, in generate and chat; the model's context "
        "when absent, and beyond it only with a warning.",
    )
    temperature: float = Field(
        0.0, ge=0, description="0 is greedy; otherwise logits are divided by it, from 1e-6 on."
    )
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest tokens; 0 for all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample within the smallest set of this probability.")

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        # Logits of some thousands, and the -1e30 of ids without a token, stay finite in float32.
        if 0 < value < 1e-6:
            raise ValueError(f"{value:g} is too small to divide logits by; 0 is greedy, 1e-6 the least")
        return value
