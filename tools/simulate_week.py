"""Goodput of a simulated week: what preemptions cost a run, by how often it saves.

    python tools/simulate_week.py
    python tools/simulate_week.py --per-day 12 --announced 1 --step-seconds 30 --json

Preemptions come at random, seeded moments (a Poisson process). A run begins again after --down-seconds,
prepares, restores and compiles, and does again what it had done since its last checkpoint, which counts
--complete-seconds after its step; of an announced preemption (--announced: their share) it saves first. The
accounts of the sittings go through the same arithmetic as a real run's. The defaults are assumptions: a real
run's figures are in its summary.json and its log.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from typing import Any

from maxllm.phases import Phase
from maxllm.report.table import print_table
from maxllm.run.goodput import reckon

WEEK = 7 * 86_400.0
INTERVALS = (300, 600, 1200, 1800, 3600, 7200)
"""Seconds between saves that are compared."""


@dataclass(frozen=True)
class Costs:
    """Seconds that things take, and how often machines are lost."""

    step: float
    down: float
    """Until processes run again."""
    start: float
    """Preparing, restoring and compiling."""
    hold: float
    """That a save keeps the loop."""
    complete: float
    """From a save's step until its checkpoint counts."""
    per_day: float
    """Preemptions."""
    announced: float
    """The share of them that a run hears of in time to save."""


def sitting(
    number: int, began: float, first: int, computing: float, saving: float, costs: Costs
) -> dict[str, Any]:
    """The account of one start of the run."""
    done = first + int(computing / costs.step)
    seconds = {Phase.PREPARING.name: costs.start, Phase.COMPUTING.name: computing, Phase.SAVING.name: saving}
    return {"sitting": str(number), "began": began, "first": first, "step": done, "seconds": seconds}


def week(costs: Costs, interval: float, seed: int) -> dict[str, Any]:
    """The figures of a week in which the run saves every so many seconds.

    Args:
      costs: what things take.
      interval: seconds of computing between saves.
      seed: of the moments of preemption.
    """
    chance = random.Random(seed)
    every = max(1, round(interval / costs.step))
    accounts: list[dict[str, Any]] = []
    began, first = 0.0, 0
    while began < WEEK:
        lasts = chance.expovariate(costs.per_day / 86_400) if costs.per_day else math.inf
        left = min(lasts, WEEK - began)
        period = every * costs.step + costs.hold
        computed = max(0.0, left - costs.start)
        saves = int(computed / period)
        computing = max(0.0, computed - saves * costs.hold)
        account = sitting(len(accounts), began, first, computing, saves * costs.hold, costs)
        accounts.append(account)
        step = account["step"]
        if left < lasts:
            break  # the week is over
        if chance.random() >= costs.announced:
            # The newest checkpoint that was complete when the machine was lost.
            complete = int(max(0.0, computed - costs.complete) / period)
            step = max(first, first + complete * every)
        began, first = began + left + costs.down, step
    figures = reckon(accounts)
    assert figures is not None, "there is at least one sitting"
    return figures


def main() -> None:
    """Prints goodput by interval."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-seconds", type=float, default=10.0)
    parser.add_argument("--down-seconds", type=float, default=180.0)
    parser.add_argument("--start-seconds", type=float, default=90.0)
    parser.add_argument("--hold-seconds", type=float, default=1.0)
    parser.add_argument("--complete-seconds", type=float, default=60.0)
    parser.add_argument("--per-day", type=float, default=4.0, help="preemptions a day")
    parser.add_argument("--announced", type=float, default=0.0, help="share of them that is announced")
    parser.add_argument("--seeds", type=int, default=20, help="weeks that are averaged")
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    costs = Costs(
        o.step_seconds,
        o.down_seconds,
        o.start_seconds,
        o.hold_seconds,
        o.complete_seconds,
        o.per_day,
        o.announced,
    )
    weeks = {interval: [week(costs, interval, seed) for seed in range(o.seeds)] for interval in INTERVALS}
    figures: dict[str, Any] = {
        f"goodput, saving every {interval} s": sum(each["goodput"] for each in of) / o.seeds
        for interval, of in weeks.items()
    }
    if costs.per_day:
        # Young 1974: the interval at which saving and doing again cost alike.
        figures["best interval by Young's rule"] = math.sqrt(2 * costs.hold * 86_400 / costs.per_day)
    if o.json:
        print(json.dumps(figures))
    else:
        print_table(figures, f"{o.per_day:g} preemptions a day, {o.announced:.0%} of them announced")


if __name__ == "__main__":
    main()
