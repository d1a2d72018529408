"""Being asked to stop: how often several processes ask each other, by a clock that the tests turn."""

import numpy as np
import pytest

from maxllm.run import faults


@pytest.fixture
def agreements(monkeypatch):
    """agreements(seconds_of, steps): the steps after which a process asks another, whose steps take
    `seconds_of(step)` seconds; its own clock stands still."""

    def run(seconds_of, steps):
        monkeypatch.setattr(faults.jax, "process_count", lambda: 2)
        monkeypatch.setattr(faults.time, "perf_counter", lambda: 0.0)
        asked, taken = [], []

        def gathered(values):
            asked.append(step)
            other = [False, sum(taken) / max(len(taken), 1)]
            taken.clear()
            return np.array([values, other], np.float32)

        monkeypatch.setattr(faults.processes, "from_all", gathered)
        request = faults.StopRequest()
        for step in range(steps + 1):
            taken += [seconds_of(step)] if step else []
            assert not request.anywhere(step)
        return asked

    return run


def test_long_steps_are_agreed_on_one_by_one(agreements):
    assert agreements(lambda step: 30.0, 6) == [0, 1, 2, 3, 4, 5, 6]


def test_short_steps_are_agreed_on_about_once_a_second_which_is_approached_by_doubling(agreements):
    """At 1/64 s a step, 64 steps are a second: 1, 2, 4, … steps apart, and then always 64."""
    assert agreements(lambda step: 1 / 64, 256) == [0, 1, 3, 7, 15, 31, 63, 127, 191, 255]


def test_steps_that_become_long_are_agreed_on_one_by_one_from_the_next_time_on(agreements):
    assert agreements(lambda step: 1 / 64 if step <= 10 else 30.0, 18) == [0, 1, 3, 7, 15, 16, 17, 18]


def test_all_stop_where_one_was_asked(monkeypatch):
    """The other one was asked, this one was not."""
    monkeypatch.setattr(faults.jax, "process_count", lambda: 2)
    monkeypatch.setattr(faults.processes, "from_all", lambda values: np.array([values, [True, 1.0]]))
    assert faults.StopRequest().anywhere(1)


def test_a_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setattr(faults.processes, "from_all", lambda values: pytest.fail("there is nobody to ask"))
    request = faults.StopRequest()
    assert not request.anywhere(1)
    request.asked = True
    assert request.anywhere(2)
