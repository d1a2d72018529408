"""What a report draws of a run, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from maxllm.report.runs import Curve, Run
from maxllm.report.wording import bits, percent

COIN = 0.5
"""The share of pairs that guessing orders right."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Curve


@dataclass(frozen=True)
class Level:
    """A dashed line across: something to compare with."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """One drawing: its curves share an axis."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()
    show: Callable[[float], str] = field(default=bits)
    from_zero: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw yet."""
        return not any(line.points for line in self.lines)

    @property
    def legend(self) -> list[tuple[int, str, str]]:
        """(colour, label, newest value) of the curves that have points."""
        return [
            (place, line.label, self.show(line.points[-1][1]))
            for place, line in enumerate(self.lines)
            if line.points
        ]

    @property
    def description(self) -> str:
        """The drawing in a sentence, for who cannot see it."""
        parts = [
            f"{line.label} from {self.show(line.points[0][1])} at step {line.points[0][0]} "
            f"to {self.show(line.points[-1][1])} at step {line.points[-1][0]}"
            for line in self.lines
            if line.points
        ]
        parts += [f"{level.label} at {self.show(level.value)}" for level in self.levels]
        return f"{self.title}: " + "; ".join(parts)


def training_and_heldout(run: Run, title: str, unit: str, name: str) -> Chart:
    """A metric of training beside the held-out figure of the same name."""
    lines = (Line("training", run.curve(name)), Line("held out", run.heldout_curve(name)))
    return Chart(title, unit, lines)


def shares(title: str, *lines: Line, levels: tuple[Level, ...] = ()) -> Chart:
    """Shares of held-out items."""
    return Chart(title, "share of held-out items", lines, levels, percent, from_zero=True)


def of_any_run(run: Run) -> list[Chart]:
    """The loss, and every held-out figure, of a run whose stage nobody here knows."""
    others = [
        Chart(name.replace("_", " "), "held out", (Line("held out", run.heldout_curve(name)),))
        for name in run.heldout_names
        if name != "loss"
    ]
    return [training_and_heldout(run, "Loss", "nats per token", "loss"), *others]
