"""Real processes under real supervisors: whatever befalls one, all end, within run.hang_seconds, and say why.

What they do stands in for training, and is quick to start: steps in which each waits for the others' files.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from metadata_server import metadata_server

HANG_SECONDS = 5

WORK = """
import os, signal, sys, time
from pathlib import Path
from maxllm.config.launch import LaunchConfig
from maxllm.parallel.discovery import place_of
from maxllm.phases import PHASES, Phase
from maxllm.supervise.maintenance import maintenance_of
from maxllm.supervise.supervisor import Care, supervise

folder, what, steps, restarts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
place = place_of(os.environ)
index, processes = (place.index, place.processes) if place else (0, 1)
who = "google" if "GCE_METADATA_IP" in os.environ else "none"
supervise(place, Care({seconds}, 30, restarts, maintenance_of(LaunchConfig(maintenance=who), None)))
(folder / f"pid-{{index}}").write_text(str(os.getpid()))
attempt = len(list(folder.glob(f"attempt-{{index}}-*")))
(folder / f"attempt-{{index}}-{{attempt}}").touch()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for step in range(1, steps + 1):
    PHASES.enter(Phase.LOADING, step)
    if step == 3 and index == 1 and attempt == 0:
        if what == "spins":
            while True:
                pass
        if what == "raises":
            raise RuntimeError("a fault of this process")
        if what == "exits":
            sys.exit(3)
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "supervisor stops":
            os.kill(os.getppid(), signal.SIGSTOP)
        if what == "supervisor dies":
            os.kill(os.getppid(), signal.SIGKILL)
    PHASES.enter(Phase.COMPUTING)
    (folder / f"{{attempt}}-{{step}}-{{index}}").touch()
    while not all((folder / f"{{attempt}}-{{step}}-{{other}}").exists() for other in range(processes)):
        time.sleep(0.01)
    if step == 3 and what == "all wait":
        time.sleep(1000)
    if step == 3 and what == "long save" and index == 0:
        PHASES.enter(Phase.SAVING)
        time.sleep({seconds} * 1.5)
PHASES.enter(Phase.ENDING)
print("complete", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """start(what, processes): the processes of a run, each with its output in a file out-INDEX."""
    program = tmp_path / "work.py"
    program.write_text(WORK.format(seconds=HANG_SECONDS))
    started = []

    def run(what, processes=3, steps=8, restarts=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for index in range(processes):
            place = {
                "MAXLLM_COORDINATOR": f"127.0.0.1:{port}",
                "MAXLLM_NUM_PROCESSES": str(processes),
                "MAXLLM_PROCESS_ID": str(index),
            }
            with (tmp_path / f"out-{index}").open("w") as out:
                words = [sys.executable, str(program), str(tmp_path), what, str(steps), str(restarts)]
                started.append(
                    subprocess.Popen(
                        words, env=os.environ | (place if processes > 1 else {}), stdout=out, stderr=out
                    )
                )
        return started

    yield run
    for process in started:
        process.kill()
        process.wait()


def said(folder: Path, index: int) -> str:
    return (folder / f"out-{index}").read_text()


def ends(processes, but=()):
    """The exit codes of those that end, and after how many seconds the last did."""
    began = time.monotonic()
    codes = [None if i in but else process.wait(timeout=60) for i, process in enumerate(processes)]
    return codes, time.monotonic() - began


FAULTS = {
    "dies": (
        137,
        "process 1 on {host} was killed by SIGKILL (out of memory, perhaps",
    ),
    "exits": (3, "process 1 on {host} has failed with exit code 3 in step 3, building a batch"),
    "raises": (1, "process 1 on {host} has failed with exit code 1 in step 3"),
    "stops": (75, "process 1 on {host} has been stopped (SIGSTOP) for"),
    "spins": (75, "process 1 on {host} does not come on: nothing has changed for"),
    "supervisor stops": (None, "process 1 on {host} has not been heard of for"),
    "supervisor dies": (-signal.SIGKILL, "process 1 on {host} is gone with its supervisor, last "),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_befalls_one_ends_all(start, tmp_path, what):
    code, sentence = FAULTS[what]
    processes = start(what, steps=10**6)
    codes, _ = ends(processes, but=(1,) if code is None else ())
    assert codes == [75, code, 75]
    for index in (0, 2):
        assert sentence.format(host=socket.gethostname()) in said(tmp_path, index)
        assert f"; process {index} ends for it" in said(tmp_path, index)
    dumped = 'work.py", line' in said(tmp_path, 1) and "most recent call first" in said(tmp_path, 1)
    assert dumped == (what in ("stops", "spins"))
    for index in range(3):  # nothing is left behind
        pid = int((tmp_path / f"pid-{index}").read_text())
        assert (what == "supervisor stops" and index == 1) or not is_there(pid)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_process_0_is_judged_like_any_other(start, tmp_path):
    """The supervisor of process 0 is who judges; that of another notices its end by itself."""
    processes = start("nothing", steps=10**6)
    await_step(tmp_path, processes)
    processes[0].kill()
    codes, _ = ends(processes)
    assert codes == [-signal.SIGKILL, 75, 75]
    assert f"process 0 on {socket.gethostname()} is gone with its supervisor" in said(tmp_path, 2)


def await_step(folder: Path, processes, step=3) -> None:
    while not (folder / f"0-{step}-0").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


def test_where_all_wait_all_tell_where_they_are(start, tmp_path):
    codes, _ = ends(start("all wait"))
    assert codes == [75, 75, 75]
    for index in range(3):
        assert "none of the processes 0 (" in said(tmp_path, index)
        assert "most recent call first" in said(tmp_path, index)


def test_a_long_save_is_no_hang(start, tmp_path):
    codes, _ = ends(start("long save"))
    assert codes == [0, 0, 0]
    assert all(said(tmp_path, index).endswith("complete\n") for index in range(3))


def test_one_alone_that_hangs_is_begun_again(start, tmp_path):
    """--restarts; the second time it comes to its end."""
    codes, _ = ends(start("all wait", processes=1, restarts=1))
    assert codes == [75]
    text = said(tmp_path, 0)
    assert text.count("does not come on") == 2 and "begins again in" in text
    assert "ended 2 times in a row; --restarts 1 allows no more" in text


def test_all_are_begun_again_after_one_was_killed(start, tmp_path):
    codes, _ = ends(start("dies", restarts=2))
    assert codes == [0, 0, 0]
    for index in range(3):
        assert said(tmp_path, index).count("begins again in") == 1
        assert said(tmp_path, index).endswith("complete\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_asked_to_stop_does_so_and_is_not_begun_again(start, tmp_path, number):
    processes = start("nothing", steps=10**6, restarts=5)
    await_step(tmp_path, processes)
    for process in processes:
        process.send_signal(number)
    codes, _ = ends(processes)
    assert codes == [75, 75, 75] and "begins again" not in said(tmp_path, 0)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("preempted", "TRUE", "is about to be preempted"),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "is about to end for maintenance"),
    ],
)
def test_a_machine_about_to_be_taken_away(start, tmp_path, monkeypatch, key, value, why):
    """Its metadata server says so after a while: the process is asked to stop, once, and not begun again."""
    with metadata_server() as (answers, address):
        answers |= {"preempted": "FALSE", "maintenance-event": "NONE"}
        monkeypatch.setenv("GCE_METADATA_IP", address)
        processes = start("nothing", processes=1, steps=10**6, restarts=5)
        await_step(tmp_path, processes)
        answers[key] = value
        codes, _ = ends(processes)
    assert codes == [75]
    assert said(tmp_path, 0).count(why) == 1 and "begins again" not in said(tmp_path, 0)
