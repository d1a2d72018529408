"""The before/after table: each figure beside what it is measured against, and what may be said of the two.

A figure is called better only where the numbers hold it: shares of held-out items have to differ by more than
chance gives (two standard errors; not judged while the number of items is unknown), and anything else by more
than the digits that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from maxllm.report.runs import Run, number
from maxllm.report.wording import count, percent

NOT_YET = "not there yet"

Facts = dict[str, Any]
"""The keys of a quickstart's summary.json, as far as they are known."""


@dataclass(frozen=True)
class Verdict:
    """What may be said of a figure."""

    kind: Literal["better", "worse", "same", "none"]
    text: str


NO_VERDICT = Verdict("none", "")
SIGNS = {"better": "✓", "worse": "✗", "same": "≈", "none": ""}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    before: tuple[str, ...]
    after: str
    items: str
    meaning: str
    verdict: Verdict
    so_far: str = ""
    """Where an unfinished run stands."""

    @property
    def sign(self) -> str:
        """The verdict without colour."""
        return SIGNS[self.verdict.kind]


def both(run: Run, names: dict[str, str]) -> Facts:
    """Held-out figures before and after a run, under other names."""
    before = {f"{other}_before": run.before(name) for name, other in names.items()}
    return before | {f"{other}_after": run.after(name) for name, other in names.items()}


def pairs_row(name: str, meaning: str, facts: Facts, key: str, items: Facts) -> Row:
    """Pair accuracy against a coin."""
    after, behind = number(facts.get(key)), number(items.get(key))
    verdict = NO_VERDICT
    if after is not None and behind:
        chance = behind if abs(after - 0.5) <= 2 * 0.5 / math.sqrt(behind) else None
        verdict = compared(0.5, after, percent, chance_of=chance, against="than a coin")
    return Row(
        name,
        (f"coin {percent(0.5)}",),
        shown(after, percent),
        "" if behind is None else count(behind, "pair"),
        meaning,
        verdict,
    )


def share_row(name: str, meaning: str, facts: Facts, key: str, items: Any) -> Row:
    """A share of held-out questions before and after."""
    before, after = number(facts.get(f"{key}_before")), number(facts.get(f"{key}_after"))
    questions = number(items)
    verdict = NO_VERDICT
    if before is not None and after is not None and questions:
        chance = questions if may_be_chance(before, after, questions) else None
        verdict = compared(before, after, percent, chance_of=chance)
    return Row(
        name,
        (shown(before, percent),),
        shown(after, percent),
        "" if questions is None else count(questions, "question"),
        meaning,
        verdict,
    )


def may_be_chance(before: float, after: float, items: float) -> bool:
    """Whether two shares of `items` differ by no more than two standard errors (Agresti & Caffo 2000).

    As if different questions stood behind them; they are the same, which makes the true error smaller.
    """
    p, q = ((share * items + 1) / (items + 2) for share in (before, after))
    return abs(p - q) <= 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / (items + 2))


def compared(
    before: float,
    after: float,
    show: Callable[[float], str],
    *,
    lower_is_better: bool = False,
    chance_of: float | None = None,
    words: tuple[str, str] = ("better", "worse"),
    against: str = "",
) -> Verdict:
    """What may be said of a figure after beside one before.

    Args:
      before: the figure before, or the baseline.
      after: the figure after.
      show: how the table prints it; figures that print the same are not called different.
      lower_is_better: which way is good.
      chance_of: the number of held-out items, where with so few the difference may be chance.
      words: what an improvement and its opposite are called.
      against: what it is compared with, where that is no "before".
    """
    if show(before) == show(after):
        return Verdict("same", "no change" if not against else f"no better {against}")
    if chance_of is not None:
        return Verdict("same", f"within what chance gives with {chance_of:,.0f}")
    improved = (after < before) == lower_is_better
    return Verdict("better" if improved else "worse", f"{words[not improved]} {against}".strip())


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """A figure, or that it is not there yet."""
    return NOT_YET if value is None else show(value)
