"""Who is told what happens in a run: the terminal and metrics.jsonl, and whatever else comes to listen.

A record is a line of metrics.jsonl: it has `step` and `seconds` (since the run began, pauses left out). None
of it changes a number that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from maxllm.folder import RunFolder
from maxllm.run.console import console

Record = Mapping[str, Any]


class Observer:
    """What a run tells. A kind of observer overrides what it has a use for; the rest goes unheard."""

    def say(self, line: str) -> None:
        """One sentence for whoever watches."""

    def advance(self, step: int) -> None:
        """A step is done."""

    def step(self, record: Record) -> None:
        """The figures of the steps since the last such record."""

    def heldout(self, record: Record) -> None:
        """Held-out figures, under "heldout"."""

    def close(self) -> None:
        """The run ends here, complete or not."""


class Observers(Observer):
    """Several observers, told in turn, as one."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = list(members)

    def add(self, member: Observer) -> None:
        """Tells one more from now on."""
        self._members.append(member)

    def say(self, line: str) -> None:
        for member in self._members:
            member.say(line)

    def advance(self, step: int) -> None:
        for member in self._members:
            member.advance(step)

    def step(self, record: Record) -> None:
        for member in self._members:
            member.step(record)

    def heldout(self, record: Record) -> None:
        for member in self._members:
            member.heldout(record)

    def close(self) -> None:
        for member in self._members:
            member.close()


class MetricsFile(Observer):
    """Writes metrics.jsonl of a run."""

    def __init__(self, folder: RunFolder, former: Sequence[Record]) -> None:
        """Cuts the file back to the records that the run continues from."""
        self._folder = folder
        folder.write_records(former)

    def step(self, record: Record) -> None:
        self._folder.append_record(record)

    def heldout(self, record: Record) -> None:
        self._folder.append_record(record)


class Terminal(Observer):
    """Prints lines on stderr, above a progress bar where that is a terminal."""

    SHOWN = ("loss", "accuracy", "score", "kl", "gradient_norm")
    """Figures that a line shows, where the stage has them."""

    def __init__(self, title: str, steps: int, first: int) -> None:
        """Begins to draw.

        Args:
          title: what every line begins with.
          steps: steps of the whole run.
          first: steps that were done before.
        """
        self._title, self._steps = title, steps
        self._console = console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=steps, completed=first)
        self._progress.start()

    def say(self, line: str) -> None:
        self._console.print(f"{self._title}: {line}", markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def step(self, record: Record) -> None:
        self.say(self.line(record))

    def heldout(self, record: Record) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record["heldout"].items())
        self.say(f"step {record['step']} held out: {figures}")

    def close(self) -> None:
        self._progress.stop()

    def line(self, record: Record) -> str:
        """The line for some steps' figures."""
        parts = [f"{name} {record[name]:.4g}" for name in self.SHOWN if name in record]
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        minutes, seconds = divmod(int((self._steps - record["step"]) / record["steps_per_second"]), 60)
        return (
            f"step {record['step']}/{self._steps}: " + ", ".join(parts) + f", {minutes}:{seconds:02d} to go"
        )


def observers_of(
    folder: RunFolder, title: str, steps: int, first: int, former: Sequence[Record], main: bool
) -> Observers:
    """Everyone who listens to a run.

    Args:
      folder: the run's folder.
      title: the run's stage.
      steps: steps of the whole run.
      first: steps that were done before.
      former: the records of those.
      main: False in processes that have nothing to tell, for another one tells it.
    """
    return Observers([MetricsFile(folder, former), Terminal(title, steps, first)] if main else [])
