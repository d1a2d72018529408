"""The held-out rows in a run's folder: what `evaluate` reads, so that it needs no training data."""

from __future__ import annotations

from pathlib import Path

from maxllm.config.root import Config
from maxllm.data.store import is_record
from maxllm.run.session import run_config

HELDOUT = "heldout"
"""The folder in which a run keeps its held-out rows."""


def kept_heldout(config: Config) -> Path | None:
    """Where the held-out rows of a recipe are kept, or None where they must be read from its data.

    Args:
      config: the recipe of a run that has begun, of which some settings may be other ones now.
    """
    folder, former = Path(config.run.dir) / HELDOUT, run_config(Path(config.run.dir))
    # Of what `evaluate` may set, the data and the room that replies take decide about the rows.
    same = config.data == former.data and config.generation.max_new_tokens == former.generation.max_new_tokens
    return folder if same and is_record(folder) else None
