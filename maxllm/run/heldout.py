"""Held-out rows: where a run keeps them, so that `evaluate` needs no training data, and means over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.data.store import is_record
from maxllm.folder import RunFolder
from maxllm.records import Metrics


def kept_heldout(folder: RunFolder, config: Config) -> Path | None:
    """Where a run's held-out rows are kept, or None where they must be read from its data.

    Args:
      folder: of a run that has begun.
      config: its recipe, of which some settings may be other ones now.
    """
    former = recipe.of_run(folder)
    # Of what `evaluate` may set, the data and the room that replies take decide about the rows.
    same = config.data == former.data and config.generation.max_new_tokens == former.generation.max_new_tokens
    return folder.heldout if same and is_record(folder.heldout) else None


def mean_over(batches: Any, step: Callable[[Any], Metrics]) -> dict[str, float]:
    """Runs an evaluation step over batches and divides the sums once."""
    total: Any = None
    for batch, _ in batches:
        sums = step(batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return {name: float(value) / float(count) for name, (value, count) in jax.device_get(total).items()}
