"""Data show: rows of any stage as they are trained on, before anything is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from maxllm.config.root import Config
from maxllm.data.shown import ShownRow
from maxllm.errors import UserError
from maxllm.run.session import open_session
from maxllm.stages.registry import stage_of


def rows(config: Config, count: int) -> list[ShownRow]:
    """The first rows that a recipe trains on, as they stand before they are shuffled.

    Raises:
      UserError: what it starts from or reads is missing or unfit.
    """
    shown = stage_of(config.stage).shown
    if shown is None:
        raise UserError(f"the stage {config.stage} trains on no rows")
    return shown(open_session(config), count)


def as_json(shown: list[ShownRow]) -> list[dict[str, Any]]:
    """[{"tokens", "text", "segments", "weights"}]"""
    return [asdict(row) for row in shown]
