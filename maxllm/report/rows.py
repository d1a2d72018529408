"""Rows of data on the console: what is in the loss stands out, by colour and between marks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from maxllm.data.shown import ShownRow

OPEN, CLOSE = "⟦", "⟧"
"""Around tokens that are in the loss, for whoever sees no colours."""


def print_rows(rows: Sequence[ShownRow]) -> None:
    """Prints rows, document by document."""
    console = Console(highlight=False)
    console.print(f"Between {OPEN} and {CLOSE}, in green: tokens that the model is trained to say.")
    for number, row in enumerate(rows, start=1):
        in_loss = sum(weight > 0 for weight in row.weights)
        console.print(Rule(f"row {number}: {len(row.tokens):,} tokens, {in_loss:,} in the loss"))
        for segment, places in groupby(range(len(row.tokens)), key=row.segments.__getitem__):
            console.print(document(row, list(places), segment))


def document(row: ShownRow, places: Sequence[int], segment: int) -> Text:
    """One document of a row."""
    shown = Text(f"{segment}. ", style="bold", end="\n\n")
    for weight, same in groupby(places, key=row.weights.__getitem__):
        text = "".join(row.text[place] for place in same)
        share = "" if weight in (0, 1) else f"{weight:g}×"
        shown.append(f"{share}{OPEN}{text}{CLOSE}" if weight else text, "green" if weight else "not bold dim")
    return shown
