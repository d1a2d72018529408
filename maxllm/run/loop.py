"""The training loop that every stage shares: resume, step, evaluate, record, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from maxllm.data.loader import Batches, fingerprint
from maxllm.data.store import write_record
from maxllm.errors import Interrupted, UserError
from maxllm.folder import METRICS, RunFolder
from maxllm.parallel import processes, sharding
from maxllm.parallel.mesh import platform_of
from maxllm.parallel.settings import described
from maxllm.phases import PHASES, Phase
from maxllm.rank import UNRANKED
from maxllm.records import Metrics
from maxllm.run.bad_numbers import BadNumbers, Rule, passing, roll_back
from maxllm.run.checkpoint import Checkpoints, Keep
from maxllm.run.fall_back import check_not_lost, restore_newest
from maxllm.run.faults import StopRequest, stop_on_signals
from maxllm.run.goodput import Accounts, reckon
from maxllm.run.heldout import Evaluate
from maxllm.run.machine import hardware, peak_rss_bytes
from maxllm.run.observers import Observers, observers_of
from maxllm.run.origin import changes_since, origin_of, read_origin
from maxllm.run.parents import check_parents, in_use, record_parents, roles_of
from maxllm.run.patience import STOPPED_EARLY, in_vain, is_complete
from maxllm.run.program import Program, compile_program
from maxllm.run.session import Session, open_folder, say
from maxllm.run.window import Sums, Window


@dataclass(frozen=True)
class Job:
    """What is particular to a stage."""

    session: Session
    """The run, with as many steps as the rows make where its recipe gives epochs."""
    program: Program
    """What is compiled."""
    fresh: Callable[[], Any]
    """Makes the state a new run starts from; not called when a checkpoint is there."""
    batches: Batches[Any]
    """The data, in order."""
    heldout: Any
    """A record of arrays and lists of texts that `evaluate` reads: part of what a run is."""
    evaluate: Evaluate
    """Measures the exported parameters of a state on held-out rows."""
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


WINDOW = "window"
"""What a checkpoint calls the sums of the log line that was open."""


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every `every` steps is done after `step`; the last step always counts."""
    return step % every == 0 or step == total


def finished(session: Session) -> dict[str, Any] | None:
    """The summary of a run that is complete already, or None; one that is given more steps is not."""
    summary = session.folder.summary()
    return summary if summary and is_complete(summary, session.config.run) else None


def train(job: Job) -> dict[str, Any]:
    """Runs the stage to its last step, from wherever it was interrupted; returns summary.json's content.

    Resuming, in this order:
      1. the newest complete checkpoint gives state and step (none: `job.fresh()`, step 0);
      2. metrics.jsonl is cut back to that step;
      3. the next batch is the one of that step, for a batch is a function of (seed, step).

    Nothing is written before the first state is there: what cannot start leaves no folder behind.

    Raises:
      Interrupted: SIGTERM or Ctrl-C came, and the state is saved; or another process of the run has ended.
      RunFailed: too many consecutive updates were not finite, or the run's checkpoints are gone or damaged.
      UserError: another process is training in the same folder, or the run began from other data or parents.
    """
    session = job.session
    title = session.config.stage
    PHASES.enter(Phase.PREPARING, 0)
    with stop_on_signals() as stop:
        try:
            state = job.fresh() if session.folder.latest_step() is None else None
            with open_folder(session):
                summary = finished(session) or _train_in_folder(session, job, state, stop)
        except Exception as error:
            if processes.peer_lost(error):
                PHASES.enter(Phase.BEREAVED)
                raise Interrupted(
                    "another process of this run has ended, and this one cannot go on alone; the message of "
                    "that process says why. The same command continues from the last complete checkpoint"
                ) from error
            raise
        if stop.anywhere(0):
            raise Interrupted(f"{title} is complete; stopped as asked, the same command continues after it")
    PHASES.restart()
    return summary


def _train_in_folder(session: Session, job: Job, state: Any, stop: StopRequest) -> dict[str, Any]:
    """`train` in a folder that no other process has open; `state` is None where a checkpoint was there."""
    while True:
        batches = passing(session.folder, job.batches)
        try:
            return _from_newest(session, replace(job, batches=batches), state, stop)
        except BadNumbers as bad:
            state = None
            roll_back(session.folder, batches, bad, session.config.run, partial(say, session))


def _from_newest(session: Session, job: Job, state: Any, stop: StopRequest) -> dict[str, Any]:
    """From the newest checkpoint, or the fresh state, to the last step."""
    run, folder, main = session.config.run, session.folder, processes.is_main()
    # Read now that the folder is ours: another process may have trained here since `state` was made.
    newest = processes.agreed(-1 if (step := folder.latest_step()) is None else step)
    first = None if newest < 0 else newest
    if first is None:
        check_not_lost(folder)
    data = check_same_data(folder, job, first)
    if job.store_heldout and main:
        write_record(folder.heldout, job.heldout)
    parents = {role: session.parent(role) for role in roles_of(session.config)}
    check_parents(folder, parents)
    if main:
        record_parents(folder, parents, partial(say, session))
    if first is not None:
        with PHASES.during(Phase.RESTORING):
            first, state = restore_newest(
                folder, first, job.program.abstract_state, run.fall_back, partial(say, session)
            )
    elif state is None:
        state = job.fresh()
    origin = origin_of(session, data)
    remembered = {} if first is None else read_origin(folder.checkpoint(first))
    checkpoints = Checkpoints(folder, Keep.of(run), partial(in_use, folder), partial(say, session), origin)
    try:
        former = former_records(session, first)
        listening = observers_of(folder, session.config.stage, run.steps, first or 0, former, main)
        if main:
            listening.add(Accounts(folder, first or 0))
        with closing(listening) as observers:
            if first is not None:
                observers.say(f"continues from the checkpoint of step {first}")
                if (changes := changes_since(remembered, origin)) is not None:
                    observers.say(changes)
            loop = _Loop(session, job, checkpoints, observers, former, stop, remembered.get(WINDOW))
            summary = loop.run(state, first or 0)
        PHASES.enter(Phase.SAVING)
    except Exception as error:
        if not processes.peer_lost(error):  # else the save under way waits for the one that is gone
            checkpoints.close()
        raise
    checkpoints.close()
    PHASES.enter(Phase.ENDING)
    if main:
        summary["goodput"] = reckon(folder.sittings())
        folder.write_summary(summary)
    return summary


def check_same_data(folder: RunFolder, job: Job, step: int | None) -> dict[str, Any]:
    """A run goes on with the data it began with, and is measured on the same held-out data.

    Returns:
      {"training", "held-out"}: fingerprints.

    Raises:
      UserError: one of them is another.
    """
    now = {"training": job.batches.fingerprint(), "held-out": fingerprint(job.heldout)}
    if step is not None and (former := folder.data()):
        for name, data in now.items():
            if former.get(name) != data:
                rows = (former.get(name) or {}).get("rows")
                raise UserError(
                    f"the {name} data of {folder} has changed since the run began ({rows} rows then, "
                    f"{data['rows']} now); put it back, or give another run.dir"
                )
    if processes.is_main():
        folder.write_data(now)
    return now


def former_records(session: Session, step: int | None) -> list[dict[str, Any]]:
    """The records up to the step that a run continues from; none where it begins anew."""
    if step is None:
        return []
    if not session.folder.has_metrics:
        gone = f"{session.folder}/{METRICS}"
        say(session, f"{gone} is gone, and with it what was recorded up to step {step}")
    return [record for record in session.folder.records() if record["step"] <= step]


class _Loop:
    """The state of a running loop; `run` reads top-down."""

    def __init__(
        self,
        session: Session,
        job: Job,
        checkpoints: Checkpoints,
        observers: Observers,
        former: list[dict[str, Any]],
        stop: StopRequest,
        window: Sums | None = None,
    ) -> None:
        self.session, self.job, self.stop = session, job, stop
        self.checkpoints, self.observers = checkpoints, observers
        self.records = list(former)
        self.seconds_before: float = max((record["seconds"] for record in former), default=0.0)
        self.started = time.perf_counter()
        self.window, self.open_window = Window(job.program), window
        self.rule = Rule(session.config.run)
        self.pending: tuple[int, Metrics, float] | None = None

    def run(self, state: Any, first: int) -> dict[str, Any]:
        """From the state after step `first` to the last step."""
        job, run = self.job, self.session.config.run
        self.tell_size()
        if not self.evaluations():
            self.evaluate(state, first)
        rows = sharding.batch_sharding(self.session.mesh)
        with PHASES.during(Phase.COMPILING):
            iterate, compile_seconds = compile_program(
                self.session.mesh,
                job.program,
                self.session.config.mesh.zero,
                self.session.config.launch,
            )
        self.observers.say(f"compiled the step in {compile_seconds:.1f} s{self.told_libraries()}")

        if self.stop.anywhere(0):
            raise Interrupted(f"stopped before step {first + 1}; the same command continues")

        self.window.restart(self.open_window)
        last, vain = first, self.in_vain()
        for step in () if vain else range(first + 1, run.steps + 1):
            PHASES.enter(Phase.LOADING, step)
            asked = time.perf_counter()
            batch = processes.own_rows(partial(job.batches.at, step - 1), job.program.abstract_batch, rows)
            waited = time.perf_counter() - asked
            PHASES.enter(Phase.COMPUTING)
            if self.is_over():
                self.note_pending()
            state, metrics = iterate(state, batch, *job.frozen)
            # Reading numbers waits for the device; reading the former step's keeps it busy meanwhile.
            self.note_pending()
            self.pending = (step, metrics, waited)
            evaluating = due(step, run.eval_every, run.steps)
            stopping = self.stop.anywhere(step)
            saving = stopping or due(step, run.checkpoint_every, run.steps)
            if evaluating or saving:
                self.note_pending()
            rank = self.rank_of(self.evaluate(state, step)) if evaluating else UNRANKED
            last, vain = step, evaluating and self.in_vain()
            if saving or vain or self.checkpoints.is_best(rank):
                self.save(step, state, rank)
            if stopping:
                raise Interrupted(
                    f"stopped after step {step} of {run.steps} and saved; the same command continues"
                )
            if vain:
                break
        if vain and last < run.steps:
            self.observers.say(f"step {last}: no gain for {run.patience} evaluations, which ends the run")
            return self.summary(compile_seconds, last) | {STOPPED_EARLY: run.patience}
        return self.summary(compile_seconds, run.steps)

    def tell_size(self) -> None:
        """Says how large the work is."""
        steps, tokens = self.session.config.run.steps, self.job.program.tokens_per_step
        self.observers.say(
            f"{self.job.program.told_parameters()}; {steps:,} steps of {tokens:,} tokens, "
            f"{steps * self.job.program.flops_per_step:.3g} FLOPs in all"
        )

    def told_libraries(self) -> str:
        """What XLA and the libraries below it were told, where that is of interest."""
        platform, launch = platform_of(self.session.mesh), self.session.config.launch
        of_recipe = launch.compiler_options or launch.variables
        return f", with {described(platform, launch)}" if platform != "cpu" or of_recipe else ""

    def seconds(self) -> float:
        """Seconds this run has taken so far, earlier sittings included."""
        return round(self.seconds_before + time.perf_counter() - self.started, 3)

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

    def note(self, step: int, metrics: Metrics, waited: float) -> None:
        """Takes in one step's numbers, and the seconds it waited for its batch; tells them when due."""
        run = self.session.config.run
        sums = {
            name: (float(total), float(count)) for name, (total, count) in jax.device_get(metrics).items()
        }
        skipped = sums["skipped"][0] > 0
        if skipped:
            self.observers.say(f"step {step}: loss or gradient is not finite; the update was skipped")
        total, weight = sums["loss"]
        self.rule.look(step, total / weight if weight else math.nan, skipped)
        self.window.add(sums | {"data_seconds": (waited, 1.0)})
        if due(step, run.log_every, run.steps):
            record = {"step": step, "seconds": self.seconds(), **self.window.means(), **self.window.speed()}
            self.records.append(record)
            self.observers.step(record)
            if (warning := self.job.warning(record)) is not None:
                self.observers.say(f"step {step}: {warning}")
            self.window.restart()
        self.observers.advance(step)

    def evaluate(self, state: Any, step: int) -> dict[str, float]:
        """Held-out figures, recorded."""
        started = time.perf_counter()
        with PHASES.during(Phase.EVALUATING):
            heldout, samples = self.job.evaluate(state.detach()[0])
        record = {"step": step, "seconds": self.seconds(), "heldout": heldout}
        if samples:
            record["samples"] = list(samples)
        self.records.append(record)
        self.observers.heldout(record)
        self.window.paused(time.perf_counter() - started)
        return heldout

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of held-out figures, in order."""
        return [record for record in self.records if "heldout" in record]

    def in_vain(self) -> bool:
        """Whether the recipe's patience has run out."""
        ranks = [self.rank_of(record["heldout"]) for record in self.evaluations()]
        return in_vain(ranks, self.session.config.run)

    def rank_of(self, heldout: dict[str, float]) -> float:
        """What orders states by their held-out figures, larger is better; what is no number never ranks."""
        name, better = self.job.best
        figure = heldout[name] * (1 if better == "max" else -1)
        return figure if math.isfinite(figure) else UNRANKED

    def save(self, step: int, state: Any, rank: float) -> None:
        """Starts saving in the background."""
        started = time.perf_counter()
        with PHASES.during(Phase.SAVING):
            self.checkpoints.save(step, state, rank, {WINDOW: self.window.open()})
        self.window.paused(time.perf_counter() - started)

    def summary(self, compile_seconds: float, steps: int) -> dict[str, Any]:
        """What summary.json says of a run that ended after so many steps."""
        heldout = self.evaluations()
        logged = [record for record in self.records if "heldout" not in record]
        speeds = [record["tokens_per_second"] for record in logged[1:] or logged]
        return {
            "stage": self.session.config.stage,
            "steps": steps,
            "parameters": self.job.program.parameters,
            "trained_parameters": self.job.program.trained_parameters,
            "tokens": steps * self.job.program.tokens_per_step,
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
