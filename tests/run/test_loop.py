"""The training loop on a state of one array, with evaluations whose figures are written down here."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from maxllm.data.loader import ArrayBatches
from maxllm.errors import UserError
from maxllm.folder import METRICS, SUMMARY
from maxllm.run import loop
from maxllm.run.heldout import Measured
from maxllm.run.observers import Observer, Observers
from maxllm.run.restore import restore

STEPS = 12
"""Of a run of `build`, tests/run/conftest.py."""


def test_a_state_that_is_the_best_so_far_is_saved_whenever_it_is_evaluated(build):
    """Evaluations and checkpoints fall on different steps; the best of all evaluations is kept."""
    session, job = build({3: 0.5, 6: 0.2, 9: 0.4, 12: 0.3}, "run.eval_every=3", "run.checkpoint_every=5")
    loop.train(job)
    assert session.folder.best_step() == 6
    assert session.folder.steps() == [6, 10, 12]


def test_the_loop_asks_for_rows_of_each_device_and_for_none_twice(build):
    """Eight devices of one row each; what arrives is the batch of that step."""
    session, job = build({}, f"run.eval_every={STEPS}", f"run.log_every={STEPS}")
    asked = []

    class Asked(ArrayBatches):
        def at(self, step, rows=slice(None)):
            asked.append((step, rows.start, rows.stop))
            return super().at(step, rows)

    loop.train(dataclasses.replace(job, batches=Asked(job.batches.rows, 8, 0)))
    assert sorted(asked) == [(number, row, row + 1) for number in range(STEPS) for row in range(8)]
    [loss] = [record["loss"] for record in session.folder.records() if "loss" in record]
    assert loss == np.mean([job.batches.at(number).sum() for number in range(STEPS)])


def test_what_is_no_number_never_ranks(build):
    figures = {2: 0.1, 4: math.nan, 6: 0.8, 8: -math.inf, 10: 0.7, 12: math.nan}
    session, job = build(figures, "run.eval_every=2", "run.checkpoint_every=2", "run.keep_checkpoints=1")
    loop.train(job)
    assert session.folder.best_step() == 2
    assert session.folder.steps() == [2, 12]


def test_a_run_of_nothing_but_nan_has_no_best(build):
    figures = dict.fromkeys(range(STEPS + 1), math.nan)
    session, job = build(figures, "run.eval_every=2", "run.checkpoint_every=6")
    loop.train(job)
    assert session.folder.best_step() is None and session.folder.steps()[-1] == STEPS


def test_a_continued_run_knows_the_best_of_before(build):
    words = ("run.eval_every=2", "run.checkpoint_every=6")
    session, job = build({2: 0.1, 8: RuntimeError("power cut")}, *words)
    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(job)
    session, job = build({2: 0.1, 8: 0.5}, *words)
    loop.train(job)
    assert session.folder.best_step() == 2 and 8 not in session.folder.steps()


@pytest.mark.parametrize("at_the_end", [True, False])
def test_metrics_that_are_gone_are_told_and_not_needed(build, capsys, at_the_end):
    figures = {} if at_the_end else {8: RuntimeError("power cut")}
    session, job = build(figures, "run.eval_every=4", "run.checkpoint_every=6")
    if at_the_end:
        loop.train(job)
        (session.folder.path / SUMMARY).unlink()
    else:
        with pytest.raises(RuntimeError):
            loop.train(job)
    (session.folder.path / METRICS).unlink()
    session, job = build({}, "run.eval_every=4", "run.checkpoint_every=6")
    capsys.readouterr()
    summary = loop.train(job)
    assert "metrics.jsonl is gone" in capsys.readouterr().err
    assert summary["heldout_last"] == {"loss": 9.0}
    assert (summary["last"] is None) == at_the_end


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_anew(build):
    """Both find an empty folder; the other trains to its end while this one still reads its start."""
    session, job = build({}, "run.eval_every=4")
    fresh = job.fresh

    def slow():
        object.__setattr__(job, "fresh", fresh)
        loop.train(job)
        return fresh()

    object.__setattr__(job, "fresh", slow)
    before = loop.train(job)
    records = [record["step"] for record in session.folder.records()]
    assert records.count(STEPS) == 2 and before["steps"] == STEPS  # one log line, one evaluation


def test_a_run_that_another_process_began_meanwhile_is_continued(build, capsys):
    _, job = build({8: RuntimeError("killed")}, "run.eval_every=4", "run.checkpoint_every=6")
    _calm, good = build({}, "run.eval_every=4", "run.checkpoint_every=6")
    fresh = good.fresh

    def slow():
        with pytest.raises(RuntimeError):
            loop.train(job)
        return fresh()

    object.__setattr__(good, "fresh", slow)
    loop.train(good)
    assert "continues from the checkpoint of step 6" in capsys.readouterr().err


def test_a_run_goes_on_with_other_settings_of_how_it_computes_and_records_them(build, capsys):
    words = ("run.eval_every=4", "run.checkpoint_every=6", "batch.microbatches=2", "model.remat=full")
    session, job = build({8: RuntimeError("killed")}, *words)
    with pytest.raises(RuntimeError):
        loop.train(job)
    assert not (session.folder.path / "changes.jsonl").exists()
    session, job = build({}, *words[:2], "batch.microbatches=4", "model.remat=full", "model.keep=['q']")
    capsys.readouterr()
    loop.train(job)
    lines = (session.folder.path / "changes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 6, "setting": "batch.microbatches", "from": 2, "to": 4},
        {"step": 6, "setting": "model.keep", "from": [], "to": ["q"]},
    ]
    assert "from step 6 on with batch.microbatches=4 instead of 2" in capsys.readouterr().err


def test_what_would_change_more_than_rounding_is_still_another_run(build):
    _, job = build({8: RuntimeError("killed")}, "run.eval_every=4", "run.checkpoint_every=6")
    with pytest.raises(RuntimeError):
        loop.train(job)
    _, job = build({}, "run.eval_every=4", "run.checkpoint_every=6", "model.dtype=bfloat16")
    with pytest.raises(UserError, match=r"model\.dtype=float32, not bfloat16"):
        loop.train(job)


def test_a_run_that_begins_anew_has_changed_nothing(build):
    """It was stopped before its first checkpoint."""
    session, job = build({4: RuntimeError("killed")}, "run.eval_every=4")
    with pytest.raises(RuntimeError):
        loop.train(job)
    session, job = build({}, "run.eval_every=4", "model.remat=full")
    loop.train(job)
    assert not (session.folder.path / "changes.jsonl").exists()


@pytest.mark.parametrize("what", ["training", "held-out"])
def test_changed_data_is_another_run(build, what):
    words = ("run.eval_every=4", "run.checkpoint_every=6")
    _, job = build({8: RuntimeError("killed")}, *words)
    with pytest.raises(RuntimeError):
        loop.train(job)
    rows = np.arange(64, dtype=np.int32)
    rows[37] += what == "training"
    _, job = build({}, *words, rows=rows, answers=["no" if what == "held-out" else "yes"])
    with pytest.raises(UserError, match=f"the {what} data of .* has changed"):
        loop.train(job)


def test_a_half_written_checkpoint_goes_before_anything_is_written(build, monkeypatch):
    """It may be what fills the disk: the first write after a full disk would fail."""
    session, job = build({}, "run.eval_every=12")
    unfinished = session.folder.path / "checkpoints" / "6.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "big").write_bytes(b"x")

    from maxllm import folder as module

    write = module.write_bytes

    def only_with_room(path, content):
        if unfinished.exists():
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(module, "write_bytes", only_with_room)
    loop.train(job)
    assert session.folder.steps()[-1] == STEPS


class Device:
    """A device whose steps take a second of a clock that stands still but for it, and its results."""

    def __init__(self, waits_in_call):
        self.now, self.done, self.waits_in_call = 0.0, 0.0, waits_in_call

    def step(self, state, batch):
        self.done = max(self.now, self.done) + 1.0
        if self.waits_in_call:
            self.now = self.done
        result = Result(self, self.done)
        nothing = jnp.float32(0)
        return state, {"loss": (result, result), "skipped": (nothing, nothing + 1)}


class Result:
    """A number that is there when its step is done."""

    def __init__(self, device, done):
        self.device, self.done = device, done

    def is_ready(self):
        return self.device.now >= self.done

    def __array__(self, dtype=None, copy=None):
        self.device.now = max(self.device.now, self.done)
        return np.float32(1)


@pytest.mark.parametrize("waits_in_call", [True, False], ids=["computed in the call", "asynchronous"])
@pytest.mark.parametrize(
    ("log", "evaluate", "save"), [(2, 3, 5), (3, 2, 12), (2, 1, 1), (4, 5, 3), (1, 12, 12)]
)
def test_speed_is_that_of_the_steps_whatever_stands_between_them(
    build, monkeypatch, waits_in_call, log, evaluate, save
):
    """Evaluations take 100 seconds, checkpoints 10; every log line says one step a second."""
    device = Device(waits_in_call)
    words = (f"run.log_every={log}", f"run.eval_every={evaluate}", f"run.checkpoint_every={save}")
    session, job = build({}, *words)

    def slow(state):
        device.now += 100.0
        return Measured({"loss": 1.0})

    object.__setattr__(job, "evaluate", slow)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(loop, "compile_program", lambda *args, **options: (device.step, 0.0))

    class Slow(loop.Checkpoints):
        def save(self, *args):
            device.now += 10.0

    monkeypatch.setattr(loop, "Checkpoints", Slow)
    loop.train(job)
    records = [record for record in session.folder.records() if "loss" in record]
    assert [record["steps_per_second"] for record in records] == [1.0] * (STEPS // log)


def test_seconds_waited_for_data_are_those_of_the_steps_of_the_line(build, monkeypatch):
    """Step n waits n seconds for its batch; lines are about 3 steps, and evaluations stand between them."""
    device = Device(waits_in_call=False)
    session, job = build({}, "run.log_every=3", "run.eval_every=2", "run.checkpoint_every=12")

    class Slow(ArrayBatches):
        def at(self, step, rows=slice(None)):
            device.now += (step + 1.0) / 8  # each of the eight devices asks for its row
            return super().at(step, rows)

    object.__setattr__(job, "batches", Slow(job.batches.rows, 8, 0))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(loop, "compile_program", lambda *args, **options: (device.step, 0.0))
    loop.train(job)
    lines = [record for record in session.folder.records() if "loss" in record]
    assert [(line["step"], line["data_seconds"]) for line in lines] == [
        (3, 2.0),
        (6, 5.0),
        (9, 8.0),
        (12, 11.0),
    ]


class Listener(Observer):
    """Writes down what it is told."""

    def __init__(self):
        self.said, self.steps, self.lines, self.figures, self.closed = [], [], [], [], 0

    def say(self, line):
        self.said.append(line)

    def advance(self, step):
        self.steps.append(step)

    def step(self, record):
        self.lines.append(record)

    def heldout(self, record):
        self.figures.append(record)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("power_cut", [False, True])
def test_observers_are_told_everything_and_closed_whatever_happens(build, monkeypatch, capsys, power_cut):
    """Where nobody but two listeners is told, nothing is printed and no metrics.jsonl is written."""
    listeners = [Listener(), Listener()]
    monkeypatch.setattr(loop, "observers_of", lambda *args: Observers(listeners))
    figures = {8: RuntimeError("power cut")} if power_cut else {}
    session, job = build(figures, "run.eval_every=4", "run.log_every=3", "run.checkpoint_every=12")
    if power_cut:
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(job)
    else:
        summary = loop.train(job)
        assert summary["last"] == listeners[0].lines[-1]
    first, second = listeners
    assert vars(first) == vars(second) and first.closed == 1
    last = 8 if power_cut else STEPS
    assert first.steps == list(range(1, last + 1))
    assert [record["step"] for record in first.lines] == list(range(3, last + 1, 3))
    assert [record["step"] for record in first.figures] == [0, 4, *([] if power_cut else [8, 12])]
    assert any("parameters" in line for line in first.said)
    assert not session.folder.has_metrics and capsys.readouterr().err == ""


def test_a_complete_run_is_given_more_steps(build):
    """The state, and what was recorded, go on; summary.json is of the whole."""
    constant = "optimizer.schedule=constant"
    loop.train(build({}, constant)[1])
    session, job = build({}, constant, "run.steps=20")
    assert loop.finished(session) is None
    summary = loop.train(job)
    assert summary["steps"] == 20 and session.folder.latest_step() == 20
    state = restore(session.folder.checkpoint(20), job.program.abstract_state)
    assert float(state.params["w"][0]) == 20
    assert [record["step"] for record in session.folder.records() if "heldout" in record] == [0, 12, 20]
    [change] = (session.folder.path / "changes.jsonl").read_text().splitlines()
    assert json.loads(change) == {"step": 12, "setting": "run.steps", "from": 12, "to": 20}
