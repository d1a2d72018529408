"""Pretraining, which has no section of its own: what its recipes must say."""

from __future__ import annotations

from maxllm.config.rules import Recipe, Rules


def check(recipe: Recipe) -> None:
    """A corpus, and a model: a new one, or one that is there.

    Raises:
      ValueError: naming the section that is missing, or what pretraining does not read.
    """
    if recipe.start.policy is None and (recipe.model is None or recipe.tokenizer is None):
        raise ValueError("a pretrain recipe needs the sections model and tokenizer, or start.policy")
    if recipe.data.prepared_dir is None:
        raise ValueError("a pretrain recipe needs data.prepared_dir")
    if recipe.data.template is not None:
        raise ValueError(
            "data.template lays out conversations, which pretraining does not read: give it to sft"
        )


RULES = Rules(check=check, next_token=True)
