"""The held-out rows in a run's folder: what `evaluate` reads, so that it needs no training data."""

from __future__ import annotations

from pathlib import Path

from maxllm import recipe
from maxllm.config.root import Config
from maxllm.data.store import is_record
from maxllm.folder import RunFolder


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
