"""Pretraining, which has no section of its own: what its recipes must say."""

from __future__ import annotations

from maxllm.config.rules import Recipe, Rules


def check(recipe: Recipe) -> None:
    """A corpus, and a model: a new one, or one that is there.

    Raises:
      ValueError: naming what is missing or of another stage.
    """
    if recipe.start.policy is None and (recipe.model is None or recipe.tokenizer is None):
        raise ValueError("a pretrain recipe needs the sections model and tokenizer, or start.policy")
    if recipe.data.prepared_dir is None:
        raise ValueError("a pretrain recipe needs data.prepared_dir")
    if recipe.data.fold is not None:
        raise ValueError("data.fold is for stages after pretrain, whose rows are read by each run")
    if recipe.loss.mean != "tokens" or recipe.loss.thoughts != 1:
        raise ValueError(
            "loss.mean=samples and loss.thoughts are of sft: pretraining counts all tokens alike"
        )
    if recipe.data.template is not None:
        raise ValueError(
            "data.template lays out conversations, which pretraining does not read: give it to sft"
        )


RULES = Rules(check=check, next_token=True)
