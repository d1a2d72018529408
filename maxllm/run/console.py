"""Where a run speaks: stderr; stdout is for results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def console(main: bool = True) -> Console:
    """stderr, on which only the main process is heard."""
    return Console(stderr=True, quiet=not main, highlight=False, emoji=False)


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar on a terminal and nothing elsewhere."""
    terminal = console()
    return track(items, description, console=terminal, transient=True, disable=not terminal.is_terminal)
