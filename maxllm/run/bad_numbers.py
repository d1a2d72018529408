"""Updates that are not finite, and losses that jump: when a run must not go on as it is, and how it may.

The rule is `Rule`. A run that meets it stops, or with run.on_bad_numbers=roll_back goes back to the newest
checkpoint from before, and on from there with the data that follows what did it: PaLM's remedy for spikes
(Chowdhery et al. 2022, section 5.1: about 100 steps back, 200 to 500 batches passed over).
"""

from __future__ import annotations

import io
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from maxllm.config.run import RunConfig
from maxllm.data.loader import ALL, Batches
from maxllm.errors import RunFailed
from maxllm.files import write_bytes, write_json
from maxllm.folder import BAD, PASSED, RunFolder
from maxllm.parallel import processes
from maxllm.run.fall_back import set_aside

Record = TypeVar("Record")

HISTORY, LEAST = 50, 20
"""Steps whose losses a new one is compared with, and how many of them there must be."""


class BadNumbers(Exception):
    """The run must not go on as it is."""

    def __init__(self, first: int, last: int, what: str) -> None:
        """Steps `first` to `last` are those that were bad; `what` is a sentence's beginning, for people."""
        super().__init__(what)
        self.first, self.last, self.what = first, last, what


class Rule:
    """Looks at every step's loss, in order; the same numbers have it say the same in every process."""

    def __init__(self, run: RunConfig) -> None:
        self._most, self._spike = run.max_nonfinite_steps, run.spike
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._in_a_row = 0

    def look(self, step: int, loss: float, skipped: bool) -> None:
        """Takes in a step.

        A spike is a loss that is further above the mean of the last 50 finite ones than run.spike of their
        standard deviations.

        Raises:
          BadNumbers: more than run.max_nonfinite_steps updates in a row were skipped, or the loss is a spike.
        """
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row > self._most:
            first = step - self._in_a_row + 1
            what = f"{self._in_a_row} updates in a row were not finite, the last at step {step}"
            raise BadNumbers(first, step, what)
        if skipped or not math.isfinite(loss):
            return
        if self._spike is not None and len(self._losses) >= LEAST:
            mean, spread = statistics.fmean(self._losses), statistics.stdev(self._losses)
            if loss > mean + self._spike * spread:
                what = (
                    f"the loss of step {step} is {loss:.4g}, more than {self._spike:g} standard deviations "
                    f"({spread:.2g}) above the mean of the {len(self._losses)} before ({mean:.4g})"
                )
                raise BadNumbers(step, step, what)
        self._losses.append(loss)


@dataclass(frozen=True)
class Passing(Generic[Record]):
    """Batches without those that were passed over."""

    batches: Batches[Record]
    passed: Sequence[tuple[int, int]]
    """(first, after the last) of the batches in their own order that are left out, ascending."""

    @property
    def batch_rows(self) -> int:
        """Rows of a global batch."""
        return self.batches.batch_rows

    def number(self, step: int) -> int:
        """Which batch, in their own order, the one at `step` is."""
        for first, after in self.passed:
            step += (after - first) if step >= first else 0
        return step

    def at(self, step: int, rows: slice = ALL) -> Record:
        """Some rows of the batch at `step`."""
        return self.batches.at(self.number(step), rows)

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is, with what is passed over."""
        return self.batches.fingerprint()


def passing(folder: RunFolder, batches: Batches[Record]) -> Passing[Record]:
    """The batches of a run, without what it passed over."""
    passed: list[tuple[int, int]] = []
    for first, after in sorted((entry["first"], entry["after"]) for entry in folder.passed()):
        if passed and first <= passed[-1][1]:  # a later roll-back went further back
            passed[-1] = passed[-1][0], max(after, passed[-1][1])
        else:
            passed.append((first, after))
    return Passing(batches, passed)


def rows_of(folder: RunFolder, step: int) -> Path:
    """The file for the rows of a step whose numbers were bad."""
    return folder.path / BAD / f"{step}.npz"


def write_down(folder: RunFolder, batches: Passing[Record], bad: BadNumbers) -> None:
    """Keeps the rows of the bad steps for whoever looks for the cause: `numpy.load` reads them."""
    for step in range(bad.first, bad.last + 1):
        leaves = jax.tree_util.tree_leaves_with_path(batches.at(step - 1))
        content = io.BytesIO()
        np.savez(content, **{jax.tree_util.keystr(path).strip(".") or "rows": leaf for path, leaf in leaves})
        file = rows_of(folder, step)
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, content.getvalue())


def roll_back(
    folder: RunFolder, batches: Passing[Record], bad: BadNumbers, run: RunConfig, say: Callable[[str], None]
) -> None:
    """Has the run continue from the newest checkpoint before the bad steps, with the data after them.

    All processes call it, with the folder's lock held by the main one and no save under way.

    Raises:
      RunFailed: by the recipe the run stops; or it has rolled back as often as it may; or there is no
        checkpoint to go back to.
    """
    if processes.is_main():
        write_down(folder, batches, bad)
    rows = f"the rows of what was bad are in {rows_of(folder, bad.first)}"
    remedy = "lower optimizer.learning_rate, look at the data"
    if run.on_bad_numbers == "stop":
        remedy += ", or give run.on_bad_numbers=roll_back, which goes back and passes over that data"
        raise RunFailed(f"{bad.what}; {rows}; {remedy}")
    before = [step for step in folder.steps() if step < bad.first]
    passed = folder.passed()
    if len(passed) >= run.max_roll_backs:
        raise RunFailed(f"{bad.what}, after {len(passed)} roll-backs (run.max_roll_backs); {rows}; {remedy}")
    if not before:
        raise RunFailed(f"{bad.what}, and there is no checkpoint from before; {rows}; {remedy}")
    first, after = batches.number(before[-1]), batches.number(bad.last - 1) + 1
    say(
        f"{bad.what}; {rows}. Goes back to the checkpoint of step {before[-1]}, and passes over the "
        f"{after - first} batches from there"
    )
    if processes.is_main():
        for step in folder.steps():
            if step >= bad.first:
                set_aside(folder, step, "rolled-back")
        passed.append({"first": first, "after": after, "step": bad.last, "why": bad.what})
        write_json(folder.path / PASSED, {"passed": passed})
    processes.agreed(0)  # nobody reads the folder before it is so
