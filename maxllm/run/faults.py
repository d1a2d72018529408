"""Being asked to stop: SIGTERM and Ctrl-C set a flag that the loop reads between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from maxllm.errors import leave
from maxllm.parallel import processes

AGREE_EVERY = 10
"""Steps between two moments at which several processes agree whether to stop."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C stops at once, without saving."""
        if self.asked and signum == signal.SIGINT:
            leave(75, "stopped at once; the same command continues from the last checkpoint")
        if not self.asked:
            os.write(2, b"maxllm: stopping after this step, then saving; Ctrl-C again stops at once\n")
        self.asked = True

    def anywhere(self, step: int) -> bool:
        """Whether any process was asked: all must stop at the same step to save together.

        Several processes ask each other only every AGREE_EVERY steps, because asking waits for the devices.
        """
        if jax.process_count() == 1:
            return self.asked
        return step % AGREE_EVERY == 0 and processes.anywhere(self.asked)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Installs the handlers for SIGTERM and SIGINT, and puts the former ones back."""
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
