"""Functions of a user's own, named FILE.py:FUNCTION: scorers of replies, checkers of rows."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from maxllm.errors import UserError


@dataclass(frozen=True)
class UserFunction:
    """A function in a file of Python."""

    name: str
    """As the user gave it."""
    file: Path
    function: Callable[..., Any]

    def __call__(self, *arguments: Any, about: str) -> Any:
        """What the function returns.

        Args:
          *arguments: the function's.
          about: what is being judged, for the message.

        Raises:
          UserError: it fails.
        """
        try:
            return self.function(*arguments)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(self.file)]
            line = f" line {lines[-1]}" if lines else ""
            raise UserError(
                f"{self.file}{line} failed at {about}: {type(error).__name__}: {error}"
            ) from error


def load_function(name: str, given: str) -> UserFunction:
    """The function that a user names.

    Args:
      name: FILE.py:FUNCTION.
      given: the words that name it, for the message.

    Raises:
      UserError: it is not there, or its file cannot be loaded.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function.isidentifier():
        raise UserError(f"{given} is not FILE.py:FUNCTION")
    if not path.is_file():
        raise UserError(f"{given}: {path} does not exist")
    # Compiled here, for importing would leave a __pycache__ beside the user's file.
    module = ModuleType(f"maxllm user code {path}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{given}: {path} cannot be loaded: {reason}") from error
    found = module.__dict__.get(function)
    if not callable(found):
        raise UserError(f"{given}: {path} has no function {function}")
    return UserFunction(name, path, found)
