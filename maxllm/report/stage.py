"""What a stage, and a road through several, tell a report: their words, figures and drawings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maxllm.report.charts import Chart, of_any_run
from maxllm.report.figures import Facts, Row
from maxllm.report.runs import Run

Verdicts = Mapping[str, str]
"""What may be said of the figures that a page shows: the name of a row -> better, worse, same or none."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What a report says and draws of a run of one stage."""

    title: str
    meaning: str = ""
    """One sentence for who has never done it: what happens in this stage."""
    facts: Callable[[Run], Facts] = lambda run: {}
    """A run's figures so far, under the names of a quickstart's summary.json."""
    rows: Callable[[Facts], list[Row]] = lambda facts: []
    """The lines of the before/after table."""
    charts: Callable[[Run, Facts], list[Chart]] = lambda run, facts: of_any_run(run)
    """The drawings; baselines stand in the facts."""
    remarks: Callable[[Verdicts], list[str]] = lambda verdicts: []
    """What a reader of the table should not miss."""


@dataclass(frozen=True, kw_only=True)
class Road:
    """A folder whose runs are the stages of one road, each in a folder of its name."""

    title: str
    stages: tuple[str, ...]
    """In the order in which they run."""
    models: Mapping[str, str]
    """What samples.json calls each model -> what a page calls it."""
    lead: Callable[[Facts, float | None], str]
    """One sentence of what the whole road did; the seconds are None while they are not known."""
    rows: Callable[[Facts], list[Row]]
    """The lines of the table that belong to no stage."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """All that a report can be about."""

    stages: Mapping[str, StageReport]
    road: Road

    def of(self, stage: str) -> StageReport:
        """What a stage tells; of one that nobody knows, its name."""
        return self.stages.get(stage) or StageReport(title=stage)


def facts_of(run: Run, report: StageReport) -> Facts:
    """A run's figures so far, with the held-out items behind them and the size of its model."""
    facts = report.facts(run)
    return facts | {"parameters": run.summary.get("parameters")} if facts else {}


def facts_together(runs: Iterable[Run], known: Known, summary: dict[str, Any]) -> Facts:
    """The figures of all runs of a road; its own summary.json has the last word."""
    facts: Facts = {"heldout_items": {}}
    for run in runs:
        own = facts_of(run, known.of(run.stage))
        items = facts["heldout_items"] | own.get("heldout_items", {})
        facts |= {name: value for name, value in own.items() if value is not None}
        facts["heldout_items"] = items
    items = summary.get("heldout_items")
    items = items if isinstance(items, dict) else {}
    return facts | summary | {"heldout_items": facts["heldout_items"] | items}
