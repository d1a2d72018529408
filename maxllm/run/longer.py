"""A run that is given more steps than it began with, where its learning rates so far stay what they were."""

from __future__ import annotations

from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.folder import RunFolder


def check_may_go_on_longer(folder: RunFolder, former: Config, now: Config) -> None:
    """Whether a run may have another number of steps from its newest checkpoint on.

    Args:
      folder: the run's folder.
      former: the recipe that it began with.
      now: the same recipe with other run.steps.

    Raises:
      UserError: saying why not.
    """
    steps = f"run.steps={former.run.steps}"
    otherwise = "give another run.dir, and start.policy to go on from its weights"
    if now.run.steps < former.run.steps:
        raise UserError(f"{folder} holds a run with {steps}: it can be made longer, not shorter; {otherwise}")
    schedule = former.optimizer.schedule
    if schedule in ("cosine", "linear") or former.optimizer.warmup_steps % 1:
        raise UserError(
            f"{folder} holds a run with {steps}, over which its {schedule} schedule is stretched: with "
            f"{now.run.steps}, the learning rates until now would have been others; {otherwise}"
        )
    if schedule == "wsd":
        per_step = former.updates // former.run.steps
        begins = (former.updates - former.optimizer.decay_of(former.updates)) // per_step
        newest = folder.latest_step() or 0
        if newest > begins:
            raise UserError(
                f"{folder} holds a run with {steps}, whose learning rate falls after step {begins}; its "
                f"newest checkpoint is of step {newest}. Remove the checkpoints after step {begins} to go on "
                f"from there, if one is left; or {otherwise}"
            )
