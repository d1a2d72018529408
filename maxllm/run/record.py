"""The run folder's text files: metrics.jsonl (one JSON object a line), summary.json; and the console.

Training reads back `summary.json`'s existence (the run is complete), the records up to the step it continues
from, and with them the seconds already spent; none of it changes a number that is trained.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track

import maxllm
from maxllm.errors import UserError
from maxllm.files import finite, read_json, write_text

Item = TypeVar("Item")

METRICS, SUMMARY = "metrics.jsonl", "summary.json"


def read_records(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
      UserError: another line is damaged.
    """
    path = run_dir / METRICS
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"step", "seconds"} <= record.keys():
                raise ValueError("it is no record of a step")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path} line {number} is damaged: {error}") from None
        yield record


def line_of(record: dict[str, Any]) -> str:
    """A record as a line of metrics.jsonl."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json of a complete run, or None.

    Raises:
      UserError: it is damaged.
    """
    path = run_dir / SUMMARY
    return read_json(path) if path.is_file() else None


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    device = jax.devices()[0]
    return {
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "maxllm": maxllm.__version__,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def trim_heap() -> None:
    """Gives freed memory back to the system, where the C library is glibc, which keeps what threads freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def console(main: bool = True) -> Console:
    """Where a run speaks: stderr, and only from the main process; stdout is for results."""
    return Console(stderr=True, quiet=not main, highlight=False, emoji=False)


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar on a terminal and nothing elsewhere."""
    terminal = console()
    return track(items, description, console=terminal, transient=True, disable=not terminal.is_terminal)


class Recorder:
    """metrics.jsonl of one run, cut back to the step that the run continues from, and its progress bar."""

    def __init__(self, run_dir: Path, title: str, steps: int, first_step: int | None, main: bool) -> None:
        """Opens the files.

        Args:
          run_dir: the run folder.
          title: what the progress bar says.
          steps: steps of the whole run.
          first_step: step continued from; None starts anew and drops any former lines.
          main: False for the processes that must not write.
        """
        self._path, self._main = run_dir / METRICS, main
        if first_step is not None and main and not self._path.is_file():
            console(main).print(
                f"{title}: {self._path} is gone, and with it what was recorded up to step {first_step}",
                markup=False,
                soft_wrap=True,
            )
        kept = [r for r in read_records(run_dir) if first_step is not None and r["step"] <= first_step]
        self.seconds_before: float = max((record["seconds"] for record in kept), default=0.0)
        self.records = kept
        if main:
            write_text(self._path, "".join(map(line_of, kept)))
        self._console = console(main)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not (main and self._console.is_terminal),
        )
        self._task = self._progress.add_task(title, total=steps, completed=first_step or 0)
        self._title = title

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line; every record has `step` and `seconds` (since the run began, pauses left out)."""
        self.records.append(record)
        if self._main:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line_of(record))

    def heldout(self) -> list[dict[str, Any]]:
        """The records of evaluations, in order."""
        return [record for record in self.records if "heldout" in record]

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._progress.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """One console line above the progress bar."""
        self._console.print(f"{self._title}: {line}", markup=False, soft_wrap=True)
