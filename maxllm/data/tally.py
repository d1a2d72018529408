"""What became of a source's rows: how many there were, and why some are not used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from maxllm.errors import UserError


@dataclass
class Tally:
    """What became of a source's rows. Readers count rows and bad ones, later stages drop more of them."""

    source: str
    """The name as the user gave it."""
    rows: int = 0
    """Rows met, bad ones included, blank lines not."""
    bad: int = 0
    """Rows that could not be read: those dropped with a place."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many rows went, by reason; bad rows are among them."""
    unread: Counter[str] = field(default_factory=Counter)
    """How many rows had a field that nobody read, by name."""
    first_bad: str | None = None
    """The first bad row: its file, line and what is wrong, a sentence without its full stop."""

    @property
    def kept(self) -> int:
        """Rows not dropped, by anyone, so far."""
        return self.rows - self.dropped.total()

    def drop(self, reason: str, where: str | None = None) -> None:
        """Count one row as dropped; `where` (file, line, what is wrong) marks it as bad, not just unfit."""
        self.dropped[reason] += 1
        if where is not None:
            self.bad += 1
            self.first_bad = self.first_bad or where

    def report(self) -> dict[str, Any]:
        """The counts as plain data."""
        counts = {"source": self.source, "rows": self.rows, "kept": self.kept, "dropped": dict(self.dropped)}
        return counts | ({"unread": dict(self.unread)} if self.unread else {})

    def line(self) -> str:
        """The counts as a line for the console."""
        reasons = "".join(f"; {count:,} dropped: {reason}" for reason, count in self.dropped.most_common())
        fields = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.unread.items()))
        unread = f"; fields that are not read, with the number of rows: {fields}" if fields else ""
        return f"{self.source}: {self.rows:,} rows, {self.kept:,} kept{reasons}{unread}"

    def check(self, max_bad_share: float) -> None:
        """Raise UserError when the source is empty, more than `max_bad_share` (0..1) bad, or none kept."""
        if self.rows == 0:
            raise UserError(f"{self.source} is empty")
        if self.bad > max_bad_share * self.rows:
            raise UserError(
                f"{self.first_bad}; {self.bad} of {self.rows} rows are bad, "
                f"more than data.max_bad_share={max_bad_share:g} allows"
            )
        if self.kept == 0:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common())
            raise UserError(f"{self.source}: none of {self.rows} rows was kept ({reasons})")
