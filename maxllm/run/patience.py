"""Early stopping: a run ends where its held-out figure has not gained for some evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maxllm.config.run import RunConfig

STOPPED_EARLY = "stopped_early"
"""What summary.json calls the patience that ran out."""


def in_vain(ranks: Sequence[float], run: RunConfig) -> bool:
    """Whether the newest `run.patience` evaluations are no better than the best one before them.

    Args:
      ranks: of all evaluations in order, larger is better; one that is no number is no gain.
      run: the recipe's section.
    """
    if run.patience is None:
        return False
    best, waited = float("-inf"), 0
    for rank in ranks:
        waited += 1
        if rank > best + run.min_gain:
            best, waited = rank, 0
    return waited >= run.patience


def is_complete(summary: Mapping[str, Any], run: RunConfig) -> bool:
    """Whether a run that ended so has nothing left to do: all its steps, or its patience ran out."""
    return summary["steps"] >= run.steps or (
        run.patience is not None and summary.get(STOPPED_EARLY) == run.patience
    )
