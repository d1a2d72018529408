"""Processes meet, or each ends with a sentence on who did not come: threads, and real processes of JAX."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from maxllm.errors import RunFailed, UserError
from maxllm.parallel import processes, rendezvous
from maxllm.parallel.discovery import COORDINATOR, COUNT, INDEX, Place


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def coming(address):
    """coming(index, processes, seconds) begins a process's part in a thread; coming.end() has their ends."""
    threads, ends, said = [], {}, []

    def come(index, processes=3, seconds=30.0, name=None):
        def run():
            try:
                meeting = rendezvous.meet(Place("settings", address, processes, index), seconds, said.append)
                ends[index if name is None else name] = (
                    "met" if meeting.hosts == 1 else f"{meeting.hosts} hosts"
                )
                meeting.close()
            except (RunFailed, UserError) as error:
                ends[index if name is None else name] = error

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    def end():
        for thread in threads:
            thread.join(60)
        return ends

    come.end, come.said = end, said
    return come


def visitor(address, message):
    """A connection on which a line has been sent."""
    host, port = address.split(":")
    for _ in range(100):
        try:
            connection = socket.create_connection((host, int(port)))
        except OSError:
            time.sleep(0.05)
            continue
        connection.sendall(message)
        return connection
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_in_any_order(coming, order):
    for index in order:
        coming(index)
    assert coming.end() == dict.fromkeys(range(3), "met")


def test_who_is_missing_is_told_to_all(coming, address, monkeypatch):
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 0.3)
    coming(0, processes=4, seconds=2.0)
    coming(2, processes=4, seconds=30.0)
    ends = coming.end()
    where = f"{address} within 2 s (launch.rendezvous_seconds)"
    sentence = f"2 of 4 processes did not come to {where}: 1, 3; here are 0 ("
    for index in (0, 2):
        assert isinstance(ends[index], RunFailed) and str(ends[index]).startswith(sentence)
        assert f"2 ({socket.gethostname()})" in str(ends[index])
    assert "waiting for 1, 3 of 4 processes" in coming.said


def test_process_0_does_not_come(coming, address, monkeypatch):
    monkeypatch.setattr(rendezvous, "REPORT_SECONDS", 0.3)
    coming(1, seconds=1.0)
    error = coming.end()[1]
    assert f"process 1 waits for process 0 at {address}: Connection refused" in coming.said
    assert isinstance(error, RunFailed)
    assert (
        f"did not meet process 0 at {address} within 1 s (launch.rendezvous_seconds): Connection refused"
        in str(error)
    )


def test_two_with_one_index(coming):
    coming(0)
    coming(1)
    coming(1, name="again")
    ends = coming.end()
    for end in ends.values():
        assert isinstance(end, UserError) and f"two processes have {INDEX}=1, on " in str(end)
    assert len(ends) == 3


def test_two_are_first(coming, address):
    coming(0)
    coming(0, name="again")
    time.sleep(1)
    coming(1)
    coming(2)
    ends = coming.end()
    refused = [end for end in ends.values() if end != "met"]
    assert len(
        refused
    ) == 1 and f"is taken on this host: another job has it, or another process has {INDEX}=0" in str(
        refused[0]
    )


def test_another_number_of_processes(coming):
    coming(0, processes=3)
    coming(1, processes=2)
    ends = coming.end()
    for end in ends.values():
        assert isinstance(end, UserError) and "says that there are 2 processes, process 0 on" in str(end)


def test_hosts_are_counted(coming, address):
    line = json.dumps({"index": 1, "processes": 3, "host": "another"}).encode() + b"\n"
    coming(0)
    with visitor(address, line) as other:
        coming(2)
        assert coming.end() == dict.fromkeys((0, 2), "2 hosts")
        assert json.loads(other.recv(4096)) == {"hosts": 2, "host": socket.gethostname()}


@pytest.mark.parametrize(("address", "says"), [("127.0.1.1", "cannot reach it"), ("10.0.0.7", None)])
def test_an_address_that_others_cannot_reach(monkeypatch, address, says):
    """Debian's /etc/hosts has a machine's own name as 127.0.1.1."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 0))])
    if says is None:
        processes.check_own_address()
    else:
        with pytest.raises(UserError, match=says):
            processes.check_own_address()


def test_one_that_died_may_come_again(coming, address):
    """Its place is free once its connection is closed, as the system closes those of a killed process."""
    coming(0)
    line = json.dumps({"index": 1, "processes": 3, "host": "a"}).encode() + b"\n"
    visitor(address, line).close()
    coming(2)  # only now: with all three there for an instant, process 0 would have let them go
    coming(1)
    assert coming.end() == dict.fromkeys(range(3), "met")


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\n",
        b"[1]\n",
        b"{}\n",
        b'{"index": "1", "processes": 3, "host": "a"}\n',
        b"\xff" * 9000,
    ],
)
def test_strangers_are_sent_away(coming, address, line):
    coming(0)
    stranger = visitor(address, line)
    coming(1)
    coming(2)
    assert coming.end() == dict.fromkeys(range(3), "met")
    stranger.close()


# --- real processes ----------------------------------------------------------------------------------------

JOINED = """
import sys
from maxllm.config.launch import LaunchConfig
from maxllm.errors import RunFailed, UserError
from maxllm.parallel import processes
import jax
try:
    processes.initialize(LaunchConfig(rendezvous_seconds=int(sys.argv[1])))
    print("joined", jax.process_index(), jax.process_count())
except (RunFailed, UserError) as error:
    print(error)
"""


def joining(index, count, seconds, address):
    """A process that joins as `index`, and prints what became of it."""
    settings = {"JAX_PLATFORMS": "cpu", COORDINATOR: address, COUNT: str(count), INDEX: str(index)}
    command = [sys.executable, "-c", JOINED, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | settings)


def test_jax_begins_at_the_same_address(address):
    running = [joining(index, 2, 120, address) for index in range(2)]
    said = [process.communicate(timeout=180)[0] for process in running]
    assert said == ["joined 0 2\n", "joined 1 2\n"]


def test_one_process_takes_no_port(address):
    """Two commands in one interactive job step of Slurm, say, both of which are told of the same address."""
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        process = joining(0, 1, 3, address)
        assert process.communicate(timeout=180)[0] == "joined 0 1\n"


def test_a_missing_process_is_a_sentence(address):
    """JAX would abort, with a stack of C++."""
    process = joining(0, 2, 3, address)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0 and f"1 of 2 processes did not come to {address} within 3 s" in said
