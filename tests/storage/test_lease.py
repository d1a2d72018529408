"""The lease that locks a folder in a bucket, on a folder of this disk."""

import json
import threading
import time

import pytest

from maxllm import lease
from maxllm.errors import UserError
from maxllm.lease import leased

SHORT = 0.6


def hold(folder, say=lambda line: None, seconds=SHORT):
    return leased(folder, "the run", say, seconds)


def test_it_is_free_again_at_once_when_it_was_given_back(tmp_path):
    for _ in range(3):
        began = time.monotonic()
        with hold(tmp_path / "lock"):
            pass
        assert time.monotonic() - began < SHORT
    assert [file.name for file in (tmp_path / "lock").iterdir()] == ["00000003"]


def test_a_living_owner_keeps_it_and_is_named(tmp_path):
    told = []
    with hold(tmp_path / "lock"):
        busy = pytest.raises(UserError, match=r"another process is training in the run: process [0-9]+ of ")
        with busy, hold(tmp_path / "lock", told.append):
            pass
        assert len(told) == 1 and "watching" in told[0]


def test_a_dead_owner_loses_it_after_its_time(tmp_path):
    (tmp_path / "lock").mkdir()
    dead = {"owner": "process 1 of gone", "id": "x", "seconds": SHORT, "renewed": 7, "released": False}
    (tmp_path / "lock" / "00000004").write_text(json.dumps(dead))
    began = time.monotonic()
    with hold(tmp_path / "lock"):
        assert time.monotonic() - began >= SHORT
        assert [file.name for file in (tmp_path / "lock").iterdir()] == ["00000005"]


def test_of_many_that_wait_for_a_dead_owner_one_gets_it(tmp_path):
    (tmp_path / "lock").mkdir()
    dead = {"owner": "process 1 of gone", "id": "x", "seconds": SHORT, "renewed": 7, "released": False}
    (tmp_path / "lock" / "00000001").write_text(json.dumps(dead))
    got, refused, ended = [], [], threading.Event()

    def try_it(number):
        try:
            with hold(tmp_path / "lock"):
                got.append(number)
                ended.wait(10)
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while len(refused) < 5:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_an_owner_that_was_overtaken_ends_its_process(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(lease, "leave", lambda code, sentence: left.append((code, sentence)))
    with hold(tmp_path / "lock"):
        (tmp_path / "lock" / "00000009").write_text("{}")
        time.sleep(SHORT)
    assert left[0][0] == 1 and "another process has taken over the run" in left[0][1]
