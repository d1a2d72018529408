"""How a run is spread over devices."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from maxllm.config.section import Effect, Section

Offload = Literal["none", "optimizer", "parameters"]


class MeshConfig(Section):
    """Devices along each mesh axis; -1 (at most once) takes what is left."""

    effect: ClassVar[Effect] = Effect.COMPUTATION

    data: int = Field(-1, ge=-1, description="Replicas that each see other rows.")
    fsdp: int = Field(1, ge=-1, description="Shards of the state, as `zero` says; rows are split here too.")
    stage: int = Field(1, ge=-1, description="Stages of a pipeline, each with a share of the layers.")
    context: int = Field(
        1, ge=-1, description="Shards of every row's positions, for long sequences; state is split too."
    )
    tensor: int = Field(1, ge=-1, description="Shards of heads, feed-forward and vocabulary.")
    slices: int = Field(
        1, gt=0, description="TPU slices, or groups of nodes, that only a slow network joins; 1 for none."
    )
    across: Literal["data", "stage"] = Field(
        "data", description="Axis that goes over the slow network; each slice has an equal part of it."
    )
    zero: Literal[0, 1, 2, 3] = Field(
        3,
        description="What fsdp and context split (ZeRO): nothing (0), optimizer state (1), gradients too "
        "(2), parameters too (3).",
    )
    offload: Offload = Field(
        "none",
        description="What lies in the host's memory until a step reads it: nothing, the optimizer's state, "
        "or the layers' matrices too, which are fetched layer by layer.",
    )

    @property
    def sizes(self) -> list[int]:
        """Sizes in the order of the mesh's axes."""
        return [self.data, self.fsdp, self.stage, self.context, self.tensor]

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if 0 in self.sizes or self.sizes.count(-1) > 1:
            raise ValueError("axis sizes are positive, and at most one is -1")
        return self
