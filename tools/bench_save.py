"""What saving costs a run: how long the loop waits, steps beside a save, and memory over many saves.

    python tools/bench_save.py
    python tools/bench_save.py --saves 100 --json
    python tools/bench_save.py --rows 32

Trains the model of tools/bench_step.py (34 M parameters, 407 MB of state) and saves as a run does, every few
steps, in the background. Prints the seconds that `save` itself keeps the loop, those of a step while nothing
is written and of one that a save begins before (the loop's wait included), the seconds until a checkpoint is
complete, and the resident memory after the first tenth of the saves and after the last. On CPU a save and a
step want the same cores, and a save takes the same time from a step of 2,048 tokens (8 rows) as from a longer
one; on an accelerator a save has the host for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from bench_step import ROWS, random_tokens, training
from rich.console import Console
from rich.progress import track

from maxllm.folder import RunFolder
from maxllm.parallel.compiler import without_tpu
from maxllm.parallel.hugepages import restart_with_huge_pages
from maxllm.report.table import print_table
from maxllm.run.checkpoint import Checkpoints, Keep

WARM_UP = 5


def resident() -> int:
    """Bytes of this process in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: RunFolder, saves: int, between: int, rows: int) -> dict[str, Any]:
    """Trains and saves.

    Args:
      folder: where checkpoints go; two are kept.
      saves: how many.
      between: steps between the end of a save and the next.
      rows: of a step's batch.
    """
    step, batch, state = training(random_tokens(rows))
    hold: list[float] = []
    complete: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    memory: list[int] = []

    def advance() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        advance()
    checkpoints = Checkpoints(folder, Keep(2))
    for number in track(range(1, saves + 1), "saving", console=Console(stderr=True)):
        alone += [advance() for _ in range(between)]
        started = time.perf_counter()
        checkpoints.save(number, state)
        hold.append(time.perf_counter() - started)
        beside.append(hold[-1] + advance())
        while number not in folder.steps():
            advance()
        complete.append(time.perf_counter() - started)
        memory.append(resident())
    checkpoints.close()
    early = max(1, saves // 10)
    middle = statistics.median
    return {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "saves": saves,
        "held_up_seconds": middle(hold),
        "complete_seconds": middle(complete),
        "step_seconds": middle(alone),
        "step_seconds_with_a_save": middle(beside),
        "slower_with_a_save": middle(beside) / middle(alone) - 1,
        "resident_bytes_early": max(memory[:early]),
        "resident_bytes_late": max(memory[-early:]),
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--steps-between", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of 256 tokens in a batch (%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    restart_with_huge_pages()
    without_tpu()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(RunFolder(Path(folder) / "run"), options.saves, options.steps_between, options.rows)
    if options.json:
        print(json.dumps(figures))
    else:
        print_table(figures, "saving")


if __name__ == "__main__":
    main()
