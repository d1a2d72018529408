"""The recipe in the folder of a converted model, which nobody trained here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maxllm.config.rules import Rules

if TYPE_CHECKING:
    from maxllm.config.root import Config


def check(recipe: Config) -> None:
    """The model's shape.

    Raises:
      ValueError: it is missing.
    """
    if recipe.model is None:
        raise ValueError("a converted model's folder needs the section model")


RULES = Rules(check=check)
