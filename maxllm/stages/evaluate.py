"""Evaluate: compute the held-out figures of a run's newest checkpoint, or of another one.

maxllm evaluate runs/tiny/sft --json
maxllm evaluate runs/tiny/sft --checkpoint best
maxllm evaluate runs/tiny/sft 'data.heldout_sources=["my_questions.jsonl"]'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxllm.parallel.mesh import check_batch_divides
from maxllm.run.checkpoint import Which, find, restore
from maxllm.run.session import check_replies_fit, reopen, run_config
from maxllm.stages.registry import stage_of


def run(run_dir: Path, overrides: Sequence[str] = (), which: Which = "latest") -> dict[str, Any]:
    """Restores a checkpoint and evaluates it as training does.

    Pretrain's held-out text was packed by `prepare`: another one is another data.prepared_dir.
    """
    name = run_config(run_dir).stage
    stage = stage_of(name)
    session = reopen(run_dir, overrides, ("generation", "batch.rows", stage.heldout))
    check_replies_fit(session.config)
    check_batch_divides(session.mesh, session.config.batch, session.model)
    checkpoint = find(run_dir, which)
    job = stage.job(session)
    figures = job.evaluate(restore(checkpoint, job.program.abstract_state))
    return {"run": str(run_dir), "stage": name, "step": int(checkpoint.name), **figures}
