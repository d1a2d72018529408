"""How the processes of a run find each other, and what the libraries below them are told."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from maxllm.config.section import NO_SECRETS, Effect, Section

SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""In the names of variables whose values nobody else may read."""


def one_value(value: object) -> object:
    """Refuses lists and mappings by a sentence of its own; pydantic would name the last type it tried."""
    if isinstance(value, list | dict):
        raise ValueError(f"an option of XLA is text, a number, true, false or null; given was {value!r}")
    return value


Option = Annotated[str | bool | int | float | None, BeforeValidator(one_value)]
"""Value of an option of XLA's; None: it is left to XLA."""


class LaunchConfig(Section):
    """How the processes of a run find each other, and what the libraries below them are told."""

    effect: ClassVar[Effect] = Effect.RECORD

    rendezvous_seconds: int = Field(
        1800,
        gt=0,
        description="How long a process waits at the start until all are there: the hosts of a cold pod come "
        "one after another, minutes apart.",
    )

    maintenance: Literal["auto", "google", "none"] = Field(
        "auto",
        description="Who is asked whether this machine is about to be taken away, so that the run saves "
        "before: Google's metadata server; with `auto`, that server on a Cloud TPU VM.",
    )
    compiler_options: Annotated[dict[str, Option], Effect.COMPUTATION] = Field(
        {},
        description="Options of XLA for every program, on top of those of parallel/settings.py, as in "
        "launch.compiler_options.xla_gpu_enable_pipelined_all_reduce=false; null leaves one to XLA.",
    )
    variables: Annotated[dict[str, str], Effect.COMPUTATION] = Field(
        {},
        description="Variables for NCCL, libtpu and JAX, on top of those of parallel/settings.py, as in "
        "launch.variables.NCCL_DEBUG=INFO; one that the environment has already wins.",
    )

    @field_validator("variables")
    @classmethod
    def _no_secrets(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if SECRET.search(name):
                raise ValueError(f"{NO_SECRETS}: set {name} in the environment of the processes")
        return variables


NO_SETTINGS = LaunchConfig()
"""A recipe that says nothing of it."""
