"""Cross-validation: the mean of held-out figures over runs that held out different folds of the same rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import yaml

from maxllm.report.runs import Run, number, parsed


def cross_validated(runs: Sequence[Run]) -> list[str]:
    """A sentence for every group of runs whose recipes differ in data.fold and the folder alone: the mean and
    the standard deviation of each figure at the runs' ends."""
    groups: dict[str, list[tuple[str, Run]]] = {}
    for run in runs:
        recipe = parsed(run.config)
        data, place = recipe.get("data"), recipe.get("run")
        if isinstance(data, dict) and isinstance(place, dict) and (fold := data.pop("fold", None)):
            place.pop("dir", None)
            groups.setdefault(yaml.safe_dump(recipe), []).append((str(fold), run))
    return [sentence(group) for group in groups.values() if len(group) > 1]


def sentence(group: Sequence[tuple[str, Run]]) -> str:
    """What one group came to."""
    folds = sorted({fold for fold, _ in group}, key=lambda fold: [int(part) for part in fold.split("/")])
    ends = [run.summary.get("heldout_last") for _, run in group if run.finished]
    found = [end for end in ends if isinstance(end, dict)]
    figures = []
    for name in found[0] if found else ():
        values = [value for end in found if (value := number(end.get(name))) is not None]
        if len(values) == len(found) > 1:
            figures.append(f"{name} {statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}")
    told = ", ".join(figures) if figures else "no two of them have ended"
    head = f"Cross-validation, {len(found)} runs of the folds {', '.join(folds)}"
    return f"{head}: {told} (mean ± standard deviation)."
