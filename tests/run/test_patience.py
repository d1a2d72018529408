"""A run ends where its held-out figure gains nothing any more."""

import math
import shutil

import pytest

from maxllm.config.run import RunConfig
from maxllm.run import loop
from maxllm.run.patience import in_vain

WORDS = ("run.eval_every=2", "run.checkpoint_every=20", "run.patience=2", "run.min_gain=0.1")


@pytest.mark.parametrize(
    ("ranks", "patience", "gain", "wanted"),
    [
        ([1, 2, 3], 1, 0, False),
        ([3, 2], 1, 0, True),
        ([3, 2], 2, 0, False),
        ([3, 2, 3], 2, 0, True),  # as good as the best is no gain
        ([3, 3.05, 3.09, 3.2], 2, 0.1, False),  # small gains add up against the best that counted
        ([3, 3.05, 3.09], 2, 0.1, True),
        ([3, 5, 4, 4.5], 3, 0, False),
        ([-math.inf, -math.inf], 2, 0, True),
        ([9, 1, 1, 1], None, 0, False),
    ],
)
def test_when_it_is_in_vain(ranks, patience, gain, wanted):
    assert in_vain(ranks, RunConfig(dir="x", steps=1, patience=patience, min_gain=gain)) is wanted


FIGURES = {0: 5.0, 2: 4.0, 4: 3.95, 6: 3.5, 8: 3.6, 10: 3.45, 12: 1.0}
"""Losses: the gain of 0.05 at step 4 is too small, that at step 6 counts, those at 8 and 10 do not."""


def test_ends_saved_and_complete(build):
    """After step 10 of 12, with its checkpoint; the same command has nothing left to do, and more patience
    goes on from there."""
    session, job = build(FIGURES, *WORDS)
    summary = loop.train(job)
    assert (summary["steps"], summary["stopped_early"]) == (10, 2)
    assert session.folder.steps()[-1] == 10 and summary["heldout_last"] == {"loss": 3.45}
    assert loop.finished(session) == session.folder.summary()
    more, again = build(FIGURES, *WORDS, "run.patience=8")
    assert loop.finished(more) is None
    whole = loop.train(again)
    assert whole["steps"] == 12 and "stopped_early" not in whole


def test_a_crash_at_the_end_changes_nothing(build):
    """The summary was not written any more: the same command finds that it is over."""
    session, job = build(FIGURES, *WORDS)
    summary = loop.train(job)
    (session.folder.path / "summary.json").unlink()
    again = loop.train(build(FIGURES, *WORDS)[1])
    assert (again["steps"], again["stopped_early"]) == (10, 2)
    shutil.rmtree(session.folder.checkpoint(10))
    (session.folder.path / "summary.json").unlink()
    again = loop.train(build(FIGURES, *WORDS)[1])
    assert (again["steps"], again["heldout_last"]) == (10, summary["heldout_last"])
