"""Evaluate: compute the held-out figures of a run's newest checkpoint, or of another one.

maxllm evaluate runs/tiny/sft --json
maxllm evaluate runs/tiny/sft --checkpoint best
maxllm evaluate runs/tiny/sft 'data.heldout_sources=["my_questions.jsonl"]'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maxllm import recipe
from maxllm.folder import RunFolder, Which
from maxllm.parallel.mesh import check_batch_divides
from maxllm.run.restore import restore
from maxllm.run.session import check_replies_fit, reopen
from maxllm.stages.registry import stage_of


def run(folder: RunFolder, overrides: Sequence[str] = (), which: Which = "latest") -> dict[str, Any]:
    """Restores a checkpoint and evaluates it as training does.

    Pretrain's held-out text was packed by `prepare`: another one is another data.prepared_dir.
    """
    name = recipe.of_run(folder).stage
    stage = stage_of(name)
    session = reopen(folder, overrides, ("generation", "batch.rows", stage.heldout))
    check_replies_fit(session.config)
    check_batch_divides(session.mesh, session.config.batch, session.model)
    checkpoint = folder.find(which)
    job = stage.job(session)
    figures = job.evaluate(restore(checkpoint, job.program.abstract_state))
    return {"run": str(folder), "stage": name, "step": int(checkpoint.name), **figures}
