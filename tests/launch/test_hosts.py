"""Two hosts in network namespaces: ssh.sh, mpi.sh and worker.sh for real.

Run by `make test-launch`, as root. What is disturbed ends bit for bit as what is not.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import ENVIRONMENT, MAXLLM, ROOT, await_step, check_alike, check_same_end, trainers

pytestmark = pytest.mark.cluster

SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd-{name}.pid
PermitRootLogin yes
StrictModes no
UsePAM no
"""


def ip(*words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two namespaces on a bridge, each with an sshd and a folder of its own at one path."""

    bridge = "maxllm-br"

    def __init__(self, folder: Path) -> None:
        self.names = {"maxllm-a": "10.77.0.1", "maxllm-b": "10.77.0.2"}
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        for key in ("host_key", "key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
            )
        self.ssh = (
            f"ssh -i {folder / 'key'} -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR "
            "-o UserKnownHostsFile=/dev/null -o ServerAliveInterval=5 -o ConnectTimeout=5"
        )
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Makes the network, and starts the daemons."""
        Path("/run/sshd").mkdir(exist_ok=True)
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", "10.77.0.254/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for name, address in self.names.items():
            ip("netns", "add", name)
            ip("link", "add", f"{name}-o", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}-o", "master", self.bridge, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            own = self.folder / name
            own.mkdir()
            conf = self.folder / f"sshd-{name}.conf"
            conf.write_text(SSHD.format(address=address, folder=self.folder, name=name))
            # `ip netns exec` lays these files over those of /etc.
            etc = Path("/etc/netns") / name
            etc.mkdir(parents=True)
            names = "".join(f"{address} {host}\n" for host, address in self.names.items())
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            inside = f"hostname {name} && mount --bind {own} {self.home} && exec /usr/sbin/sshd -D -f {conf}"
            enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inside]
            self.daemons.append(subprocess.Popen(enter))
        for address in self.names.values():
            while subprocess.run([*self.ssh.split(), address, "true"], capture_output=True).returncode != 0:
                time.sleep(0.2)

    def end(self) -> None:
        """Takes all of it away again."""
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait(timeout=30)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            subprocess.run(
                ["ip", "link", "delete", f"{name}-o"], capture_output=True
            )  # at once, with its peer
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory):
    """Two hosts that ssh reaches."""
    running = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        running.start()
        yield running
    finally:
        running.end()


INSTALLED = """#!/bin/sh
PYTHONPATH={home}/maxllm exec {python} -m maxllm.cli "$@"
"""


@pytest.fixture
def over_ssh(hosts: Hosts, words: list[str], tmp_path: Path):
    """over_ssh(folder, log, *options, more=()): ssh.sh on both hosts, in the background. Installed there is
    a program of the test's, which runs the code that was copied."""
    for name in hosts.names:
        program = hosts.folder / name / "maxllm" / ".venv" / "bin" / "maxllm"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(INSTALLED.format(home=hosts.home, python=sys.executable))
        program.chmod(0o755)

    def run(folder: Path, log: Path, *options: str, more: tuple[str, ...] = ()) -> subprocess.Popen:
        script = ["bash", str(ROOT / "launch" / "ssh.sh"), f"--hosts={','.join(hosts.names.values())}"]
        script += [
            f"--ssh={hosts.ssh}",
            f"--folder={hosts.home}/maxllm",
            "--no-install",
            "--grace-seconds=20",
            *options,
        ]
        with log.open("w") as out:
            return subprocess.Popen(
                [*script, *words, *more, f"run.dir={folder}", "run.hang_seconds=15"],
                env=ENVIRONMENT,
                stdout=out,
                stderr=out,
            )

    return run


def test_ssh_runs_two_hosts_and_goes_on_after_a_kill(over_ssh, hosts, reference, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = over_ssh(folder, log)
    await_step(log, 10, process)
    [victim] = trainers(folder, MAXLLM_PROCESS_ID="1")
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=200) == 137, log.read_text()
    text = log.read_text()
    assert "10.77.0.2 failed first, with exit code 137" in text and "Traceback" not in text
    assert "[10.77.0.1] pretrain: step 10/30" in text and "[10.77.0.2] maxllm: process 1 of 2 on" in text
    assert (hosts.folder / "maxllm-b" / "maxllm" / "launch" / "ssh.sh").is_file()  # the code went over
    again = tmp_path / "again"
    assert over_ssh(folder, again).wait(timeout=200) == 0, again.read_text()
    assert "continues from the checkpoint of step " in again.read_text()
    check_same_end(folder, reference)


def test_ssh_stops_saved_when_asked(over_ssh, reference, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = over_ssh(folder, log)
    await_step(log, 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 75, log.read_text()
    assert log.read_text().count("and saved") == 2
    again = tmp_path / "again"
    assert over_ssh(folder, again).wait(timeout=200) == 0, again.read_text()
    check_same_end(folder, reference)


def test_ssh_goes_on_with_fewer_hosts(over_ssh, reference, tmp_path):
    """A host is cut off for good: the run starts again on the other, whose device takes all rows."""
    folder, log = tmp_path / "run", tmp_path / "log"
    options, mesh = ("--restarts=1", "--fewer", "--grace-seconds=5"), ("mesh.fsdp=-1",)
    process = over_ssh(folder, log, *options, more=mesh)
    await_step(log, 10, process)
    ip("link", "set", "maxllm-b-o", "down")
    try:
        assert process.wait(timeout=400) == 0, log.read_text()
    finally:
        ip("link", "set", "maxllm-b-o", "up")
    text = log.read_text()
    assert "10.77.0.2 cannot be reached any more" in text and "goes on without 10.77.0.2" in text
    assert "starts again on 1 hosts (1 of 1 restarts)" in text
    assert "continues from the checkpoint of step " in text
    check_alike(folder, reference)


def test_mpi_runs_two_hosts_and_goes_on_after_a_kill(hosts, words, reference, tmp_path):
    folder = tmp_path / "run"
    wrapper = tmp_path / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {hosts.ssh} "$@"\n')
    wrapper.chmod(0o755)
    script = ["bash", str(ROOT / "launch" / "mpi.sh"), f"--hosts={','.join(hosts.names.values())}"]
    script += ["--grace-seconds=20", f"--mpirun=--allow-run-as-root --mca plm_rsh_agent {wrapper}"]

    def run(log: Path) -> subprocess.Popen:
        with log.open("w") as out:
            return subprocess.Popen(
                [*script, *words, f"run.dir={folder}"], env=ENVIRONMENT, stdout=out, stderr=out
            )

    process = run(tmp_path / "log")
    await_step(tmp_path / "log", 10, process)
    [victim] = trainers(folder, OMPI_COMM_WORLD_RANK="1")
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=200) == 137, (tmp_path / "log").read_text()
    process = run(tmp_path / "stopped")
    await_step(tmp_path / "stopped", 16, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 75, (tmp_path / "stopped").read_text()
    assert run(tmp_path / "again").wait(timeout=200) == 0, (tmp_path / "again").read_text()
    check_same_end(folder, reference)


HANG_SECONDS = 15


@pytest.mark.parametrize("cut", ["maxllm-a", "maxllm-b"])
def test_a_host_that_is_cut_off_ends_all(hosts, words, reference, tmp_path, cut):
    """Its link goes down, in the middle of training: nobody hears of its end, and both processes end within
    run.hang_seconds; with the link up again, the same commands end bit for bit as an undisturbed run."""
    folder = tmp_path / "run"

    def start(attempt: int) -> list[subprocess.Popen]:
        """A process on each host, which share the disk and nothing else but the network."""
        started = []
        for index, name in enumerate(hosts.names):
            own = {"MAXLLM_COORDINATOR": f"10.77.0.1:{6100 + attempt}", "MAXLLM_NUM_PROCESSES": "2"}
            own |= {"MAXLLM_PROCESS_ID": str(index)}
            train = f"hostname {name} && exec {MAXLLM} {' '.join(words)} run.dir={folder} "
            train += f"run.hang_seconds={HANG_SECONDS}"
            enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", train]
            with (tmp_path / f"{name}-{attempt}").open("w") as out:
                started.append(subprocess.Popen(enter, env=ENVIRONMENT | own, stdout=out, stderr=out))
        return started

    processes = start(0)
    await_step(tmp_path / "maxllm-a-0", 10, processes[0])
    ip("link", "set", f"{cut}-o", "down")
    try:
        began = time.monotonic()
        codes = [process.wait(timeout=5 * HANG_SECONDS) for process in processes]
        seconds = time.monotonic() - began
    finally:
        ip("link", "set", f"{cut}-o", "up")
    said = [(tmp_path / f"{name}-0").read_text() for name in hosts.names]
    assert codes == [75, 75], said
    assert "process 1 on maxllm-b has not been heard of for" in said[0]
    assert "process 0 on maxllm-a has not been heard of for" in said[1]
    print(f"{cut} cut off: both ended after {seconds:.1f} s")
    assert [process.wait(timeout=200) for process in start(1)] == [0, 0]
    check_same_end(folder, reference)


def test_a_host_installs_maxllm_by_itself(tmp_path):
    """The real install, in a folder as ssh.sh leaves it."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if name.startswith(("maxllm/", "configs/", "launch/")) or "/" not in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for _ in range(2):  # the second time nothing is left to do
        installed = subprocess.run(
            ["bash", "launch/worker.sh", "install", ""], cwd=tmp_path, capture_output=True, text=True
        )
        assert installed.returncode == 0, installed.stderr
        assert installed.stdout.splitlines()[-1].startswith("maxllm ")
