"""What the supervisors of a job tell each other, over the connections on which they met.

Each of the others sends process 0 a report every second; process 0 judges all of them, and answers each with
a line every second: that it is there, or the verdict.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

from maxllm.parallel.rendezvous import Guest, Meeting, line_of
from maxllm.phases import Phase
from maxllm.supervise.verdict import DONE, SHARE, SILENCE_SECONDS, Report, Verdict, judge

TELL_SECONDS = 1.0
"""A supervisor speaks as often, whatever happens."""


class Line:
    """A connection to another supervisor, read and written without waiting."""

    def __init__(self, guest: Guest) -> None:
        self.host, self._connection = guest.host, guest.connection
        self._connection.setblocking(False)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read = b""
        self.heard, self.closed = time.monotonic(), False

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def messages(self) -> list[dict[str, Any]]:
        """What has come since the last call."""
        while not self.closed:
            try:
                part = self._connection.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                part = b""
            self.closed = not part
            self._read += part
        *lines, self._read = self._read.split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        if found:
            self.heard = time.monotonic()
        return [message for message in found if isinstance(message, dict)]

    def send(self, message: dict[str, Any]) -> None:
        """Sends a line; one who does not read it is found out by what it does not say."""
        with contextlib.suppress(OSError):
            self._connection.sendall(line_of(message))

    def close(self) -> None:
        """Ends the connection; what was sent still arrives."""
        self._connection.close()


class Peers(Protocol):
    """The other supervisors of a job."""

    def exchange(self, own: Report) -> Verdict | None:
        """Tells of this supervisor's process, hears of the others'; the verdict, once there is one."""

    def wait(self, seconds: float) -> None:
        """Returns when something has come, or the time is over."""

    def close(self) -> None:
        """Ends the connections; what was said still arrives."""


class Alone:
    """No others: the supervisor judges its own process."""

    def __init__(self, hang_seconds: float) -> None:
        self._hang_seconds = hang_seconds

    def exchange(self, own: Report) -> Verdict | None:
        return None if own.ended is not None else judge({0: own}, {0: 0.0}, self._hang_seconds)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        pass


class Judge:
    """Process 0's: it hears all, judges, and tells all."""

    def __init__(self, meeting: Meeting, hang_seconds: float) -> None:
        self._lines = {index: Line(guest) for index, guest in sorted(meeting.guests.items())}
        self._hang_seconds = hang_seconds
        self._reports = {
            index: Report(line.host, Phase.PREPARING, 0, 0.0) for index, line in self._lines.items()
        }
        self._told = 0.0
        self._verdict: Verdict | None = None

    def exchange(self, own: Report) -> Verdict | None:
        if self._verdict is not None:
            return self._verdict
        self._take(0, own)  # first: what others suffer may come from its end
        for index, line in self._lines.items():
            for message in line.messages():
                if (report := Report.from_message(message)) is not None:
                    self._take(index, report)
        now = time.monotonic()
        unheard = {
            index: math.inf if index and self._lines[index].closed else now - self._heard(index, now)
            for index in self._reports
        }
        self._verdict = judge(self._reports, unheard, self._hang_seconds)
        over = own.ended in DONE
        if self._verdict is not None or over or now - self._told >= TELL_SECONDS:
            self._told = now
            told: dict[str, Any] = {"done": over}
            if self._verdict is not None:
                told |= asdict(self._verdict)
            for line in self._lines.values():
                line.send(told)
        return self._verdict

    def _take(self, index: int, report: Report) -> None:
        """Keeps the newest report of a process; who failed first stands first."""
        former = self._reports.get(index)
        if report.failed and (former is None or not former.failed):
            self._reports.pop(index, None)
            failed = {i: r for i, r in self._reports.items() if r.failed}
            self._reports = failed | {index: report} | self._reports
        elif former is None or former.ended is None:
            self._reports[index] = report

    def _heard(self, index: int, now: float) -> float:
        return self._lines[index].heard if index else now

    def wait(self, seconds: float) -> None:
        wait_for(self._lines.values(), seconds)

    def close(self) -> None:
        for line in self._lines.values():
            line.close()


class Judged:
    """That of another process: it tells process 0, and hears the verdict."""

    def __init__(self, meeting: Meeting, hang_seconds: float) -> None:
        self._line = Line(meeting.guests[0])
        self._silence = min(SHARE * hang_seconds, SILENCE_SECONDS)
        self._told: tuple[float, int | None] = (0.0, None)
        self._over = False
        self._verdict: Verdict | None = None

    def exchange(self, own: Report) -> Verdict | None:
        if self._verdict is not None or self._over:
            return self._verdict
        now = time.monotonic()
        if now - self._told[0] >= TELL_SECONDS or own.ended != self._told[1]:
            self._told = now, own.ended
            self._line.send(own.as_message())
        for message in self._line.messages():
            self._over = self._over or message.get("done") is True
            culprits, sentence = message.get("culprits"), message.get("sentence")
            if isinstance(sentence, str) and isinstance(culprits, list):
                self._verdict = Verdict(tuple(map(int, culprits)), sentence, bool(message.get("stuck")))
        if self._verdict is None and not self._over:
            self._verdict = self._without_judge(now)
        return self._verdict

    def _without_judge(self, now: float) -> Verdict | None:
        """What is to be thought of process 0 by what is heard of it."""
        who, silent = f"process 0 on {self._line.host}", now - self._line.heard
        if self._line.closed:
            return Verdict((0,), f"{who} is gone with its supervisor")
        if silent > self._silence:
            cut = "its network is cut, or the host stands"
            return Verdict((0,), f"{who} has not been heard of for {silent:.0f} s: {cut}")
        return None

    def wait(self, seconds: float) -> None:
        wait_for([] if self._over else [self._line], seconds)

    def close(self) -> None:
        self._line.close()


def wait_for(lines: Iterable[Line], seconds: float) -> None:
    """Returns when a line has something to read, or the time is over."""
    open_lines = [line for line in lines if not line.closed]
    if open_lines:
        select.select(open_lines, [], [], seconds)
    else:
        time.sleep(seconds)
