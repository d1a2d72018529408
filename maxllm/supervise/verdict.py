"""The rule by which the processes of a run are judged: who of them is lost, or holds the others up."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from maxllm.errors import listed
from maxllm.phases import Phase

SHARE = 0.8
"""Of the seconds within which a hang must have ended, those that pass before it is called one."""

LONG = 12
"""So many times as long may take what is done seldom: compiling, saving, reading data, evaluating."""

SILENCE_SECONDS = 60.0
"""The longest that a supervisor is not heard of; they speak every second."""

SHORT_PHASES = (Phase.LOADING, Phase.COMPUTING, Phase.ENDING, Phase.BEREAVED)

DONE = (0, 75)
"""Exit codes that others need not end for: the run is complete, or all have saved and stopped."""


@dataclass(frozen=True)
class Report:
    """What a supervisor says of its process."""

    host: str
    phase: int
    step: int
    seconds: float
    """For how long phase and step have not changed."""
    stopped: bool = False
    """Whether the process is stopped (SIGSTOP)."""
    ended: int | None = None
    """Its exit code, negative for a signal; None while it runs."""

    def as_message(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Report | None:
        """The report in plain data; None where it is none."""
        try:
            report = cls(**message)
            Phase(report.phase)
        except (TypeError, ValueError):
            return None
        return report

    @property
    def failed(self) -> bool:
        """Whether it has ended in a way that is its own, and not for another's sake."""
        return self.ended is not None and self.ended not in DONE and self.phase != Phase.BEREAVED


@dataclass(frozen=True)
class Verdict:
    """The run cannot go on."""

    culprits: tuple[int, ...]
    """Indexes of the processes for which it ends."""
    sentence: str
    """What happened, for people."""
    stuck: bool = False
    """Whether the culprits run, and may be able to tell where they are."""


def judge(reports: Mapping[int, Report], unheard: Mapping[int, float], hang_seconds: float) -> Verdict | None:
    """Whether the run must end.

    A process is lost if it has failed, or if its supervisor is silent; a run hangs if nothing has changed in
    any of its processes for longer than what each is doing may take.

    Args:
      reports: the last report of each process, by its index, those that failed first in order.
      unheard: seconds since these reports came; infinite for a connection that has ended.
      hang_seconds: within so many seconds a hang must have ended.
    """
    limit = SHARE * hang_seconds
    for index, report in reports.items():
        if report.failed:
            return Verdict((index,), f"{place(index, report)} {end_of(report)}")
    for index, report in reports.items():
        if report.ended is None and unheard[index] == float("inf"):
            return Verdict(
                (index,), f"{place(index, report)} is gone with its supervisor, last {when(report)}"
            )
        if report.ended is None and unheard[index] > min(limit, SILENCE_SECONDS):
            silent = f"has not been heard of for {unheard[index]:.0f} s {when(report)}"
            return Verdict(
                (index,), f"{place(index, report)} {silent}: its network is cut, or the host stands"
            )
        if report.stopped and report.seconds > limit:
            stopped = f"has been stopped (SIGSTOP) for {report.seconds:.0f} s {when(report)}"
            return Verdict((index,), f"{place(index, report)} {stopped}", stuck=True)
    running = {index: reports[index] for index in sorted(reports) if reports[index].ended is None}
    # Process 0's report is of this moment; where that has ended, the others' may be of the second before.
    if 0 in running and all(report.seconds > longest(report, limit) for report in running.values()):
        return hang(running)
    return None


def longest(report: Report, limit: float) -> float:
    """For how many seconds what a process is doing may take."""
    return limit if report.phase in SHORT_PHASES else LONG * limit


def hang(reports: Mapping[int, Report]) -> Verdict:
    """Who holds the others up: whoever waits for no device; where all do, whoever is behind."""
    busy = [index for index, report in reports.items() if report.phase != Phase.COMPUTING]
    least = min(report.step for report in reports.values())
    culprits = busy or [index for index, report in reports.items() if report.step == least]
    first = reports[culprits[0]]
    seconds = min(report.seconds for report in reports.values())
    who = place(culprits[0], first)
    if len(culprits) > 1:
        hosts = listed(f"{index} ({reports[index].host})" for index in culprits)
        who = f"none of the processes {hosts}"
    verb = "comes on" if len(culprits) > 1 else "does not come on"
    return Verdict(
        tuple(culprits),
        f"{who} {verb}: nothing has changed for {seconds:.0f} s {when(first)} (run.hang_seconds)",
        stuck=True,
    )


def place(index: int, report: Report) -> str:
    """A process for people."""
    return f"process {index} on {report.host}"


def when(report: Report) -> str:
    """At which step and doing what."""
    step = f"in step {report.step}" if report.step else "before the first step"
    return f"{step}, {Phase(report.phase).doing}"


def end_of(report: Report) -> str:
    """How a process ended, after its name."""
    assert report.ended is not None, "only who has ended is asked for"
    if report.ended >= 0:
        return f"has failed with exit code {report.ended} {when(report)}"
    name = signal.Signals(-report.ended).name
    memory = " (out of memory, perhaps: see the system's log)" if name == "SIGKILL" else ""
    return f"was killed by {name}{memory} {when(report)}"
