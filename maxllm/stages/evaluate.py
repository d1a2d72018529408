"""Evaluate: the held-out figures of a run's newest checkpoint, or of another one, computed afresh.

maxllm evaluate runs/tiny/sft --json
maxllm evaluate runs/tiny/sft --checkpoint best
maxllm evaluate runs/tiny/sft 'data.heldout_sources=["my_questions.jsonl"]'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maxllm.errors import UserError
from maxllm.parallel.mesh import check_batch_divides
from maxllm.run.checkpoint import Which, find, restore
from maxllm.run.loop import Job
from maxllm.run.session import Session, check_replies_fit, reopen, run_config
from maxllm.stages import dpo, ppo, pretrain, reward, sft

JOBS: dict[str, Callable[[Session], Job]] = {
    "pretrain": pretrain.job,
    "sft": sft.job,
    "reward": reward.job,
    "dpo": dpo.job,
    "ppo": ppo.job,
}


def run(run_dir: Path, overrides: Sequence[str] = (), which: Which = "latest") -> dict[str, Any]:
    """Restores a checkpoint and evaluates it as training does.

    Pretrain's held-out text was packed by `prepare`: another one is another data.prepared_dir.
    """
    stage = run_config(run_dir).stage
    if stage not in JOBS:
        raise UserError(f"{run_dir} holds a {stage} run, which has no held-out figures")
    data = "data.prepared_dir" if stage == "pretrain" else "data"
    session = reopen(run_dir, overrides, ("generation", "batch.rows", data))
    check_replies_fit(session.config)
    check_batch_divides(session.mesh, session.config.batch, session.model)
    checkpoint = find(run_dir, which)
    job = JOBS[stage](session)
    figures = job.evaluate(restore(checkpoint, job.abstract_state))
    return {"run": str(run_dir), "stage": stage, "step": int(checkpoint.name), **figures}
