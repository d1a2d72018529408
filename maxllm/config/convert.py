"""The recipe in the folder of a converted model, which nobody trained here."""

from __future__ import annotations

from maxllm.config.rules import Recipe, Rules


def check(recipe: Recipe) -> None:
    """The model's shape.

    Raises:
      ValueError: it is missing.
    """
    if recipe.model is None:
        raise ValueError("a converted model's folder needs the section model")


RULES = Rules(check=check)
