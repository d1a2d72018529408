"""Held-out rows: where a run keeps them, so that `evaluate` needs no training data, and means over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.data.store import is_record
from maxllm.folder import RunFolder
from maxllm.records import Metrics, Params


class Measured(NamedTuple):
    """What an evaluation finds."""

    figures: dict[str, float]
    samples: Sequence[dict[str, str]] = ()
    """Replies to some fixed prompts, in {"prompt", "reply"} and, where it is known, the right "answer"."""


Evaluate = Callable[[Params], Measured]
"""Measures the exported parameters of a state on held-out rows."""


def kept_heldout(folder: RunFolder, config: Config) -> Path | None:
    """Where a run's held-out rows are kept, or None where they must be read from its data.

    Args:
      folder: of a run that has begun.
      config: its recipe, of which some settings may be other ones now.
    """
    former = recipe.of_run(folder)
    # Of what `evaluate` may set, these decide about the rows: the data, the room that replies take, examples.
    same = (
        config.data == former.data
        and config.generation.max_new_tokens == former.generation.max_new_tokens
        and config.evaluation == former.evaluation
    )
    return folder.heldout if same and is_record(folder.heldout) else None


def mean_over(batches: Any, step: Callable[[Any], Metrics]) -> dict[str, float]:
    """Runs an evaluation step over batches and divides the sums once."""
    total: Any = None
    for batch, _ in batches:
        sums = step(batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return {name: float(value) / float(count) for name, (value, count) in jax.device_get(total).items()}
