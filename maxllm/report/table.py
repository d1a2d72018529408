"""Figures as a table on the console."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(figures: dict[str, Any], title: str) -> None:
    """Prints nested figures, one in a line."""
    table = Table("figure", "value", title=title, show_header=False)
    for column in table.columns:
        column.overflow = "fold"
    for name, value in flat(figures):
        table.add_row(Text(name), Text(value))  # as it is: `tasks:train:40` is no emoji
    Console().print(table)


def flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, formatted value) of nested figures."""
    for name, value in figures.items():
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, f"{value:,.4g}" if isinstance(value, float) else str(value)
