"""How the processes of a run find each other."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from maxllm.config.section import Effect, Section

RENDEZVOUS_SECONDS = 1800
"""The hosts of a cold pod come one after another, minutes apart."""


class LaunchConfig(Section):
    """How the processes of a run find each other."""

    effect: ClassVar[Effect] = Effect.RECORD

    rendezvous_seconds: int = Field(
        RENDEZVOUS_SECONDS, gt=0, description="How long a process waits at the start until all are there."
    )
