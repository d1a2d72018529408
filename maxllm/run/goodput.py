"""Goodput: which share of a run's time made steps that stayed, and where the rest went.

A sitting is one process's part of a run, from its start until it ends or is killed. Its account goes into
sittings.jsonl, which grows by a line now and then and, unlike metrics.jsonl, is never cut back: steps that a
kill took, and that were done again, are time that was spent. The newest line of a sitting counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from maxllm.folder import RunFolder
from maxllm.phases import PHASES, Phase
from maxllm.run.observers import Observer, Record

FIRST_SECONDS, GROWTH = 30.0, 0.01
"""Accounts of a sitting are as far apart, or this share of its time if that is more: a week has 1,000."""

LABELS = {
    Phase.PREPARING: "preparing",
    Phase.COMPILING: "compiling",
    Phase.RESTORING: "restoring",
    Phase.EVALUATING: "evaluating",
    Phase.SAVING: "saving",
    Phase.LOADING: "waiting for data",
    Phase.ENDING: "ending",
    Phase.BEREAVED: "ending",
}
"""What each phase but computing is called in an account."""

PRODUCTIVE, REPEATED, DOWN = "productive steps", "repeated steps", "down"


class Accounts(Observer):
    """Writes down what this sitting has done so far."""

    def __init__(self, folder: RunFolder, first: int) -> None:
        """Begins the account of a sitting that continues after step `first`."""
        self._folder, self._first, self._step = folder, first, first
        spent = sum(PHASES.seconds().values())
        self._began = time.time() - spent
        self._name = f"{self._began:.3f}-{os.getpid()}"
        self._next = spent + FIRST_SECONDS
        self.write()

    def advance(self, step: int) -> None:
        self._step = step
        if sum(PHASES.seconds().values()) >= self._next:
            self.write()

    def heldout(self, record: Record) -> None:
        if sum(PHASES.seconds().values()) >= self._next:
            self.write()

    def close(self) -> None:
        self.write()

    def write(self) -> None:
        """Adds a line."""
        seconds = {phase.name: round(value, 3) for phase, value in PHASES.seconds().items()}
        spent = sum(seconds.values())
        self._next = spent + max(FIRST_SECONDS, GROWTH * spent)
        account = {"sitting": self._name, "began": self._began, "first": self._first, "step": self._step}
        self._folder.append_sitting(account | {"seconds": seconds})


def reckon(accounts: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Where the time of a run went.

    A sitting's steps are repeated as far as the next one begins before them; each is taken to have been as
    long as any other of its sitting. What passes between two sittings is down time, and so is what a killed
    one did after its last account.

    Args:
      accounts: the lines of sittings.jsonl.

    Returns:
      {"goodput": the share of productive steps, "sittings": how many, "seconds": {what: seconds}}; None
      without accounts.
    """
    newest = {account["sitting"]: account for account in accounts}
    sittings = sorted(newest.values(), key=lambda account: account["began"])
    if not sittings:
        return None
    seconds = dict.fromkeys((PRODUCTIVE, REPEATED, *LABELS.values(), DOWN), 0.0)
    for sitting, after in zip(sittings, [*sittings[1:], None], strict=True):
        spent = sitting["seconds"]
        for phase, label in LABELS.items():
            seconds[label] += spent.get(phase.name, 0.0)
        computing, done = spent.get(Phase.COMPUTING.name, 0.0), sitting["step"] - sitting["first"]
        repeated = 0 if after is None else max(0, min(done, sitting["step"] - after["first"]))
        lost = computing * repeated / done if done else 0.0
        seconds[REPEATED] += lost
        seconds[PRODUCTIVE] += computing - lost
        if after is not None:
            seconds[DOWN] += max(0.0, after["began"] - sitting["began"] - sum(spent.values()))
    whole = sum(seconds.values())
    return {
        "goodput": seconds[PRODUCTIVE] / whole if whole else 0.0,
        "sittings": len(sittings),
        "seconds": {what: round(value, 3) for what, value in seconds.items()},
    }
