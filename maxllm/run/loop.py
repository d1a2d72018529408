"""The training loop that every stage shares: resume, step, evaluate, record, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxllm.data.loader import Batches, fingerprint
from maxllm.data.store import write_record
from maxllm.errors import Interrupted, RunFailed, UserError
from maxllm.files import read_json, write_json
from maxllm.parallel import processes, sharding
from maxllm.plan.hardware import peak_flops
from maxllm.records import Metrics, Params
from maxllm.run.checkpoint import FOLDER, UNRANKED, Checkpoints, latest_step
from maxllm.run.faults import StopRequest, stop_on_signals
from maxllm.run.heldout import HELDOUT
from maxllm.run.parents import check_parents, in_use, record_parents, roles_of
from maxllm.run.program import Program, compile_program
from maxllm.run.record import METRICS, SUMMARY, Recorder, hardware, peak_rss_bytes, read_summary
from maxllm.run.session import Session, open_run_dir, say

DATA = "data.json"
"""Which data a run is made of; see `check_same_data`."""


@dataclass(frozen=True)
class Job:
    """What is particular to a stage."""

    program: Program
    """What is compiled."""
    fresh: Callable[[], Any]
    """Makes the state a new run starts from; not called when a checkpoint is there."""
    batches: Batches[Any]
    """The data, in order."""
    heldout: Any
    """A record of arrays and lists of texts that `evaluate` reads: part of what a run is."""
    evaluate: Callable[[Params], dict[str, float]]
    """Held-out figures of the exported parameters of a state."""
    best: tuple[str, Literal["min", "max"]]
    """Which held-out figure ranks checkpoints, and which end of it is good."""
    store_heldout: bool = False
    """Whether the run's folder keeps the held-out rows; without, they are in files of their own already."""
    frozen: tuple[Any, ...] = ()
    """The program's frozen trees."""
    facts: dict[str, Any] | None = None
    """Numbers that go into summary.json as they are."""
    warning: Callable[[dict[str, float]], str | None] = lambda means: None
    """Looks at the figures of a log line; a sentence where they tell that training does nothing."""


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every `every` steps is done after `step`; the last step always counts."""
    return step % every == 0 or step == total


def finished(session: Session) -> dict[str, Any] | None:
    """The summary of a run that is complete already, or None."""
    return read_summary(session.run_dir)


def train(session: Session, job: Job) -> dict[str, Any]:
    """Runs the stage to its last step, from wherever it was interrupted; returns summary.json's content.

    Resuming, in this order:
      1. the newest complete checkpoint gives state and step (none: `job.fresh()`, step 0);
      2. metrics.jsonl is cut back to that step;
      3. the next batch is the one of that step, for a batch is a function of (seed, step).

    Nothing is written before the first state is there: what cannot start leaves no folder behind.

    Raises:
      Interrupted: SIGTERM or Ctrl-C came; the state is saved.
      RunFailed: too many consecutive updates were not finite, the run's checkpoints are gone or damaged, or
        another process of the run has ended.
      UserError: another process is training in the same folder, or the run began from other data or parents.
    """
    title = session.config.stage
    with stop_on_signals() as stop:
        try:
            state = job.fresh() if latest_step(session.run_dir) is None else None
            with open_run_dir(session):
                summary = finished(session) or _train_in_folder(session, job, state, stop)
        except Exception as error:
            if processes.peer_lost(error):
                raise RunFailed(
                    "another process of this run has ended, and this one cannot go on alone; the message of "
                    "that process says why. The same command continues from the last complete checkpoint"
                ) from error
            raise
        if stop.anywhere(0):
            raise Interrupted(f"{title} is complete; stopped as asked, the same command continues after it")
    return summary


def _train_in_folder(session: Session, job: Job, state: Any, stop: StopRequest) -> dict[str, Any]:
    """`train` in a folder that no other process has open; `state` is None where a checkpoint was there."""
    run, title, run_dir = session.config.run, session.config.stage, session.run_dir
    # Read now that the folder is ours: another process may have trained here since `state` was made.
    newest = processes.agreed(-1 if (step := latest_step(run_dir)) is None else step)
    first = None if newest < 0 else newest
    check_not_lost(run_dir, first)
    check_same_data(run_dir, job, first)
    if job.store_heldout and processes.is_main():
        write_record(run_dir / HELDOUT, job.heldout)
    parents = {role: session.parent(role) for role in roles_of(session.config)}
    check_parents(run_dir, parents)
    if processes.is_main():
        record_parents(run_dir, parents, partial(say, session))
    checkpoints = Checkpoints(run_dir, run.keep_checkpoints, partial(in_use, run_dir), partial(say, session))
    try:
        with Recorder(run_dir, title, run.steps, first, processes.is_main()) as recorder:
            if first is not None:
                state = checkpoints.restore(first, job.program.abstract_state)
                recorder.say(f"continues from the checkpoint of step {first}")
            elif state is None:
                state = job.fresh()
            summary = _Loop(session, job, checkpoints, recorder, stop).run(state, first or 0)
    finally:
        checkpoints.close()
    if processes.is_main():
        write_json(run_dir / SUMMARY, summary)
    return summary


def check_same_data(run_dir: Path, job: Job, step: int | None) -> None:
    """A run goes on with the data it began with, and is measured on the same held-out data.

    Raises:
      UserError: one of them is another.
    """
    now = {"training": job.batches.fingerprint(), "held-out": fingerprint(job.heldout)}
    if step is not None and (run_dir / DATA).is_file():
        former = read_json(run_dir / DATA)
        for name, data in now.items():
            if former.get(name) != data:
                rows = (former.get(name) or {}).get("rows")
                raise UserError(
                    f"the {name} data of {run_dir} has changed since the run began ({rows} rows then, "
                    f"{data['rows']} now); put it back, or give another run.dir"
                )
    if processes.is_main():
        write_json(run_dir / DATA, now)


def check_not_lost(run_dir: Path, step: int | None) -> None:
    """A folder with metrics had a checkpoints folder from its first moment on.

    Raises:
      RunFailed: it is gone, and starting anew would overwrite what the run recorded.
    """
    if step is None and (run_dir / METRICS).is_file() and not (run_dir / FOLDER).is_dir():
        raise RunFailed(f"{run_dir} has metrics but no {FOLDER}/; remove the folder to start the run anew")


class _Loop:
    """The state of a running loop; `run` reads top-down."""

    def __init__(
        self, session: Session, job: Job, checkpoints: Checkpoints, recorder: Recorder, stop: StopRequest
    ) -> None:
        self.session, self.job, self.stop = session, job, stop
        self.checkpoints, self.recorder = checkpoints, recorder
        self.started = time.perf_counter()
        self.window = _Window(job.program)
        self.skipped_in_a_row = 0
        self.pending: tuple[int, Metrics] | None = None

    def run(self, state: Any, first: int) -> dict[str, Any]:
        """From the state after step `first` to the last step."""
        job, run = self.job, self.session.config.run
        self.tell_size()
        if not self.recorder.heldout():
            self.evaluate(state, first)
        rows = sharding.batch_sharding(self.session.mesh)
        iterate, compile_seconds = compile_program(
            self.session.mesh, job.program, self.session.config.mesh.zero
        )
        self.recorder.say(f"compiled the step in {compile_seconds:.1f} s")

        if self.stop.anywhere(0):
            raise Interrupted(f"stopped before step {first + 1}; the same command continues")

        self.window.restart()
        for step in range(first + 1, run.steps + 1):
            batch = processes.own_rows(partial(job.batches.at, step - 1), job.program.abstract_batch, rows)
            if self.is_over():
                self.note_pending()
            state, metrics = iterate(state, batch, *job.frozen)
            # Reading numbers waits for the device; reading the former step's keeps it busy meanwhile.
            self.note_pending()
            self.pending = (step, metrics)
            evaluating = due(step, run.eval_every, run.steps)
            stopping = self.stop.anywhere(step)
            saving = stopping or due(step, run.checkpoint_every, run.steps)
            if evaluating or saving:
                self.note_pending()
            rank = self.rank_of(self.evaluate(state, step)) if evaluating else UNRANKED
            if saving or self.checkpoints.is_best(rank):
                self.save(step, state, rank)
            if stopping:
                raise Interrupted(
                    f"stopped after step {step} of {run.steps} and saved; the same command continues"
                )
        return self.summary(compile_seconds)

    def tell_size(self) -> None:
        """Says how large the work is."""
        steps, tokens = self.session.config.run.steps, self.job.program.tokens_per_step
        self.recorder.say(
            f"{self.parameters():,} parameters; {steps:,} steps of {tokens:,} tokens, "
            f"{steps * self.job.program.flops_per_step:.3g} FLOPs in all"
        )

    def parameters(self) -> int:
        """Parameters of the exported model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.job.program.abstract_state.detach()[0]))

    def seconds(self) -> float:
        """Seconds this run has taken so far, earlier sittings included."""
        return round(self.recorder.seconds_before + time.perf_counter() - self.started, 3)

    def is_over(self) -> bool:
        """Whether the step under way has ended: its time must then not count as the next one's.

        On CPU a step may be computed where it is called.
        """
        return self.pending is not None and all(x.is_ready() for x in jax.tree.leaves(self.pending[1]))

    def note_pending(self) -> None:
        """Takes in the numbers of the step under way, if there is one."""
        if self.pending is not None:
            self.note(*self.pending)
            self.pending = None

    def note(self, step: int, metrics: Metrics) -> None:
        """Takes in one step's numbers; writes and prints when due."""
        run = self.session.config.run
        sums = {
            name: (float(total), float(count)) for name, (total, count) in jax.device_get(metrics).items()
        }
        skipped = sums["skipped"][0] > 0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.recorder.say(f"step {step}: loss or gradient is not finite; the update was skipped")
            if self.skipped_in_a_row > run.max_nonfinite_steps:
                raise RunFailed(
                    f"{self.skipped_in_a_row} updates in a row were not finite, the last at step {step}; "
                    "lower optimizer.learning_rate or look at the data"
                )
        self.window.add(sums)
        if due(step, run.log_every, run.steps):
            record = {"step": step, "seconds": self.seconds(), **self.window.means(), **self.window.speed()}
            self.recorder.write(record)
            self.recorder.say(self.window.line(step, run.steps, record))
            if (warning := self.job.warning(record)) is not None:
                self.recorder.say(f"step {step}: {warning}")
            self.window.restart()
        self.recorder.advance(step)

    def evaluate(self, state: Any, step: int) -> dict[str, float]:
        """Held-out figures, recorded."""
        started = time.perf_counter()
        heldout = self.job.evaluate(state.detach()[0])
        self.recorder.write({"step": step, "seconds": self.seconds(), "heldout": heldout})
        self.recorder.say(f"step {step} held out: " + ", ".join(f"{k} {v:.4g}" for k, v in heldout.items()))
        self.window.paused(time.perf_counter() - started)
        return heldout

    def rank_of(self, heldout: dict[str, float]) -> float:
        """What orders states by their held-out figures, larger is better; what is no number never ranks."""
        name, better = self.job.best
        figure = heldout[name] * (1 if better == "max" else -1)
        return figure if math.isfinite(figure) else UNRANKED

    def save(self, step: int, state: Any, rank: float) -> None:
        """Starts saving in the background."""
        started = time.perf_counter()
        self.checkpoints.save(step, state, rank)
        self.window.paused(time.perf_counter() - started)

    def summary(self, compile_seconds: float) -> dict[str, Any]:
        """What summary.json says."""
        heldout = self.recorder.heldout()
        logged = [record for record in self.recorder.records if "heldout" not in record]
        speeds = [record["tokens_per_second"] for record in logged[1:] or logged]
        return {
            "stage": self.session.config.stage,
            "steps": self.session.config.run.steps,
            "parameters": self.parameters(),
            "tokens": self.session.config.run.steps * self.job.program.tokens_per_step,
            "seconds": self.seconds(),
            "compile_seconds": round(compile_seconds, 2),
            "tokens_per_second": float(np.median(speeds)) if speeds else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "heldout_first": heldout[0]["heldout"],
            "heldout_last": heldout[-1]["heldout"],
            "last": logged[-1] if logged else None,
            "hardware": hardware(),
            **(self.job.facts or {}),
        }


class _Window:
    """Sums over the steps between two log lines, and how fast they went."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self.restart()

    def restart(self) -> None:
        """Begins a new window now."""
        self._sums: dict[str, tuple[float, float]] = {}
        self._steps, self._paused, self._began = 0, 0.0, time.perf_counter()

    def paused(self, seconds: float) -> None:
        """Leaves seconds that were not training out of the speed."""
        self._paused += seconds

    def add(self, sums: dict[str, tuple[float, float]]) -> None:
        """Adds one step's (sum, count) pairs, those that are finite."""
        self._steps += 1
        for name, (total, count) in sums.items():
            if math.isfinite(total):
                former = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (former[0] + total, former[1] + count)

    def means(self) -> dict[str, float]:
        """Every metric divided once."""
        return {name: total / count for name, (total, count) in self._sums.items() if count}

    def speed(self) -> dict[str, float]:
        """Steps and tokens per second, and MFU where the device's peak is known."""
        per_second = self._steps / max(time.perf_counter() - self._began - self._paused, 1e-9)
        speed = {
            "steps_per_second": per_second,
            "tokens_per_second": per_second * self._program.tokens_per_step,
        }
        if self._peak is not None:
            speed["mfu"] = per_second * self._program.flops_per_step / (self._peak * jax.device_count())
        return speed

    def line(self, step: int, steps: int, record: dict[str, Any]) -> str:
        """The console line."""
        shown = ["loss", "accuracy", "score", "kl", "gradient_norm"]
        parts = [f"{name} {record[name]:.4g}" for name in shown if name in record]
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        minutes, seconds = divmod(int((steps - step) / record["steps_per_second"]), 60)
        return f"step {step}/{steps}: " + ", ".join(parts) + f", {minutes}:{seconds:02d} to go"


def mean_over(batches: Any, step: Callable[[Any], Metrics]) -> dict[str, float]:
    """Runs an evaluation step over batches and divides the sums once."""
    total: Any = None
    for batch, _ in batches:
        sums = step(batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return {name: float(value) / float(count) for name, (value, count) in jax.device_get(total).items()}
