"""The figures of the steps between two log lines, and how fast they went."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import jax

from maxllm.plan.hardware import peak_flops
from maxllm.run.program import Program

Sums = Mapping[str, Sequence[float]]
"""{metric: (sum, count)}."""


class Window:
    """Sums over the steps between two log lines, and how fast they went."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self.restart()

    def restart(self, former: Sums | None = None) -> None:
        """Begins a new window now, or goes on with one that was open when a checkpoint was saved."""
        self._sums = {name: (total, count) for name, (total, count) in (former or {}).items()}
        self._steps, self._paused, self._began = 0, 0.0, time.perf_counter()

    def open(self) -> Sums:
        """The sums so far, kept with a checkpoint: so the means of a run that goes on are of all steps."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def paused(self, seconds: float) -> None:
        """Leaves seconds that were not training out of the speed."""
        self._paused += seconds

    def add(self, sums: dict[str, tuple[float, float]]) -> None:
        """Adds one step's (sum, count) pairs, those that are finite."""
        self._steps += 1
        for name, (total, count) in sums.items():
            if math.isfinite(total):
                former = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (former[0] + total, former[1] + count)

    def means(self) -> dict[str, float]:
        """Every metric divided once."""
        return {name: total / count for name, (total, count) in self._sums.items() if count}

    def speed(self) -> dict[str, float]:
        """Steps and tokens per second, and MFU where the device's peak is known."""
        per_second = self._steps / max(time.perf_counter() - self._began - self._paused, 1e-9)
        speed = {
            "steps_per_second": per_second,
            "tokens_per_second": per_second * self._program.tokens_per_step,
        }
        if self._peak is not None:
            speed["mfu"] = per_second * self._program.flops_per_step / (self._peak * jax.device_count())
        return speed
