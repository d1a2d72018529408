"""What words of the command line mean: folders, checkpoints, numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from maxllm.errors import UserError
from maxllm.folder import RunFolder
from maxllm.storage import is_remote


def run_folder(word: str) -> RunFolder:
    """A run folder, here or in a bucket, from a word of the command line.

    Raises:
      ArgumentTypeError: the client of that bucket is not installed.
    """
    try:
        return RunFolder(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def named_run(word: str) -> tuple[str, RunFolder]:
    """A run folder and the name that it goes by.

    Raises:
      ArgumentTypeError: one of them is missing.
    """
    name, _, folder = word.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{word} is not NAME=RUN")
    return name, run_folder(folder)


def local_path(word: str) -> Path:
    """A path of this machine, from a word of the command line.

    Raises:
      ArgumentTypeError: it lies in a bucket.
    """
    if is_remote(word):
        raise argparse.ArgumentTypeError(f"{word} is not a local path; give a local folder, and copy it")
    return Path(word)


def checkpoint(word: str) -> str | int:
    """Which checkpoint a word means.

    Raises:
      ArgumentTypeError: it means none.
    """
    if word in ("best", "latest"):
        return word
    if word.isdecimal():
        return int(word)
    raise argparse.ArgumentTypeError(f"{word} is none of best, latest and the number of a step")


def times(word: str) -> int:
    """How often a word says that something may be done.

    Raises:
      ArgumentTypeError: it is no whole number of 0 or more.
    """
    if word.isdecimal():
        return int(word)
    raise argparse.ArgumentTypeError(f"{word} is not a whole number of 0 or more")


def positive(word: str) -> int:
    """A number of things that are wanted.

    Raises:
      ArgumentTypeError: it is no whole number of 1 or more.
    """
    if times(word) == 0:
        raise argparse.ArgumentTypeError("0 is not a whole number of 1 or more")
    return int(word)


def share(word: str) -> float:
    """A share of something that is not nothing.

    Raises:
      ArgumentTypeError: it is no number above 0 and up to 1.
    """
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if 0 < value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"{word} is not a number above 0 and up to 1")
