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
from maxllm.run.heldout import kept_heldout
from maxllm.run.restore import load_params
from maxllm.run.session import check_replies_fit, reopen
from maxllm.stages.registry import stage_of


def run(folder: RunFolder, overrides: Sequence[str] = (), which: Which = "latest") -> dict[str, Any]:
    """Reads a checkpoint's parameters and evaluates them as training does.

    Held-out rows are those that the run's folder keeps. They are read from the data where the overrides name
    other data, another length of replies, examples or a scorer, or where the folder kept none. Held-out text
    of pretraining was packed by `prepare`: another one is another data.prepared_dir.
    """
    name = recipe.of_run(folder).stage
    stage = stage_of(name)
    session = reopen(folder, overrides, ("generation", "evaluation", "batch.rows", stage.heldout))
    check_replies_fit(session.config)
    check_batch_divides(session.mesh, session.config.batch, session.model)
    checkpoint = folder.find(which)
    evaluate = stage.figures(session, kept_heldout(folder, session.config))
    program = stage.program(session.config, session.model, session.mesh)
    measured = evaluate(load_params(checkpoint, program.abstract_state.detach()[0]))
    return {"run": str(folder), "stage": name, "step": int(checkpoint.name), **measured.figures}
