"""What a process of a run is doing at the moment, and how long each kind of work has taken.

A supervisor (supervise/) reads the moment in memory that it shares with the process, which costs a step two
writes of 24 bytes. A run's ledger of seconds (`Phases.seconds`) is what goodput is reckoned from.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

LAYOUT = struct.Struct("=qqd")
"""Phase, step, and the moment of the monotonic clock since which both are so."""


class Phase(IntEnum):
    """What a process may be doing."""

    PREPARING = 0
    """Reading the recipe, data and tokenizer, and making the first state."""
    COMPILING = 1
    RESTORING = 2
    EVALUATING = 3
    SAVING = 4
    """Handing a checkpoint over, and waiting for the one before."""
    LOADING = 5
    """Building the batch of the next step."""
    COMPUTING = 6
    """Calling a step, and waiting for the devices."""
    ENDING = 7
    """The last save is under way, or the others are waited for."""
    BEREAVED = 8
    """Another process of the run is gone, and this one ends for it."""

    @property
    def doing(self) -> str:
        """The phase for people, after "is"."""
        return DOING[self]


DOING = {
    Phase.PREPARING: "preparing",
    Phase.COMPILING: "compiling",
    Phase.RESTORING: "restoring a checkpoint",
    Phase.EVALUATING: "evaluating",
    Phase.SAVING: "saving a checkpoint",
    Phase.LOADING: "building a batch",
    Phase.COMPUTING: "computing, or waiting for the others to",
    Phase.ENDING: "ending",
    Phase.BEREAVED: "ending, for another process is gone",
}


@dataclass(frozen=True)
class Moment:
    """What a process was doing when it was looked at."""

    phase: Phase
    step: int
    """The step under way; 0 before the first."""
    seconds: float
    """For how long nothing has changed."""


class Phases:
    """The phases of this process, of which it is in one at a time."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        """Begins in PREPARING.

        Args:
          memory: from `shared_memory`, where a supervisor reads; None where there is none.
        """
        self._memory = memory
        self.phase, self.step = Phase.PREPARING, 0
        self.since = time.monotonic()
        self._seconds = dict.fromkeys(Phase, 0.0)
        self._publish()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Ends the phase under way and begins another; the step stays what it was where none is given."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now
        self.step = self.step if step is None else step
        self._publish()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """A phase within another, which goes on after it."""
        outer = self.phase
        self.enter(phase)
        yield
        self.enter(outer)  # not after an error: a supervisor should see where it happened

    def seconds(self) -> dict[Phase, float]:
        """Seconds of each phase so far."""
        return self._seconds | {self.phase: self._seconds[self.phase] + time.monotonic() - self.since}

    def share(self, memory: mmap.mmap) -> None:
        """Lets a supervisor read from now on."""
        self._memory = memory
        self.enter(self.phase)

    def restart(self) -> None:
        """Begins the ledger anew: what follows is another run's."""
        self.enter(Phase.PREPARING, 0)
        self._seconds = dict.fromkeys(Phase, 0.0)

    @property
    def supervised(self) -> bool:
        """Whether a supervisor reads."""
        return self._memory is not None

    def _publish(self) -> None:
        if self._memory is not None:
            LAYOUT.pack_into(self._memory, 0, self.phase, self.step, self.since)


def shared_memory() -> mmap.mmap:
    """Memory that a process shares with those that it forks; in it, a process that begins now."""
    memory = mmap.mmap(-1, LAYOUT.size)
    LAYOUT.pack_into(memory, 0, Phase.PREPARING, 0, time.monotonic())
    return memory


def moment_in(memory: mmap.mmap) -> Moment:
    """What the process that publishes in this memory is doing."""
    phase, step, since = LAYOUT.unpack_from(memory, 0)
    return Moment(Phase(phase), step, time.monotonic() - since)


PHASES = Phases()
"""Those of this process."""
