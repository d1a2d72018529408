"""A run: its folder, length and cadence, and what it starts from."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maxllm.config.section import Effect, Name, Place, Section


class RunConfig(Section):
    """One run of one stage: its folder, length and cadence."""

    dir: Annotated[Place, Effect.RECORD] = Field(
        description="Run folder, here or in a bucket (gs://…, s3://…): config.yaml, metrics.jsonl, "
        "summary.json, checkpoints/."
    )
    hardware: Annotated[Name | None, Effect.RECORD] = Field(
        None, description="The machine that the recipe is meant for, as `plan` names it: v5p-16, h100x8."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seeds initialization, data order, dropout and sampling."
    )
    day: datetime.date | None = Field(
        None,
        description="What chat templates take for today, YYYY-MM-DD; the day on which the run began when "
        "absent.",
    )
    steps: int = Field(
        0, gt=0, description="Optimizer steps (PPO: rollout-and-update iterations); needed without epochs."
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the training rows, in place of steps: these are counted when rows are read.",
    )
    log_every: Annotated[int, Effect.RECORD] = Field(
        10, gt=0, description="Steps between two lines of metrics.jsonl."
    )
    eval_every: Annotated[int, Effect.RECORD] = Field(
        100, gt=0, description="Steps between two evaluations on held-out data."
    )
    patience: Annotated[int | None, Effect.RECORD] = Field(
        None,
        gt=0,
        description="The run ends, saved, when its held-out figure has not gained for so many evaluations.",
    )
    min_gain: Annotated[float, Effect.RECORD] = Field(
        0.0, ge=0, description="What that figure must gain on its best, to have gained."
    )
    checkpoint_every: Annotated[int, Effect.RECORD] = Field(
        100, gt=0, description="Steps between two checkpoints."
    )
    keep_checkpoints: Annotated[int, Effect.RECORD] = Field(
        2, gt=0, description="Latest checkpoints kept; the best evaluated one is kept besides."
    )
    keep_every_steps: Annotated[int | None, Effect.RECORD] = Field(
        None, gt=0, description="Besides, the checkpoints of every so many steps are kept."
    )
    keep_every_minutes: Annotated[float | None, Effect.RECORD] = Field(
        None, gt=0, description="Besides, a checkpoint of every so many minutes is kept."
    )
    fall_back: Annotated[bool, Effect.RECORD] = Field(
        False,
        description="Where the newest checkpoint is damaged, continue from the newest intact one before it; "
        "the damaged one is set aside.",
    )
    max_nonfinite_steps: Annotated[int, Effect.RECORD] = Field(
        5, ge=0, description="More skipped (non-finite) updates in a row than this are bad numbers."
    )
    spike: Annotated[float | None, Effect.COMPUTATION] = Field(
        None,
        gt=0,
        description="So is a loss more than so many standard deviations above the mean of the last 50.",
    )
    on_bad_numbers: Annotated[Literal["stop", "roll_back"], Effect.COMPUTATION] = Field(
        "stop",
        description="With bad numbers the run stops, or goes back to the newest checkpoint before them, and "
        "on with the data after them. Either way their rows are kept in bad/.",
    )
    max_roll_backs: Annotated[int, Effect.COMPUTATION] = Field(
        3, gt=0, description="Roll-backs of a run after which it stops."
    )

    hang_seconds: Annotated[int, Effect.RECORD] = Field(
        300,
        gt=0,
        description="A run of several processes, or with --restarts, in which nothing changes for about as "
        "long ends with 75; compiling, saving and evaluating may take 12 times as long.",
    )

    @model_validator(mode="after")
    def _length(self) -> Self:
        if not self.steps and self.epochs is None:
            raise ValueError("steps or epochs is required, and neither was given")
        return self


class StartConfig(Section):
    """Run folders this stage starts from."""

    policy: Place | None = Field(
        None,
        description="Run folder of the language model to start from (SFT: pretrain's; RM, DPO, PPO: SFT's; "
        "any: a converted one).",
    )
    reward: Place | None = Field(None, description="Run folder of the reward model (PPO).")
    checkpoint: Literal["latest", "best"] = Field(
        "latest",
        description="Which checkpoint of those runs: the newest, or the best by its held-out figure.",
    )
    adapters: Literal["merge", "continue"] = Field(
        "merge",
        description="What becomes of the adapters that start.policy trained: merged into its model, which is "
        "trained from there, or trained on, as they are.",
    )
