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
from maxllm.run.checkpoint import Which, find, load_params
from maxllm.run.heldout import kept_heldout
from maxllm.run.session import check_replies_fit, reopen, run_config
from maxllm.stages.registry import stage_of


def run(run_dir: Path, overrides: Sequence[str] = (), which: Which = "latest") -> dict[str, Any]:
    """Reads a checkpoint's parameters and evaluates them as training does.

    Held-out rows are those that the run's folder keeps. They are read from the data where the overrides name
    other data or another length of replies, or where the folder is of a version that kept none. Held-out text
    of pretraining was packed by `prepare`: another one is another data.prepared_dir.
    """
    name = run_config(run_dir).stage
    stage = stage_of(name)
    session = reopen(run_dir, overrides, ("generation", "batch.rows", stage.heldout))
    check_replies_fit(session.config)
    check_batch_divides(session.mesh, session.config.batch, session.model)
    checkpoint = find(run_dir, which)
    evaluate = stage.evaluator(session, kept_heldout(session.config))
    program = stage.program(session.config, session.model, session.mesh)
    figures = evaluate(load_params(checkpoint, program.abstract_state.detach()[0]))
    return {"run": str(run_dir), "stage": name, "step": int(checkpoint.name), **figures}
