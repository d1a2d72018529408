"""Report: draw report.html from a run folder or a folder of runs.

maxllm report runs/quickstart
"""

from __future__ import annotations

from pathlib import Path

from maxllm.config.stages import TRAINED
from maxllm.report.page import write_report
from maxllm.report.stage import Known
from maxllm.stages.quickstart import ROAD
from maxllm.stages.registry import stage_of


def run(folder: Path) -> Path:
    """Writes `folder/report.html`, and returns its path; see `write_report`."""
    return write_report(folder, Known(stages={name: stage_of(name).report for name in TRAINED}, road=ROAD))
