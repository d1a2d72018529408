"""Curves as inline SVG that takes its colours from the page, so that it is legible in light and in dark."""

from __future__ import annotations

import html
import io
import math
import re

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maxllm.report.charts import Chart
from maxllm.report.runs import Curve
from maxllm.report.wording import percent

INK, RULE, COLOURS = "#010101", "#020202", ("#030303", "#040404", "#050505")
"""Stand-ins that matplotlib draws with; `styled` puts the page's colours in their place."""

PAGE_COLOURS = {INK: "currentColor", RULE: "var(--rule)"} | {
    colour: f"var(--curve-{place})" for place, colour in enumerate(COLOURS)
}

DASHES = ((0, (5, 3)), (0, (1.5, 2.5)))

MOST_POINTS = 1000
"""Longer curves are drawn with every n-th point, which the eye cannot tell apart at this size."""


def draw(chart: Chart, key: str) -> str:
    """The chart as an SVG element.

    Args:
      chart: what to draw.
      key: unlike that of any other chart on the page; the ids inside the SVG are made from it.
    """
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 10.0, "text.parse_math": False}
    ):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        for colour, line in zip(COLOURS, chart.lines, strict=False):
            steps, values = [p[0] for p in thinned(line.points)], [p[1] for p in thinned(line.points)]
            few = len(line.points) <= 12
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if few else None, markersize=3.5)
        for dash, level in zip(DASHES, chart.levels, strict=False):
            axes.axhline(level.value, color=INK, linewidth=1.0, linestyle=dash, alpha=0.7)
            axes.annotate(
                f"{level.label} {chart.show(level.value)}",
                (1, level.value),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=INK,
            )
        axes.margins(x=0.03, y=0.12)
        if chart.from_zero:
            low, high = axes.get_ylim()
            axes.set_ylim(min(0.0, low) if low < 0 and lowest(chart) < 0 else 0.0, max(high, 0.05))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if chart.show is percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.set_xlabel("step", color=INK)
        axes.tick_params(length=0, labelcolor=INK)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(RULE)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return styled(buffer.getvalue(), chart.description)


def lowest(chart: Chart) -> float:
    """The smallest value drawn."""
    return min((value for line in chart.lines for _, value in line.points), default=0.0)


def thinned(points: Curve) -> Curve:
    """Few enough points to draw; the last one always stays."""
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::-every][::-1]


def styled(svg: str, description: str) -> str:
    """matplotlib's SVG file as an element of an HTML page: without prologue, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|<!--.*?-->", "", svg, flags=re.S
    )
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    svg = re.sub(
        r"<svg.*?>",
        f'<svg {box[0]} role="img" aria-label="{html.escape(description)}">',
        svg,
        count=1,
        flags=re.S,
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return re.sub(r"\s*\n\s*", "\n", svg)
