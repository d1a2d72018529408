"""A small process beside each one that trains: it sees to it that a hang ends, and begins again what may be.

`supervise` forks before anything heavy is imported. What is forked trains; what forked it waits, passes
signals on, and talks with the supervisors of the run's other processes (supervise/peers.py), where a thread
of the training process itself would be silent when it matters: while that is stopped, or stuck in compiled
code, or aborted by a library that has lost another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from typing import NoReturn

from maxllm.config.root import Config
from maxllm.parallel.discovery import HOSTS, Place, place_of
from maxllm.parallel.rendezvous import meet
from maxllm.phases import PHASES, Moment, Phase, moment_in, shared_memory
from maxllm.supervise.maintenance import Maintenance, maintenance_of
from maxllm.supervise.peers import Alone, Judge, Judged, Peers
from maxllm.supervise.verdict import Report, Verdict

LOOK_SECONDS = 0.2
"""As often the supervisor looks at its process."""

VERDICT_SECONDS = 5.0
"""So long a supervisor whose process has ended badly waits to hear whether another one's ended first."""

DUMP_SECONDS = 1.0
"""So long a stuck process has for writing down where it is."""

FIRST_SECONDS = 0.5
"""So much later than the one that it ends for a process ends: launchers tell which one failed first."""

INTERRUPTED = 75
BAD_INPUT = (2, 3)

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Care:
    """How a process is looked after."""

    hang_seconds: float
    rendezvous_seconds: float
    restarts: int = 0
    """How many times in a row it is begun again, if it ends in a way that asks for it."""
    maintenance: Maintenance | None = None
    """Who knows whether this machine is about to be taken away."""
    patience: float = 600.0
    """A process that ran for so many seconds before it failed has not failed in a row."""


def say(sentence: str) -> None:
    """One sentence on stderr."""
    print(f"maxllm: {sentence}", file=sys.stderr, flush=True)


def supervise_where_needed(config: Config, restarts: int) -> None:
    """`supervise`, where there are several processes, restarts are wanted, or the machine may be taken away;
    one alone goes on as it is.

    Raises:
      UserError: the environment cannot be right.
      UserError, RunFailed: the processes of the run did not meet.
    """
    place = place_of(os.environ)
    maintenance = maintenance_of(config.launch, place.launcher if place else None)
    if (place is not None and place.processes > 1) or restarts or maintenance:
        care = Care(config.run.hang_seconds, config.launch.rendezvous_seconds, restarts, maintenance)
        supervise(place, care)


def supervise(place: Place | None, care: Care) -> None:
    """Returns in a new process, which is to train; the one that called stays to look after it, and ends with
    its exit code, or with 75 where it ended for another's sake.

    Args:
      place: this process's among those of the run; None for one alone.
      care: how it is looked after.

    Raises:
      UserError, RunFailed: the processes of the run did not meet.
    """
    failures = 0
    while True:
        began = time.monotonic()
        hosts, peers = gather(place, care)
        memory = shared_memory()
        child = Child(memory)
        if child.pid == 0:
            peers.close()
            if hosts is not None:
                os.environ[HOSTS] = str(hosts)
            return
        code = Watch(child, peers, place.index if place else 0, care.maintenance).until_end()
        failures = failures + 1 if time.monotonic() - began < care.patience else 1
        retryable = code == INTERRUPTED or code > 128
        if child.asked or not retryable or failures > care.restarts:
            if retryable and care.restarts and not child.asked:
                say(f"ended {failures} times in a row; --restarts {care.restarts} allows no more")
            end(code)
        pause = min(60.0, 2.0**failures) * random.uniform(0.5, 1.0)
        say(f"begins again in {pause:.0f} s ({failures} of {care.restarts} restarts in a row)")
        time.sleep(pause)


def gather(place: Place | None, care: Care) -> tuple[int | None, Peers]:
    """Meets the other supervisors; on how many hosts they are, None for one alone."""
    if place is None or place.processes == 1:
        return None, Alone(care.hang_seconds)
    meeting = meet(place, care.rendezvous_seconds, say)
    say(f"process {place.index} of {place.processes} on {socket.gethostname()} ({place.launcher})")
    kind = Judge if place.index == 0 else Judged
    return meeting.hosts, kind(meeting, care.hang_seconds)


def end(code: int) -> NoReturn:
    """Ends the supervisor."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Child:
    """The process that trains, as its supervisor sees it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self, memory: mmap.mmap) -> None:
        """Forks; `pid` is 0 in the new process."""
        self._memory = memory
        self.asked, self.stopped = False, False
        self.ended: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        self.pid = os.fork()
        if self.pid:
            for number in self.SIGNALS:
                signal.signal(number, self._pass_on)
        else:
            end_with_parent(parent)
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            PHASES.share(memory)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def _pass_on(self, number: int, frame: object) -> None:
        """A signal to the supervisor. As SIGTERM: from a terminal, Ctrl-C has come to the process already."""
        self.ask()

    def ask(self) -> None:
        """Asks the process to stop."""
        self.asked = True
        self.kill(signal.SIGTERM)

    def look(self) -> None:
        """Takes in whether it has stopped, goes on or has ended."""
        while self.ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                self.stopped = os.WIFSTOPPED(status)
            else:
                self.ended = os.waitstatus_to_exitcode(status)

    def moment(self) -> Moment:
        """What it is doing."""
        return moment_in(self._memory)

    def kill(self, number: int) -> None:
        """Sends a signal; one that has ended hears nothing."""
        if self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def let_tell(self, own: bool) -> None:
        """Has it write down where it is, or, where another does so, waits until that one has."""
        if own:
            self.kill(signal.SIGUSR1)
            self.kill(signal.SIGCONT)
        time.sleep(DUMP_SECONDS if own else 1.5 * DUMP_SECONDS)

    def end(self) -> None:
        """Ends it without delay."""
        self.kill(signal.SIGKILL)
        while self.ended is None:
            self.look()
            time.sleep(0.01)


class Watch:
    """Looks after one process until it has ended."""

    def __init__(self, child: Child, peers: Peers, index: int, maintenance: Maintenance | None) -> None:
        self._child, self._peers, self._index = child, peers, index
        self._maintenance = maintenance
        self._host = socket.gethostname()
        self._looked = time.monotonic()
        self._absent = 0.0

    def until_end(self) -> int:
        """The exit code of the process, or 75 where it has ended for another's sake; all are told."""
        verdict, own, deadline = None, self.report(), float("inf")
        while verdict is None:
            own = self.report()
            self.heed_maintenance()
            verdict = self._peers.exchange(own)
            if own.ended is not None and verdict is None:
                if isinstance(self._peers, Alone) or not (own.failed or own.phase == Phase.BEREAVED):
                    break
                deadline = min(deadline, time.monotonic() + VERDICT_SECONDS)
                if time.monotonic() > deadline:
                    break
            self._peers.wait(LOOK_SECONDS)
        self._peers.close()
        return self.ended(own) if verdict is None else self.judged(verdict)

    def heed_maintenance(self) -> None:
        """Asks the process to stop, once, where this machine is about to be taken away."""
        if self._maintenance is not None and not self._child.asked and (why := self._maintenance.look(say)):
            say(f"{why}: process {self._index} is asked to save and stop")
            self._child.ask()

    def report(self) -> Report:
        """What this supervisor says of its process."""
        self._child.look()
        moment = self._child.moment()
        now = time.monotonic()
        if now - self._looked > 5 * LOOK_SECONDS + 1.0:  # both were stopped, as by Ctrl-Z
            self._absent += now - self._looked
        self._looked = now
        if moment.seconds < self._absent:
            self._absent = 0.0
        return Report(
            host=self._host,
            phase=int(moment.phase),
            step=moment.step,
            seconds=moment.seconds - self._absent,
            stopped=self._child.stopped,
            ended=self._child.ended,
        )

    def ended(self, own: Report) -> int:
        """The exit code of a process that nobody else has ended."""
        assert own.ended is not None, "it has ended"
        return own.ended if own.ended >= 0 else 128 - own.ended

    def judged(self, verdict: Verdict) -> int:
        """Ends the process, if it runs, and says why."""
        own = self._index in verdict.culprits
        running = self._child.ended is None
        say(verdict.sentence + ("" if own else f"; process {self._index} ends for it"))
        if running and verdict.stuck:
            self._child.let_tell(own)
        if running:
            self._child.end()
        if not own:
            time.sleep(FIRST_SECONDS)
        if running:
            return INTERRUPTED
        code = self.ended(replace(self.report(), ended=self._child.ended))
        return code if own or code in BAD_INPUT else INTERRUPTED


def end_with_parent(parent: int) -> None:
    """Has this process killed when its supervisor ends, however that happens; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(INTERRUPTED)
