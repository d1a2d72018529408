"""Finding a stage by its name; nothing is imported before it is asked for."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maxllm.stages.stage import Stage


def stage_of(name: str) -> Stage:
    """The stage that a recipe names."""
    stage: Stage = importlib.import_module(f"{__package__}.{name}").STAGE
    return stage


def described(name: str) -> str:
    """What a module of this folder does: the first line of its docstring behind its name.

    It is read without importing the module, which would take JAX's seconds: `--help` needs nothing else.
    """
    spec = importlib.util.find_spec(f"{__package__}.{name}")
    assert spec is not None and spec.origin is not None, f"there is a module {name}"
    with open(spec.origin, encoding="utf-8") as file:
        words = ast.get_docstring(ast.parse(file.read())) or ""
    return words.partition("\n")[0].partition(": ")[2].removesuffix(".")
