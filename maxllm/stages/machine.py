"""Machine: show what a recipe's machine is called by those who rent it out, and how many hosts it has.

maxllm machine pretrain/llama2-7b_synthetic_v5p-16
maxllm machine pretrain/llama3-8b_synthetic_h100x8 --hardware h100x16 --json
"""

from __future__ import annotations

from typing import Any

from maxllm.config.root import Config
from maxllm.errors import UserError
from maxllm.plan.clouds import Machine
from maxllm.plan.hardware import hardware_of


def machine_of(config: Config) -> Machine:
    """The machine that a recipe names.

    Raises:
      UserError: it names none, or one that is not known.
    """
    if config.run.hardware is None:
        raise UserError("the recipe names no machine: give --hardware, or run.hardware in the recipe")
    return Machine(hardware_of(config.run.hardware))


def as_lines(facts: dict[str, Any]) -> str:
    """Facts as lines NAME=value, which a shell reads; what a machine has not is empty."""
    return "".join(f"{name}={'' if value is None else value}\n" for name, value in facts.items())
