"""What Google's metadata server says of maintenance, and when a run must end for it."""

import datetime
import json

import pytest

from maxllm.config.launch import LaunchConfig
from maxllm.supervise import maintenance
from maxllm.supervise.maintenance import Maintenance, maintenance_of


@pytest.fixture
def look(monkeypatch):
    """look(answers): why the run must end, and what was said of later."""
    monkeypatch.setattr(maintenance, "LOOK_SECONDS", 0.0)
    answers, said = {}, []
    looked = Maintenance(lambda key: answers.get(key.partition("?")[0]))

    def ask(**given):
        answers.clear()
        answers.update({name.replace("_", "-"): value for name, value in given.items()})
        return looked.look(said.append), said

    return ask


def window(minutes):
    opens = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    return json.dumps({"windowStartTime": f"{opens:%Y-%m-%dT%H:%M:%SZ}", "maintenanceStatus": "PENDING"})


def test_nothing_comes(look):
    for given in ({}, {"preempted": "FALSE", "maintenance_event": "NONE"}):
        assert look(**given) == (None, [])
    assert look(maintenance_event="MIGRATE_ON_HOST_MAINTENANCE") == (None, []), (
        "a live migration ends nothing"
    )
    for text in ("", "[]", '{"error": "no notifications"}', '{"windowStartTime": 3}', "no JSON"):
        assert look(upcoming_maintenance=text) == (None, [])


def test_a_window_is_told_of_once_and_ends_the_run_before_it_opens(look):
    days = window(60 * 24 * 7)
    for _ in range(2):
        why, said = look(upcoming_maintenance=days)
        assert why is None and len(said) == 1 and "the run saves before" in said[0]
    why, _ = look(upcoming_maintenance=window(4))
    assert why.startswith("maintenance of this machine begins at")
    assert look(upcoming_maintenance=window(-1))[0] is not None, "while it is open too"


def test_no_answer_is_waited_for(monkeypatch):
    """A server that is gone is asked once a minute, and ends nothing."""
    asked = []

    def fail(key):
        asked.append(key)
        raise TimeoutError

    looked = Maintenance(fail)
    assert looked.look(print) is None and looked.look(print) is None
    assert asked == ["preempted"]


def test_who_is_asked(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    asked = {
        (wanted, launcher): maintenance_of(LaunchConfig(maintenance=wanted), launcher) is not None
        for wanted in ("auto", "google", "none")
        for launcher in (None, "Slurm", "Cloud TPU")
    }
    assert {which for which, yes in asked.items() if yes} == {
        ("auto", "Cloud TPU"),
        *(("google", launcher) for launcher in (None, "Slurm", "Cloud TPU")),
    }
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert maintenance_of(LaunchConfig(), "Cloud TPU") is None, "there, Kubernetes says it by SIGTERM"
