"""The report: one self-contained HTML page about a run folder, a quickstart folder or a folder of runs.

    maxllm report runs/quickstart

The page needs no network, no script and no other file. What a run has not reached yet is said to be missing.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from maxllm.errors import UserError
from maxllm.files import write_text
from maxllm.report import curves, wording
from maxllm.report.charts import Chart
from maxllm.report.figures import NOT_YET, Facts, Row
from maxllm.report.folds import cross_validated
from maxllm.report.runs import Folder, Run, number, read_folder
from maxllm.report.stage import Known, Road, facts_of, facts_together

PAGE, TEMPLATE = "report.html", "page.html.j2"

HARDWARE = {
    "device_kind": "Device",
    "devices": "Devices",
    "processes": "Processes",
    "cpu": "Processor",
    "cpu_count": "Processor cores",
    "python": "Python",
    "jax": "JAX",
    "maxllm": "maxllm",
}


@dataclass(frozen=True)
class Drawing:
    """A chart and its SVG."""

    chart: Chart
    svg: Markup


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    title: str
    meaning: str
    state: str
    facts: list[tuple[str, str]]
    rows: list[Row]
    """Empty where the figures of all runs stand in one table."""
    remarks: list[str]
    drawings: list[Drawing]
    skipped: int
    hardware: list[tuple[str, str]]
    config: str | None


@dataclass(frozen=True)
class Reply:
    """What a model replied to a task."""

    text: str
    model: str
    right: bool


@dataclass(frozen=True)
class Time:
    """One line of the table of times."""

    name: str
    text: str
    share: float


def write_report(folder: Path, known: Known) -> Path:
    """Writes `folder/report.html`, whole or not at all.

    Args:
      folder: a run folder, the folder of a road, or any folder whose subfolders are run folders.
      known: the stages, and the road.

    Returns:
      The page's path.

    Raises:
      UserError: the folder holds no run, a file in it is broken, or the page cannot be written there.
    """
    folder = Path(folder)
    page = render(read_folder(folder, known.road.stages), known)
    path = folder / PAGE
    try:
        # A lone surrogate in a sample has no UTF-8 form; it becomes a question mark.
        write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def render(folder: Folder, known: Known) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    road = known.road if folder.kind == "road" else None
    facts = facts_together(folder.runs, known, folder.summary)
    table = road_table(folder, known, facts) if road else []
    replies = Replies(known.road.models, folder.samples)
    return environment.get_template(TEMPLATE).render(
        kind=folder.kind,
        title=page_title(folder, known),
        name=str(folder.path),
        written=moment(folder.written),
        lead=lead(folder, known.road, facts),
        fast=folder.summary.get("fast") is True,
        rows=table,
        remarks=remarks(table, known, road.stages) if road else cross_validated(folder.runs),
        sections=[section(run, known, facts if road else None) for run in folder.runs],
        missing=[known.of(stage).title for stage in missing_stages(folder, known.road)],
        models=replies.labels,
        tasks=replies.rows,
        scores=replies.scores,
        texts=text_samples(folder.samples),
        times=times(folder),
        hardware=pairs(folder.summary.get("hardware")),
        not_yet=NOT_YET,
    )


def missing_stages(folder: Folder, road: Road) -> list[str]:
    """The stages of a road that have no run yet."""
    return [stage for stage in road.stages if folder.kind == "road" and folder.run(stage) is None]


def road_table(folder: Folder, known: Known, facts: Facts) -> list[Row]:
    """The before/after table of the whole road."""
    rows = [row for stage in known.road.stages for row in stage_rows(facts, known, stage, folder.run(stage))]
    return rows + known.road.rows(facts)


def stage_rows(facts: Facts, known: Known, stage: str, run: Run | None) -> list[Row]:
    """The table's lines of one stage, each with where the run stands if that is not its end."""
    so_far = "" if run is None or run.finished else f"so far, at step {run.heldout_step:,}"
    rows = known.of(stage).rows(facts)
    return [row if row.after == NOT_YET else replace(row, so_far=so_far) for row in rows]


def remarks(table: list[Row], known: Known, stages: Sequence[str]) -> list[str]:
    """What a reader of the table should not miss."""
    verdicts = {row.name: row.verdict.kind for row in table}
    return [remark for stage in stages for remark in known.of(stage).remarks(verdicts)]


def page_title(folder: Folder, known: Known) -> str:
    """The heading."""
    match folder.kind:
        case "road":
            return known.road.title
        case "run":
            return known.of(folder.runs[0].stage).title
    return f"{wording.count(len(folder.runs), 'run')} in {folder.path.resolve().name}"


def moment(seconds: float | None) -> str:
    """A time of day with its zone."""
    if seconds is None:
        return NOT_YET
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def lead(folder: Folder, road: Road, facts: Facts) -> str:
    """One sentence: what happened."""
    if folder.kind == "road" and folder.summary:
        return road.lead(facts, stage_seconds(folder).get("total"))
    if folder.kind == "run":
        run = folder.runs[0]
        took = f" in {wording.duration(run.seconds)}" if run.seconds is not None else ""
        return (
            f"The run is complete: {progress(run)}{took}." if run.finished else f"The run is {progress(run)}."
        )
    done = [run.name for run in folder.runs if run.finished]
    left = [f"{run.name} ({progress(run)})" for run in folder.runs if not run.finished]
    missing = missing_stages(folder, road)
    if folder.kind == "road":
        missing.append("export")
    lists = (("complete", done), ("begun", left), (NOT_YET, missing))
    sentence = "; ".join(f"{state}: {wording.joined(names)}" for state, names in lists if names)
    return sentence[:1].upper() + sentence[1:] + "."


def progress(run: Run) -> str:
    """How far a run is."""
    planned = "" if run.steps is None else f" of {run.steps:,}"
    if run.finished:
        return wording.count(run.step, "step")
    return f"unfinished, at step {run.step:,}{planned}"


def section(run: Run, known: Known, together: Facts | None) -> Section:
    """What the page says of one run.

    Args:
      run: the run.
      known: the stages.
      together: the figures of all runs, where the page has one table for them.
    """
    report = known.of(run.stage)
    facts = facts_of(run, report) if together is None else together
    rows = stage_rows(facts, known, run.stage, run) if together is None else []
    return Section(
        title=run.name if together is None else report.title,
        meaning=report.meaning,
        state=progress(run),
        facts=run_facts(run),
        rows=rows,
        remarks=remarks(rows, known, [run.stage]),
        drawings=[
            Drawing(chart, Markup("" if chart.empty else curves.draw(chart, f"{run.name}/{place}")))
            for place, chart in enumerate(report.charts(run, facts))
        ],
        skipped=sum((number(record.get("skipped")) or 0) > 0 for record in run.records),
        hardware=pairs(run.summary.get("hardware")) if together is None else [],
        config=run.config,
    )


def run_facts(run: Run) -> list[tuple[str, str]]:
    """A run's sizes and speed, as far as they are known."""
    known = {
        "parameters": wording.whole,
        "tokens": wording.whole,
        "tokens_per_second": wording.whole,
        "compile_seconds": wording.duration,
        "peak_rss_bytes": wording.size,
    }
    labels = {"tokens": "token positions", "tokens_per_second": "tokens/s", "compile_seconds": "compiling"}
    labels |= {"peak_rss_bytes": "peak memory"}
    facts = [("time", wording.duration(run.seconds))] if run.seconds is not None else []
    for name, show in known.items():
        value = number(run.summary.get(name))
        if value is not None:
            facts.append((labels.get(name, name), show(value)))
    return facts


@dataclass(frozen=True)
class Replies:
    """The tasks of samples.json, and what each model replied to them."""

    names: Mapping[str, str]
    """What samples.json calls each model -> what the page calls it."""
    samples: dict[str, Any]

    @property
    def models(self) -> list[str]:
        """The models that replied to any task, as samples.json calls them."""
        tasks = objects(self.samples.get("tasks"))
        return [name for name in self.names if any(name in task for task in tasks)]

    @property
    def labels(self) -> list[str]:
        """What the page calls them."""
        return [self.names[name] for name in self.models]

    @property
    def rows(self) -> list[tuple[str, str, list[Reply]]]:
        """(question, answer, a reply of each model)."""
        tasks = objects(self.samples.get("tasks"))
        models = self.models
        return [
            (str(t.get("prompt", "")), str(t.get("answer", "")), [self.reply(t, name) for name in models])
            for t in tasks
        ]

    def reply(self, task: dict[str, Any], name: str) -> Reply:
        """One reply, judged as the trainers judge: exact, but for white space around it."""
        text = str(task.get(name, "")).strip()
        return Reply(text, self.names[name], text == str(task.get("answer", "")).strip())

    @property
    def scores(self) -> list[str]:
        """How many of the shown replies are right, by model."""
        return [
            f"{replies[0].model} {sum(reply.right for reply in replies)} of {len(replies)}"
            for replies in zip(*(replies for _, _, replies in self.rows), strict=True)
        ]


def text_samples(samples: dict[str, Any]) -> list[tuple[str, str]]:
    """(prompt, continuation) of samples.json's texts."""
    return [
        (str(text.get("prompt", "")), str(text.get("continuation", "")))
        for text in objects(samples.get("text"))
    ]


def objects(values: Any) -> list[dict[str, Any]]:
    """The JSON objects in a list."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def stage_seconds(folder: Folder) -> dict[str, float]:
    """Seconds by stage: a quickstart's own account, else that of its runs."""
    own = folder.summary.get("seconds")
    if isinstance(own, dict):
        return {name: value for name, given in own.items() if (value := number(given)) is not None}
    return {run.name: run.seconds for run in folder.runs if run.seconds is not None}


def times(folder: Folder) -> list[Time]:
    """The table of times; the bars are shares of the whole."""
    if folder.kind == "run":
        return phase_times(folder.runs[0])
    seconds = stage_seconds(folder)
    if not seconds:
        return []
    whole = seconds.pop("total", None) or sum(seconds.values())
    lines = [
        Time(name, wording.duration(value), 100 * value / whole if whole else 0.0)
        for name, value in seconds.items()
    ]
    name = "all runs" if folder.kind == "collection" else "total" if folder.summary else "so far"
    return [*lines, Time(name, wording.duration(whole), 100.0)]


def phase_times(run: Run) -> list[Time]:
    """What a run's time was spent on; the last line is goodput."""
    if run.goodput is None:
        return []
    spent = {what: seconds for what, seconds in run.goodput["seconds"].items() if seconds}
    whole = sum(spent.values())
    lines = [Time(what, wording.duration(value), 100 * value / whole) for what, value in spent.items()]
    sittings = wording.count(run.goodput["sittings"], "sitting")
    share = f"{run.goodput['goodput']:.1%} of {wording.duration(whole)}"
    return [*lines, Time(f"goodput, {sittings}", share, 100.0)]


def pairs(hardware: Any) -> list[tuple[str, str]]:
    """Hardware and versions with readable names."""
    if not isinstance(hardware, dict):
        return []
    return [(HARDWARE.get(str(name), str(name)), str(value)) for name, value in hardware.items()]
