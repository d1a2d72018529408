"""Being asked to stop: a signal sets a flag that the loop reads between two steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from maxllm.errors import leave
from maxllm.parallel import processes

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""SIGUSR2 is what mpirun passes on, and Slurm can send."""

AGREE_SECONDS = 1.0
"""About as long several processes go on without asking each other whether to stop: little of the half minute
or so that a preempted machine is given."""


class StopRequest:
    """Whether this process was asked to stop, and when it asks the others of its run whether they were."""

    def __init__(self) -> None:
        self.asked = False
        self._every = 1
        self._restart()

    def _restart(self) -> None:
        """Begins to count steps, and their seconds, from this agreement to the next."""
        self._steps, self._began = 0, time.perf_counter()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C stops at once, without saving."""
        if self.asked and signum == signal.SIGINT:
            leave(75, "stopped at once; the same command continues from the last checkpoint")
        if not self.asked:
            os.write(2, b"maxllm: stopping after this step, then saving; Ctrl-C again stops at once\n")
        self.asked = True

    def anywhere(self, step: int) -> bool:
        """Whether any process was asked: all must stop at the same step to save together.

        Every process calls this after every step, and with 0 outside of them, which always asks. Several
        processes ask each other only once in a number of steps, because asking waits for the devices. With
        its answer each tells how long its steps took, and from the slowest one's seconds all derive the same
        number of steps until they ask again: about AGREE_SECONDS of them, at least 1, and at most twice as
        many as before, for the first steps after a pause tell little of the next.
        """
        if jax.process_count() == 1:
            return self.asked
        self._steps += 1
        if step and self._steps < self._every:
            return False
        seconds = (time.perf_counter() - self._began) / self._steps
        answers = processes.from_all([float(self.asked), seconds])
        if step:
            slowest = max(float(answers[:, 1].max()), 1e-9)
            self._every = min(2 * self._every, max(1, int(AGREE_SECONDS / slowest)))
        self._restart()
        return bool(answers[:, 0].any())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Installs the handlers, and puts the former ones back."""
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in ASKS_TO_STOP}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
