"""What a run's time was spent on: accounts of sittings, reckoned by hand."""

import time

import pytest

from maxllm.errors import UserError
from maxllm.phases import PHASES, Phase, Phases, moment_in, shared_memory
from maxllm.run import loop
from maxllm.run.goodput import reckon


def sitting(name, began, first, step, **seconds):
    return {"sitting": name, "began": began, "first": first, "step": step, "seconds": seconds}


def test_three_sittings_by_hand():
    """The first did 10 steps in 100 s, of which two were lost; 20 s later the second began at step 8, and
    ended in order; the third begins at once. 2 steps of 10 s are repeated."""
    accounts = [
        sitting("a", 0.0, 0, 5, COMPUTING=50.0, PREPARING=10.0),
        sitting("a", 0.0, 0, 10, COMPUTING=100.0, PREPARING=10.0, SAVING=5.0),  # the newer line counts
        sitting("b", 135.0, 8, 20, COMPUTING=60.0, RESTORING=5.0, LOADING=3.0),
        sitting("c", 203.0, 20, 30, COMPUTING=40.0, COMPILING=7.0, EVALUATING=2.0, ENDING=1.0),
    ]
    found = reckon(accounts)
    seconds = {what: value for what, value in found["seconds"].items() if value}
    assert seconds == {
        "productive steps": 180.0,
        "repeated steps": 20.0,
        "preparing": 10.0,
        "compiling": 7.0,
        "restoring": 5.0,
        "evaluating": 2.0,
        "saving": 5.0,
        "waiting for data": 3.0,
        "ending": 1.0,
        "down": 20.0,
    }
    assert found["sittings"] == 3 and found["goodput"] == 180 / 253
    assert reckon([]) is None


def test_a_sitting_that_did_no_step_repeats_none():
    found = reckon([sitting("a", 0.0, 4, 4, PREPARING=3.0), sitting("b", 5.0, 4, 6, COMPUTING=2.0)])
    assert found["seconds"]["repeated steps"] == 0 and found["seconds"]["down"] == 2.0


def test_a_run_accounts_for_all_of_its_time(build):
    PHASES.restart()
    began = time.monotonic()
    session, job = build({})
    summary = loop.train(job)
    took = time.monotonic() - began
    newest = list(session.folder.sittings())[-1]
    assert (newest["first"], newest["step"]) == (0, 12)
    assert sum(newest["seconds"].values()) <= took
    assert newest["seconds"]["COMPUTING"] > 0 and newest["seconds"]["SAVING"] > 0
    assert 0 < summary["goodput"]["goodput"] < 1 and summary["goodput"]["sittings"] == 1


def test_a_line_that_a_kill_cut_short_is_left_out(build):
    session, job = build({})
    loop.train(job)
    file = session.folder.path / "sittings.jsonl"
    whole = list(session.folder.sittings())
    file.write_bytes(file.read_bytes() + b'{"sitting": "x", "beg')
    assert list(session.folder.sittings()) == whole
    file.write_bytes(b"{}\n" + file.read_bytes())
    with pytest.raises(UserError, match=r"sittings\.jsonl line 1 is damaged"):
        list(session.folder.sittings())


def test_a_ledger_begun_anew_has_nothing_of_the_former_run(monkeypatch):
    """Not even what passed since its last phase began."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    phases = Phases()
    phases.enter(Phase.ENDING, 7)
    now += 5
    phases.restart()
    assert sum(phases.seconds().values()) == 0 and phases.step == 0
    now += 2
    assert phases.seconds()[Phase.PREPARING] == 2


def test_phases_follow_each_other_and_within_each_other():
    memory = shared_memory()
    phases = Phases(memory)
    phases.enter(Phase.COMPUTING, 7)
    with phases.during(Phase.SAVING):
        assert (moment_in(memory).phase, moment_in(memory).step) == (Phase.SAVING, 7)
    assert moment_in(memory).phase is Phase.COMPUTING
    with pytest.raises(ValueError), phases.during(Phase.EVALUATING):
        raise ValueError
    assert moment_in(memory).phase is Phase.EVALUATING  # where it happened
