"""The stages that there are. The command line reads this before anything heavier is imported."""

from __future__ import annotations

from typing import Literal, get_args

Stage = Literal["pretrain", "convert", "sft", "reward", "dpo", "ppo"]

TRAINED: tuple[Stage, ...] = tuple(stage for stage in get_args(Stage) if stage != "convert")
"""The stages that train: each has a module of its name in stages/, and is a verb of the command line."""
