"""The report: one self-contained HTML page about a run folder, a quickstart folder or a folder of runs.

    maxllm report runs/quickstart

The page needs no network, no script and no other file. What a run has not reached yet is said to be missing.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from maxllm.errors import UserError
from maxllm.report import curves, figures, wording
from maxllm.report.curves import Chart
from maxllm.report.figures import NOT_YET, Facts, Row
from maxllm.report.runs import STAGES, Folder, Run, number, read_folder
from maxllm.run.record import write_text

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

SPEAKERS = {"pretrained": "after pretraining", "sft": "after SFT", "ppo": "after PPO"}


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
    """What a model said to a task."""

    text: str
    speaker: str
    right: bool


@dataclass(frozen=True)
class Time:
    """One line of the table of times."""

    name: str
    text: str
    share: float


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html`, whole or not at all.

    Args:
      folder: a run folder, a quickstart folder, or any folder whose subfolders are run folders.

    Returns:
      The page's path.

    Raises:
      UserError: the folder holds no run, a file in it is broken, or the page cannot be written there.
    """
    folder = Path(folder)
    page = render(read_folder(folder))
    path = folder / PAGE
    try:
        # A lone surrogate in a sample has no UTF-8 form; it becomes a question mark.
        write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def render(folder: Folder) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = figures.facts_of(folder)
    together = folder.kind == "quickstart"
    table = quickstart_table(folder, facts) if together else []
    sections = [
        section(run, facts if together else figures.facts_of_run(run), together) for run in folder.runs
    ]
    return environment.get_template(TEMPLATE).render(
        kind=folder.kind,
        title=page_title(folder),
        name=str(folder.path),
        written=moment(folder.written),
        lead=lead(folder, facts),
        fast=folder.summary.get("fast") is True,
        rows=table,
        remarks=figures.remarks(table),
        sections=sections,
        missing=[wording.title_of(stage) for stage in STAGES if together and folder.run(stage) is None],
        speakers=[SPEAKERS[name] for name in speakers(folder.samples)],
        tasks=task_rows(folder.samples),
        scores=task_scores(folder.samples),
        texts=text_samples(folder.samples),
        times=times(folder),
        hardware=pairs(folder.summary.get("hardware")),
        not_yet=NOT_YET,
    )


def quickstart_table(folder: Folder, facts: Facts) -> list[Row]:
    """The before/after table of the whole road."""
    return [row for stage in (*STAGES, "export") for row in stage_rows(facts, stage, folder.run(stage))]


def stage_rows(facts: Facts, stage: str, run: Run | None) -> list[Row]:
    """The table's lines of one stage, each with where the run stands if that is not its end."""
    so_far = "" if run is None or run.finished else f"so far, at step {run.heldout_step:,}"
    return [
        row if row.after == NOT_YET else replace(row, so_far=so_far) for row in figures.rows(facts, stage)
    ]


def page_title(folder: Folder) -> str:
    """The heading."""
    match folder.kind:
        case "quickstart":
            return "From text to a tuned LLaMA"
        case "run":
            return wording.title_of(folder.runs[0].stage)
    return f"{wording.count(len(folder.runs), 'run')} in {folder.path.resolve().name}"


def moment(seconds: float | None) -> str:
    """A time of day with its zone."""
    if seconds is None:
        return NOT_YET
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def lead(folder: Folder, facts: Facts) -> str:
    """One sentence: what happened."""
    if folder.kind == "quickstart" and folder.summary:
        return quickstart_lead(folder, facts)
    if folder.kind == "run":
        run = folder.runs[0]
        took = f" in {wording.duration(run.seconds)}" if run.seconds is not None else ""
        return (
            f"The run is complete: {progress(run)}{took}." if run.finished else f"The run is {progress(run)}."
        )
    done = [run.name for run in folder.runs if run.finished]
    left = [f"{run.name} ({progress(run)})" for run in folder.runs if not run.finished]
    missing = [stage for stage in STAGES if folder.kind == "quickstart" and folder.run(stage) is None]
    if folder.kind == "quickstart":
        missing.append("export")
    lists = (("complete", done), ("begun", left), (NOT_YET, missing))
    said = "; ".join(f"{state}: {wording.joined(names)}" for state, names in lists if names)
    return said[:1].upper() + said[1:] + "."


def quickstart_lead(folder: Folder, facts: Facts) -> str:
    """What a whole quickstart did, in its own numbers."""
    parameters, total = number(facts.get("parameters")), stage_seconds(folder).get("total")
    model = f"A LLaMA of {wording.whole(parameters)} parameters" if parameters else "A LLaMA"
    took = f" in {wording.duration(total)}" if total else ""
    said = f"{model} was pretrained on text, taught to answer and tuned by PPO against a reward model{took}"
    before = number(facts.get("sft_exact_match_before"))
    after = number(facts.get("ppo_exact_match_greedy_after"))
    if before is not None and after is not None:
        said += (
            f"; of held-out questions it answered {wording.percent(before)} right before SFT and "
            f"{wording.percent(after)} after PPO"
        )
    return f"{said}."


def progress(run: Run) -> str:
    """How far a run is."""
    planned = "" if run.steps is None else f" of {run.steps:,}"
    if run.finished:
        return wording.count(run.step, "step")
    return f"unfinished, at step {run.step:,}{planned}"


def section(run: Run, facts: Facts, together: bool) -> Section:
    """What the page says of one run.

    Args:
      run: the run.
      facts: where its figures and baselines stand.
      together: the page has one table for all runs.
    """
    charts = curves.charts_of(run, facts)
    rows = [] if together else stage_rows(facts, run.stage, run)
    return Section(
        title=wording.title_of(run.stage) if together else run.name,
        meaning=wording.STAGE_MEANINGS.get(run.stage, ""),
        state=progress(run),
        facts=run_facts(run),
        rows=rows,
        remarks=figures.remarks(rows),
        drawings=[
            Drawing(chart, Markup("" if chart.empty else curves.draw(chart, f"{run.name}/{place}")))
            for place, chart in enumerate(charts)
        ],
        skipped=sum((number(record.get("skipped")) or 0) > 0 for record in run.records),
        hardware=[] if together else pairs(run.summary.get("hardware")),
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
    told = [("time", wording.duration(run.seconds))] if run.seconds is not None else []
    for name, show in known.items():
        value = number(run.summary.get(name))
        if value is not None:
            told.append((labels.get(name, name), show(value)))
    return told


def speakers(samples: dict[str, Any]) -> list[str]:
    """The models that replied to any task."""
    return [name for name in SPEAKERS if any(name in task for task in objects(samples.get("tasks")))]


def task_rows(samples: dict[str, Any]) -> list[tuple[str, str, list[Reply]]]:
    """(question, answer, a reply per speaker) of samples.json's tasks."""
    return [
        (
            str(task.get("prompt", "")),
            str(task.get("answer", "")),
            [reply(task, name) for name in speakers(samples)],
        )
        for task in objects(samples.get("tasks"))
    ]


def reply(task: dict[str, Any], speaker: str) -> Reply:
    """One reply, judged as the trainers judge: exact, but for white space around it."""
    text = str(task.get(speaker, "")).strip()
    return Reply(text, SPEAKERS[speaker], text == str(task.get("answer", "")).strip())


def task_scores(samples: dict[str, Any]) -> list[str]:
    """How many of the shown replies are right, by speaker."""
    rows = [replies for _, _, replies in task_rows(samples)]
    return [
        f"{replies[0].speaker} {sum(reply.right for reply in replies)} of {len(replies)}"
        for replies in zip(*rows, strict=True)
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
    seconds = stage_seconds(folder)
    if folder.kind == "run" or not seconds:
        return []
    whole = seconds.pop("total", None) or sum(seconds.values())
    lines = [
        Time(name, wording.duration(value), 100 * value / whole if whole else 0.0)
        for name, value in seconds.items()
    ]
    name = "all runs" if folder.kind == "collection" else "total" if folder.summary else "so far"
    return [*lines, Time(name, wording.duration(whole), 100.0)]


def pairs(hardware: Any) -> list[tuple[str, str]]:
    """Hardware and versions with readable names."""
    if not isinstance(hardware, dict):
        return []
    return [(HARDWARE.get(str(name), str(name)), str(value)) for name, value in hardware.items()]
