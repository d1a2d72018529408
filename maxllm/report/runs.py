"""Reading run folders, finished or not. Whatever is missing is None or empty; nothing here writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maxllm.errors import UserError
from maxllm.files import parse_yaml, read_json
from maxllm.folder import CONFIG, METRICS, RunFolder
from maxllm.run.goodput import reckon

SAMPLES = "samples.json"

Curve = list[tuple[int, float]]
"""(step, value) pairs."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    name: str
    stage: str
    """What its configuration says it trains; the folder's name where there is no configuration."""
    steps: int | None
    """Planned steps."""
    config: str | None
    """The text of config.yaml."""
    records: tuple[dict[str, Any], ...]
    """The lines of metrics.jsonl."""
    summary: dict[str, Any]
    """summary.json; empty while the run is unfinished."""
    goodput: dict[str, Any] | None
    """Where its time went (run/goodput.py); None for a run from before there was such an account."""

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return bool(self.summary)

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in self.records), default=self.summary.get("steps", 0))

    @property
    def seconds(self) -> float | None:
        """Seconds the run has taken so far."""
        recorded = [s for r in self.records if (s := number(r.get("seconds"))) is not None]
        return number(self.summary.get("seconds")) or max(recorded, default=None)

    def curve(self, name: str) -> Curve:
        """A training metric over steps."""
        return points(self.records, name)

    def heldout_curve(self, name: str) -> Curve:
        """A held-out figure over steps."""
        return points([r["heldout"] | {"step": r["step"]} for r in self.heldout_records], name)

    @property
    def heldout_records(self) -> list[dict[str, Any]]:
        """The records that carry held-out figures."""
        return [r for r in self.records if isinstance(r.get("heldout"), dict)]

    @property
    def heldout_names(self) -> list[str]:
        """Every held-out figure that was ever recorded."""
        return sorted({name for record in self.heldout_records for name in record["heldout"]})

    @property
    def heldout_step(self) -> int:
        """The step of the newest held-out figures."""
        return max((record["step"] for record in self.heldout_records), default=self.step)

    def before(self, name: str) -> float | None:
        """A held-out figure at step 0."""
        curve = self.heldout_curve(name)
        if curve:
            return curve[0][1] if curve[0][0] == 0 else None
        return number(self.summary.get("heldout_first", {}).get(name))

    def after(self, name: str) -> float | None:
        """The newest held-out figure after step 0."""
        curve = self.heldout_curve(name)
        if curve:
            return curve[-1][1] if curve[-1][0] > 0 else None
        return number(self.summary.get("heldout_last", {}).get(name))


@dataclass(frozen=True)
class Folder:
    """What a report is about."""

    path: Path
    kind: Literal["run", "road", "collection"]
    runs: tuple[Run, ...]
    summary: dict[str, Any]
    """A quickstart's own summary.json; empty while it is unfinished."""
    samples: dict[str, Any]
    """A quickstart's samples.json; empty while there is none."""
    written: float | None
    """When the newest of the files read was written, seconds since the epoch."""

    def run(self, stage: str) -> Run | None:
        """The run of a stage of a road."""
        return next((run for run in self.runs if run.name == stage), None)


def read_folder(path: Path, road: Sequence[str]) -> Folder:
    """Finds out what a folder is and reads it.

    Args:
      path: the folder.
      road: the stages of a road, in the order in which they run: a folder that holds runs of their names and
        no others is one.

    Raises:
      UserError: it holds no run, or a file in it is not what it should be.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run folder, or a folder of run folders")
    if is_run(path):
        return Folder(path, "run", (read_run(path),), {}, {}, newest([path]))
    children = sorted(child for child in path.iterdir() if child.is_dir() and is_run(child))
    names = {child.name for child in children}
    summary = summary_of(path)
    samples = read_json(path / SAMPLES) if (path / SAMPLES).is_file() else {}
    if "bits_per_byte" in summary or (names and names <= set(road)):
        runs = tuple(read_run(path / stage) for stage in road if stage in names)
        return Folder(path, "road", runs, summary, samples, newest([path, *children]))
    if not children:
        raise UserError(
            f"{path} holds no run: neither it nor a folder in it has {CONFIG} or {METRICS}; "
            "give a run folder, or a folder of run folders"
        )
    order = {stage: place for place, stage in enumerate(road)}
    runs = tuple(
        sorted(map(read_run, children), key=lambda run: (order.get(run.stage, len(order)), run.name))
    )
    return Folder(path, "collection", runs, {}, {}, newest(children))


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder."""
    return RunFolder(path).has_config or RunFolder(path).has_metrics


def read_run(path: Path) -> Run:
    """Reads one run folder."""
    folder = RunFolder(path)
    config = folder.config_text()
    settings, summary = parsed(config), summary_of(path)
    planned = settings.get("run")
    steps = summary.get("steps") or (planned.get("steps") if isinstance(planned, dict) else None)
    records = (r for r in folder.records() if isinstance(r["step"], int))
    return Run(
        name=path.resolve().name,
        stage=str(settings.get("stage") or summary.get("stage") or path.resolve().name),
        steps=steps if isinstance(steps, int) else None,
        config=config,
        records=tuple(records),
        summary=summary,
        goodput=reckon(folder.sittings()),
    )


def parsed(config: str | None) -> dict[str, Any]:
    """The mapping in a configuration's text; empty where it cannot be read."""
    try:
        settings = parse_yaml(config or "")
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def summary_of(path: Path) -> dict[str, Any]:
    """summary.json of a folder, or nothing."""
    return RunFolder(path).summary() or {}


def newest(folders: list[Path]) -> float | None:
    """When the newest file that a report reads was written."""
    times = [RunFolder(folder).written() for folder in folders]
    return max((time for time in times if time is not None), default=None)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def points(records: Any, name: str) -> Curve:
    """The finite values of one metric; a step recorded twice counts as it was recorded last."""
    return sorted({r["step"]: v for r in records if (v := number(r.get(name))) is not None}.items())
