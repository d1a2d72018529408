"""The ways a command ends badly. `cli.py` turns each into one sentence on stderr and an exit code."""

import os
from collections.abc import Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input: one sentence that names the file, line or field and says what to do. Exit code 2."""


class RunFailed(Exception):
    """A run that could not go on (a loss that stays non-finite, a failed verification). Exit code 1."""


class Interrupted(Exception):
    """A run that the same command continues: it was asked to stop and has saved its state, or another of its
    processes is gone. Exit code 75."""


class DoesNotFit(Exception):
    """A plan for a machine whose memory is too small. Exit code 3."""


def listed(names: Iterable[str], limit: int = 6, between: str = ", ") -> str:
    """Names as a sentence can hold them: the first ones, and how many more there are."""
    names = list(names)
    if len(names) <= limit:
        return between.join(names)
    return f"{between.join(names[:limit])} and {len(names) - limit:,} more"


def leave(code: int, sentence: str) -> NoReturn:
    """Ends the process from a signal handler, now.

    An exception instead would be lost when the signal falls into a callback of a library, and shutting the
    interpreter down while compiled programs run can crash. What is on disk is whole or absent at any moment.
    """
    os.write(2, f"maxllm: {sentence}\n".encode())
    os._exit(code)
