"""Evaluate: the held-out figures of a run's newest checkpoint, computed afresh.

maxllm evaluate runs/tiny/sft --json
maxllm evaluate runs/tiny/sft 'data.heldout_sources=["my_questions.jsonl"]'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maxllm.errors import UserError
from maxllm.run.checkpoint import Checkpoints
from maxllm.run.loop import Job
from maxllm.run.session import Session, reopen
from maxllm.stages import ppo, pretrain, reward, sft

JOBS: dict[str, Callable[[Session], Job]] = {
    "pretrain": pretrain.job,
    "sft": sft.job,
    "reward": reward.job,
    "ppo": ppo.job,
}


def run(run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Restores the newest checkpoint and evaluates it as training does."""
    session = reopen(run_dir, overrides)
    job = JOBS[session.config.stage](session)
    checkpoints = Checkpoints(run_dir, session.config.run.keep_checkpoints, job.best[1])
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{run_dir} holds no checkpoint yet")
        state = checkpoints.restore(step, job.abstract_state)
    finally:
        checkpoints.close()
    return {"run": str(run_dir), "stage": session.config.stage, "step": step, **job.evaluate(state)}
