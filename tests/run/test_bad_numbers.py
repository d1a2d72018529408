"""Bad numbers: when, by the rule; and going back, with other data than what did it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllm import recipe
from maxllm.data.loader import ArrayBatches
from maxllm.errors import RunFailed
from maxllm.run import loop
from maxllm.run.bad_numbers import BadNumbers, Passing, Rule, rows_of
from maxllm.run.program import step_alone

ROWS, BATCH = 256, 8


def rule(**settings):
    words = [f"run.{name}={value}" for name, value in settings.items()]
    return Rule(recipe.load_recipe("pretrain/tiny_slice_cpu", words).run)


def test_skipped_updates_are_bad_when_more_than_allowed_come_in_a_row():
    judge = rule(max_nonfinite_steps=2)
    for step in (1, 2):
        judge.look(step, math.nan, True)
    judge.look(3, 1.0, False)
    for step in (4, 5):
        judge.look(step, math.nan, True)
    with pytest.raises(BadNumbers, match="3 updates in a row were not finite, the last at step 6") as bad:
        judge.look(6, math.nan, True)
    assert (bad.value.first, bad.value.last) == (4, 6)


def test_a_spike_is_measured_in_standard_deviations():
    """Losses alternate between 1 and 3: mean 2, standard deviation sqrt(n / (n - 1)), 1.0127 of 40."""
    spread = math.sqrt(40 / 39)
    for loss, spikes in ((2 + 3 * spread - 1e-9, False), (2 + 3 * spread + 1e-9, True)):
        judge = rule(spike=3)
        for step in range(1, 41):
            judge.look(step, 1.0 + 2 * (step % 2), False)
        if not spikes:
            judge.look(41, loss, False)
            continue
        with pytest.raises(BadNumbers, match="the loss of step 41 is"):
            judge.look(41, loss, False)


def test_too_few_steps_have_no_spikes():
    judge = rule(spike=3)
    for step in range(1, 20):
        judge.look(step, 1.0 + step % 2, False)
    judge.look(20, 1e9, False)


def test_batches_that_are_passed_over_by_hand():
    passing = Passing(ArrayBatches(np.arange(ROWS), BATCH, 0), [(2, 4), (7, 8)])
    assert [passing.number(step) for step in range(7)] == [0, 1, 4, 5, 6, 8, 9]


@pytest.fixture
def poisoned(build):
    """poisoned(batches, *words): a session and a job of 20 steps whose loss is not finite on some batches."""

    def make(bad, *words):
        session, job = build(
            {}, "run.steps=20", "run.max_nonfinite_steps=1", "run.checkpoint_every=5", *words,
            rows=np.arange(ROWS, dtype=np.int32),
        )  # fmt: skip
        poison = np.isin(np.arange(ROWS), [job.batches.at(number)[0] for number in bad])

        def step(state, batch):
            skipped = jnp.asarray(poison)[batch].any().astype(jnp.float32)
            one = jnp.float32(1)
            seen = state.params["w"] + (1 - skipped) * batch.sum().astype(jnp.float32)
            return state.replace(step=state.step + 1, params={"w": seen}), {
                "loss": (jnp.where(skipped > 0, jnp.nan, 1.0), one),
                "skipped": (skipped, one),
            }

        program = job.program
        parts = step_alone(step, program.abstract_state, program.abstract_batch)
        return session, dataclasses.replace(job, program=dataclasses.replace(program, **parts))

    return make


def test_a_run_stops_and_keeps_the_rows(poisoned):
    session, job = poisoned([11, 12])
    with pytest.raises(RunFailed, match=r"2 updates in a row were not finite, the last at step 13; the rows"):
        loop.train(job)
    for step in (12, 13):
        kept = np.load(rows_of(session.folder, step))
        np.testing.assert_array_equal(kept["rows"], job.batches.at(step - 1))


def test_a_run_goes_back_and_passes_over_the_data(poisoned, capsys):
    """From step 10: batches 10, 11 and 12 are left out, as the sum of all numbers that were used shows."""
    session, job = poisoned([11, 12], "run.on_bad_numbers=roll_back")
    summary = loop.train(job)
    assert summary["steps"] == 20 and session.folder.latest_step() == 20
    said = capsys.readouterr().err
    assert "Goes back to the checkpoint of step 10, and passes over the 3 batches from there" in said
    passed = json.loads((session.folder.path / "passed.json").read_text())["passed"]
    assert [(entry["first"], entry["after"], entry["step"]) for entry in passed] == [(10, 13, 13)]
    used = [*range(10), *range(13, 23)]
    expected = sum(int(job.batches.at(number).sum()) for number in used)
    from maxllm.run.restore import restore

    state = restore(session.folder.checkpoint(20), job.program.abstract_state)
    assert jax.tree.leaves(state.params)[0][0] == expected  # below 2^24: float32 holds it


def test_a_run_that_was_stopped_may_go_back_later(poisoned):
    with pytest.raises(RunFailed):
        loop.train(poisoned([11, 12])[1])
    _, job = poisoned([11, 12], "run.on_bad_numbers=roll_back")
    assert loop.train(job)["steps"] == 20


def test_it_goes_back_only_so_often(poisoned):
    _, job = poisoned(list(range(11, 31)), "run.on_bad_numbers=roll_back", "run.max_roll_backs=2")
    with pytest.raises(RunFailed, match=r"after 2 roll-backs \(run\.max_roll_backs\)"):
        loop.train(job)


def test_without_a_checkpoint_there_is_nowhere_to_go(poisoned):
    _, job = poisoned([1, 2], "run.on_bad_numbers=roll_back")
    with pytest.raises(RunFailed, match="there is no checkpoint from before"):
        loop.train(job)
