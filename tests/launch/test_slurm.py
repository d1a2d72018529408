"""A Slurm of two node daemons on this machine: runs that are killed, lose a node, or reach their time limit.

Run by `make test-launch`, as root. What is disturbed ends bit for bit as what is not.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from clusters import ENVIRONMENT, ROOT, await_step, check_alike, check_same_end, trainers

pytestmark = pytest.mark.cluster

SLURM = """\
ClusterName=maxllm
SlurmctldHost={host}({address})
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr={address} Port=17001 CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr={address} Port=17002 CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


ADDRESS, INTERFACE = "10.78.0.1", "maxllm-slurm"
"""Of both nodes, on an interface of the test's own: their names, n1 and n2, are no hosts'."""


class Slurm:
    """A controller and two node daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        conf = folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        conf.write_text(SLURM.format(host=host, folder=folder, address=ADDRESS))
        self.environment = ENVIRONMENT | {"SLURM_CONF": str(conf)}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self, *command: str) -> None:
        """Starts a daemon that stays in the foreground."""
        with (self.folder / "daemons.log").open("a") as log:
            self.daemons[command[-1]] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        asked = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return asked.stdout

    def await_nodes(self) -> None:
        """Waits until both nodes are idle."""
        for _ in range(300):
            if self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle", "idle"]:
                return
            time.sleep(0.2)
        raise AssertionError(self.ask("sinfo", "--Node", "--long") + self.ask("scontrol", "show", "nodes"))

    def release(self, job: str) -> None:
        """Lets a job that is queued again start soon, not after Slurm's two minutes.

        In the second of its end it may not: a node takes no credential of a job as old as the last one that
        it has revoked, in whole seconds, and the controller ends the job as failed.
        """
        for _ in range(600):
            if "JobState=PENDING" in self.ask("scontrol", "show", "job", job):
                time.sleep(2)
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
                return
            time.sleep(0.2)
        raise AssertionError(self.ask("scontrol", "show", "job", job))

    def end(self) -> None:
        """Ends what was started here."""
        self.ask("scancel", "--user=root")
        time.sleep(1)
        for process in self.daemons.values():
            process.terminate()
        for process in self.daemons.values():
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    """A Slurm of two nodes on this machine."""
    munge = None
    if not Path("/run/munge/munge.socket.2").exists():
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        munge = subprocess.Popen(
            ["runuser", "-u", "munge", "--", "munged", "--foreground"], stderr=subprocess.DEVNULL
        )
    subprocess.run(["ip", "link", "add", INTERFACE, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", f"{ADDRESS}/32", "dev", INTERFACE], check=True)
    subprocess.run(["ip", "link", "set", INTERFACE, "up"], check=True)
    running = Slurm(tmp_path_factory.mktemp("slurm"))
    running.start("slurmctld", "-D", "-i")
    running.start("slurmd", "-D", "-N", "n1")
    running.start("slurmd", "-D", "-N", "n2")
    try:
        running.await_nodes()
        yield running
    finally:
        running.end()
        subprocess.run(["ip", "link", "delete", INTERFACE], check=True)
        if munge is not None:
            munge.terminate()
            munge.wait(timeout=30)


@pytest.fixture
def submitted(slurm: Slurm, words: list[str], tmp_path: Path):
    """submitted(*options, more): slurm.sh on two nodes, in the background: process, job, log, run folder."""
    slurm.await_nodes()
    running = []

    def submit(*options: str, more: tuple[str, ...] = ()):
        script = ["bash", str(ROOT / "launch" / "slurm.sh"), "--nodes=2", "--gpus=0", "--cpus=1", *options]
        log = tmp_path / "job.log"
        with (tmp_path / "script.log").open("w") as out:
            process = subprocess.Popen(
                [*script, f"--log={log}", *words, *more, f"run.dir={tmp_path / 'run'}"],
                env=slurm.environment,
                stdout=out,
                stderr=out,
            )
        running.append(process)
        while not (said := re.search(r"job (\d+), whose log", (tmp_path / "script.log").read_text())):
            assert process.poll() is None, (tmp_path / "script.log").read_text()
            time.sleep(0.1)
        return process, said[1], log, tmp_path / "run"

    yield submit
    for process in running:
        process.kill()
    slurm.ask("scancel", "--user=root")


def test_slurm_runs_two_nodes_and_goes_on_after_a_kill(slurm, submitted, reference, tmp_path):
    process, job, log, folder = submitted()
    await_step(log, 10, process)
    [victim] = trainers(folder, SLURM_PROCID="1")
    os.kill(victim, signal.SIGKILL)
    slurm.release(job)
    assert process.wait(timeout=300) == 0, (tmp_path / "script.log").read_text()
    text = log.read_text()
    assert "exit code 137: queued again" in text and "start 2" in text
    assert "1: maxllm: process 1 of 2 on" in text and "continues from the checkpoint of step " in text
    assert "0: pretrain: step 30/30" in (tmp_path / "script.log").read_text()  # the log was followed
    check_same_end(folder, reference)


def fail_node(slurm: Slurm, job: str, folder: Path) -> None:
    """The second node ends with all that runs there, and tells nobody."""
    for pid in trainers(folder, SLURMD_NODENAME="n2"):
        os.kill(pid, signal.SIGSTOP)  # it ends by no exit code of its own
    victims = subprocess.run(["pgrep", "-f", f"slurmstepd: \\[{job}"], capture_output=True, text=True)
    daemon = slurm.daemons.pop("n2")
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in victims.stdout.split()}
    steps = [pid for pid, environment in environments.items() if b"spool-n2" in environment]
    for pid in (daemon.pid, *steps, *trainers(folder, SLURMD_NODENAME="n2")):
        os.kill(pid, signal.SIGKILL)
    daemon.wait()


def test_slurm_starts_again_when_a_node_is_gone(slurm, submitted, reference, tmp_path):
    process, job, log, folder = submitted()
    await_step(log, 10, process)
    fail_node(slurm, job, folder)
    slurm.release(job)
    slurm.start("slurmd", "-D", "-N", "n2")
    assert process.wait(timeout=300) == 0, (tmp_path / "script.log").read_text()
    assert "start 2" in log.read_text()
    check_same_end(folder, reference)


def test_slurm_goes_on_with_fewer_nodes(slurm, submitted, reference, tmp_path):
    """A node fails and does not come back: queued again, the job takes the one that there is."""
    process, job, log, folder = submitted("--nodes=1-2", more=("mesh.fsdp=-1",))
    await_step(log, 10, process)
    fail_node(slurm, job, folder)
    slurm.release(job)
    try:
        assert process.wait(timeout=300) == 0, (tmp_path / "script.log").read_text()
    finally:
        slurm.start("slurmd", "-D", "-N", "n2")
    assert (
        f"job {job} on n[1-2]: start 1" in log.read_text() and f"job {job} on n1: start 2" in log.read_text()
    )
    check_alike(folder, reference)


def test_slurm_saves_before_the_time_is_over(submitted):
    """A minute is Slurm's shortest limit; the signal comes when about a third of it is over."""
    process, _, log, _ = submitted("--time=00:01:00", "--save-seconds=40", more=("run.steps=100000",))
    while not log.exists() or "exit code 75: queued again" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
    assert "stopped after step" in log.read_text()


def test_slurm_returns_the_code_of_a_run_that_fails(submitted, tmp_path):
    process, _, log, _ = submitted(more=("run.stepz=1",))
    assert process.wait(timeout=120) == 2
    assert "run.steps" in log.read_text() and "exit code 2" in log.read_text()
