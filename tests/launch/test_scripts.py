"""Every script of launch/: its help, its dry run, wrong words, shellcheck; clouds by recording stand-ins."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LIBRARIES = ("common.sh", "remote.sh")
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh") if path.name not in LIBRARIES)
STARTERS = [name for name in SCRIPTS if name not in ("worker.sh", "slurm_job.sh")]

TPU, GPU = "pretrain/llama2-7b_synthetic_v5p-16", "pretrain/llama3-8b_synthetic_h100x8"

OPTIONS = {
    "gke.sh": ["--name=seven", "--image=image"],
    "local.sh": [],
    "mpi.sh": ["--hosts=a,b"],
    "skypilot.sh": ["--name=seven"],
    "slurm.sh": [],
    "ssh.sh": ["--hosts=a,me@b"],
    "tpu_vm.sh": ["--name=seven", "--zone=us-east5-a"],
    "xpk.sh": ["--name=seven", "--cluster=c", "--image=image"],
}


def test_shellcheck_finds_nothing():
    """As a wheel it comes with the extra test."""
    checker = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [checker, "--external-sources", *sorted((ROOT / "launch").glob("*.sh"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stdout


def test_every_script_can_be_started():
    assert set(OPTIONS) == set(STARTERS)
    assert all((ROOT / "launch" / name).stat().st_mode & 0o111 for name in SCRIPTS)


@pytest.mark.parametrize("name", [*STARTERS, "worker.sh"])
def test_help_is_the_comment_at_the_head(script, name):
    result = script(name, "--help")
    assert result.returncode == 0 and f"launch/{name}" in result.stdout
    assert not any(line.startswith("#") for line in result.stdout.splitlines())
    source = (ROOT / "launch" / name).read_text()
    if (declared := re.search(r"declare -A options=\((.*?)\n?\)\n", source, re.S)) is not None:
        for option in re.findall(r"\[([a-z-]+)\]=", declared[1]):
            assert f"-{option} " in result.stdout or f"-{option}\n" in result.stdout, option


@pytest.mark.parametrize("name", STARTERS)
def test_a_dry_run_runs_nothing(script, stand_in, name):
    called = [
        stand_in(program)
        for program in ("gcloud", "kubectl", "xpk", "sky", "sbatch", "mpirun", "ssh", "docker", "setsid")
    ]
    recipe = TPU if name == "tpu_vm.sh" else GPU
    result = script(name, *OPTIONS[name], "--dry-run", "pretrain", recipe, "run.dir=a b")
    assert result.returncode == 0, result.stderr
    assert "pretrain" in result.stdout and "a b" in result.stdout
    assert not any(calls() for calls in called)


@pytest.mark.parametrize("name", STARTERS)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nonsense", "1", "pretrain", TPU], "--nonsense is no option"),
        (["--dry-run"], "VERB RECIPE"),
        (["--dry-run", "pretrain"], "VERB RECIPE"),
    ],
)
def test_wrong_words_are_one_sentence(script, name, words, says):
    result = script(name, *OPTIONS[name], *words)
    assert result.returncode == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("slurm.sh", ["--nodes=none", "--gpus=0"], "--nodes none is neither N nor MIN-MAX"),
        ("slurm.sh", ["--nodes=1", "--gpus=0", "--per=gpu"], "needs nodes with GPUs"),
        ("slurm.sh", ["--hardware=h9x8"], "h9x8 is not known"),
        ("tpu_vm.sh", ["--capacity=free"], "--capacity free is none of"),
        ("tpu_vm.sh", ["--step=jump"], "--step jump is none of"),
        ("tpu_vm.sh", ["--hardware=h100x8"], "h100x8 is no TPU"),
        ("tpu_vm.sh", ["--hardware=tpu7x:4x4x4"], "see launch/gke.sh"),
        ("gke.sh", ["--name=Seven!"], "lower-case letters"),
        ("skypilot.sh", ["--hardware=2xv5p-16"], "SkyPilot starts no 2xv5p-16"),
        ("ssh.sh", ["--hosts="], "--hosts is needed"),
    ],
)
def test_wrong_values_are_one_sentence(script, name, words, says):
    result = script(name, *OPTIONS[name], *words, "--dry-run", "pretrain", TPU)
    assert result.returncode == 2 and says in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_a_recipe_says_wrong_is_said(script):
    result = script("slurm.sh", "--dry-run", "pretrain", TPU, "run.stepz=1")
    assert result.returncode == 2 and "run.steps" in result.stderr


def test_slurm_takes_nodes_and_gpus_from_the_machine(script):
    words = script("slurm.sh", "--hardware=h100x16", "--dry-run", "pretrain", GPU).stdout
    assert "--nodes=2 --ntasks-per-node=1 " in words and "--gpus-per-node=8" in words
    each = script("slurm.sh", "--hardware=h100x16", "--per=gpu", "--cpus=12", "--dry-run", "pretrain", GPU)
    assert "--ntasks-per-node=8" in each.stdout and "--cpus-per-task=12" in each.stdout
    assert "--exclusive" not in each.stdout and "--exclusive --mem=0" in words
    image = script("slurm.sh", "--container=i.sqsh", "--mounts=/data:/data", "--dry-run", "pretrain", GPU)
    assert f"--container-image=i.sqsh --container-mounts={ROOT}:{ROOT},/data:/data" in image.stdout
    assert image.stdout.startswith("MAXLLM=maxllm ")


# --- Cloud TPU ---------------------------------------------------------------------------------------------

# Of https://cloud.google.com/sdk/gcloud/reference/compute/tpus: words of each command, and its flags.
GCLOUD = {
    ("queued-resources", "create"): {
        *("zone", "project", "node-id", "node-count", "node-prefix", "accelerator-type", "runtime-version"),
        *("spot", "reserved", "valid-until-duration"),
    },
    ("queued-resources", "describe"): {"zone", "project", "format"},
    ("queued-resources", "delete"): {"zone", "project", "force", "quiet"},
    ("tpu-vm", "ssh"): {"zone", "project", "worker", "command"},
}

# Hosts are folders; what would be installed there is a program that says where it stands and its words.
CLOUD = """
import os, pathlib, subprocess
root = pathlib.Path({root!r})
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
match words[2:4]:
    case ["queued-resources", "describe"]:
        states = root / "states"
        waiting = states.read_text().split() if states.exists() else []
        print(waiting[0] if waiting else "ACTIVE")
        states.write_text(" ".join(waiting[1:]))
    case ["tpu-vm", "ssh"]:
        home = root / words[4] / flags["worker"]
        home.mkdir(parents=True, exist_ok=True)
        if "worker.sh install" in flags["command"]:
            program = home / "maxllm/.venv/bin/maxllm"
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text({program!r})
            program.chmod(0o755)
        else:
            sys.exit(subprocess.run(["bash", "-c", flags["command"]], cwd=home).returncode)
"""

PROGRAM = """#!/usr/bin/env bash
echo "told $* in $(basename "$(dirname "$(dirname "$PWD")")") with MAXLLM_DISTRIBUTED=$MAXLLM_DISTRIBUTED"
ls launch/ssh.sh configs
case "$PWD" in
  */seven-1/0/*) sleep 0.3; exit "${WORST:-0}" ;;
  *) sleep 1.5; exit "${OTHERS:-0}" ;;
esac
"""


def check_documented(calls: list[list[str]]) -> None:
    """Every call has the words and flags of gcloud's reference."""
    for call in calls:
        assert call[:3] == ["gcloud", "compute", "tpus"]
        command = (call[3], call[4])
        positional = [word for word in call[5:] if not word.startswith("--")]
        flags = {word[2:].partition("=")[0] for word in call[5:] if word.startswith("--")}
        assert command in GCLOUD and len(positional) == 1, call
        assert flags <= GCLOUD[command] and "zone" in flags, call


@pytest.fixture
def cloud(tmp_path, stand_in):
    """A recording gcloud whose two-host slices are folders."""
    body = CLOUD.format(root=str(tmp_path / "cloud"), program=PROGRAM)
    (tmp_path / "cloud").mkdir()
    return stand_in("gcloud", body)


SLICES = ["--name=seven", "--zone=z", "--hardware=2xv5p-16", "--capacity=spot", "--grace-seconds=5"]


def test_two_slices_are_rented_installed_started_and_deleted(script, cloud, tmp_path):
    (tmp_path / "cloud" / "states").write_text("absent PROVISIONING")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((ROOT / "configs" / f"{TPU}.yaml").read_text())
    more = ["--wait=6h", "--project=p", "--delete"]
    result = script(
        "tpu_vm.sh", *SLICES, *more, "pretrain", str(recipe), "run.dir=a b", MAXLLM_POLL_SECONDS="0.2"
    )
    assert result.returncode == 0, result.stderr
    calls = cloud()
    check_documented(calls)
    where = ["--zone=z", "--project=p"]
    create = ["--node-count=2", "--node-prefix=seven", "--accelerator-type=v5p-16"]
    create += ["--runtime-version=v2-alpha-tpuv5", "--spot", "--valid-until-duration=6h"]
    tpus = ["gcloud", "compute", "tpus"]
    created = [*tpus, "queued-resources", "create", "seven", *create, *where]
    assert [call for call in calls if "create" in call] == [created]
    assert calls[-1] == [*tpus, "queued-resources", "delete", "seven", "--force", "--quiet", *where]
    logs = result.stdout.splitlines()
    for host in ("seven-0/0", "seven-0/1", "seven-1/0", "seven-1/1"):
        own = [line for line in logs if line.startswith(f"[{host}] ")]
        assert f"[{host}] told pretrain runs/launch/mine.yaml run.dir=a b" in own[0]
        assert "MAXLLM_DISTRIBUTED=auto" in own[0] and f"[{host}] pretrain" in own
        node, worker = host.split("/")
        sent = tmp_path / "cloud" / node / worker / "maxllm" / "runs" / "launch" / "mine.yaml"
        assert sent.read_text() == recipe.read_text()


def test_the_first_failure_is_said_and_is_the_exit_code(script, cloud):
    result = script("tpu_vm.sh", *SLICES, "pretrain", TPU, WORST="3", OTHERS="75")
    assert result.returncode == 3, result.stderr
    assert "seven-1/0 failed first, with exit code 3; the end of its log:" in result.stderr
    assert not any("delete" in call for call in cloud())


def test_a_restart_is_asked_for_until_the_limit(script, cloud):
    result = script("tpu_vm.sh", *SLICES, "--restarts=1", "pretrain", TPU, WORST="75", OTHERS="75")
    assert result.returncode == 75 and "after 2 starts: not again" in result.stderr
    started = [call for call in cloud() if any("worker.sh start" in word for word in call)]
    assert len(started) == 8


def test_a_slice_that_is_not_given_is_an_error(script, cloud, tmp_path):
    (tmp_path / "cloud" / "states").write_text("absent FAILED")
    result = script("tpu_vm.sh", *SLICES, "pretrain", TPU)
    assert result.returncode == 1 and "seven was not given" in result.stderr


def test_a_step_alone(script, cloud):
    result = script("tpu_vm.sh", *SLICES, "--step=status")
    assert result.returncode == 0 and "seven: ACTIVE" in result.stderr
    assert script("tpu_vm.sh", "--name=seven", "--zone=z", "--step=delete").returncode == 0
    check_documented(cloud())


# --- Kubernetes, SkyPilot ----------------------------------------------------------------------------------

KUBECTL = """
import pathlib
root = pathlib.Path({root!r})
if words[0] == "apply":
    (root / "manifest.yaml").write_text(sys.stdin.read())
elif words[:2] == ["get", "jobset"] and "--ignore-not-found" in words:
    print("jobset/seven" if (root / "there").exists() else "")
elif words[:2] == ["get", "jobset"]:
    looks = root / "looks"
    looks.write_text((looks.read_text() if looks.exists() else "") + ".")
    print({ended!r} if len(looks.read_text()) > 1 else "", end="")
elif words[:2] == ["get", "pods"] and "--output=name" in words:
    print("pod/seven-workers-0-0")
elif words[:2] == ["get", "pods"]:
    print("2026-01-01T00:00:09Z 75 seven-workers-0-0-a node-0")
    print("2026-01-01T00:00:05Z 3 seven-workers-0-1-b node-1")
elif words[0] == "logs":
    print("[pod/seven-workers-0-0/maxllm] step 1")
"""


@pytest.mark.parametrize(("ended", "code"), [("Completed", 0), ("Failed", 3)])
def test_a_jobset_is_applied_and_followed(script, stand_in, tmp_path, ended, code):
    kubectl = stand_in("kubectl", KUBECTL.format(root=str(tmp_path), ended=ended))
    words = ["--name=seven", "--image=image", "--bucket=b", "--delete", "pretrain", TPU]
    result = script("gke.sh", *words, MAXLLM_POLL_SECONDS="0.3")
    assert result.returncode == code, result.stderr
    assert "[pod/seven-workers-0-0/maxllm] step 1" in result.stdout
    assert ("seven-workers-0-1-b on node-1 failed first, with exit code 3" in result.stderr) == (code == 3)
    assert kubectl()[-1] == ["kubectl", "delete", "jobset", "seven"]
    kinds = [part["kind"] for part in yaml.safe_load_all((tmp_path / "manifest.yaml").read_text())]
    assert kinds == ["ConfigMap", "JobSet"]


def test_a_jobset_that_is_there_is_left_alone(script, stand_in, tmp_path):
    kubectl = stand_in("kubectl", KUBECTL.format(root=str(tmp_path), ended=""))
    (tmp_path / "there").touch()
    result = script("gke.sh", "--name=seven", "--image=image", "pretrain", TPU)
    assert result.returncode == 2 and "there is a JobSet seven already" in result.stderr
    assert len(kubectl()) == 1


def test_skypilot_gets_a_task(script, stand_in, tmp_path):
    sky = stand_in(
        "sky", f"import shutil; shutil.copy(words[-1], {str(tmp_path / 'task.yaml')!r}); sys.exit(9)"
    )
    result = script("skypilot.sh", "--name=seven", "--managed", "pretrain", GPU, "run.dir=/d")
    assert result.returncode == 9 and sky()[0][:5] == ["sky", "jobs", "launch", "--yes", sky()[0][4]]
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["resources"]["accelerators"] == "H100:8" and task["num_nodes"] == 1
    assert "exec .venv/bin/maxllm pretrain " + GPU + " run.dir=/d" in task["run"]


# --- a host's part -----------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
    """worker(*words): launch/worker.sh in a folder of its own."""

    def run(*words, **more):
        command = ["bash", str(ROOT / "launch" / "worker.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, **more)

    return run


def test_a_worker_outlives_its_connection_and_says_how_it_ended(worker, tmp_path):
    begun = worker(
        "start", "mine", "WORD=a b", "--", "bash", "-c", 'echo "$WORD"; sleep 1; echo late; exit 7'
    )
    assert begun.returncode == 0, begun.stderr
    assert worker("status", "mine").stdout == "running\n"
    again = worker("start", "mine", "--", "true")
    assert again.returncode == 2 and "running here already" in again.stderr
    followed = worker("follow", "mine", "host").stdout.splitlines()
    assert followed[:2] == ["[host] a b", "[host] late"]
    assert re.fullmatch(r"mine ended 7 \d+\.\d+", followed[2]) and len(followed) == 3
    assert worker("follow", "mine", "host", "2").stdout.splitlines()[0] == "[host] late"
    assert worker("status", "mine").stdout.startswith("ended 7 ")
    assert worker("status", "other").stdout == "absent\n"


@pytest.mark.parametrize(("number", "code"), [("TERM", "75"), ("KILL", "137")])
def test_a_signal_reaches_the_command(worker, tmp_path, number, code):
    waits = 'trap "exit 75" TERM; echo here; while true; do sleep 0.1; done'
    assert worker("start", "mine", "--", "bash", "-c", waits).returncode == 0
    while "here" not in (tmp_path / "runs/launch/mine/log").read_text():
        time.sleep(0.05)
    assert worker("signal", "mine", number).returncode == 0
    assert worker("follow", "mine").stdout.splitlines()[-1].startswith(f"mine ended {code} ")


def test_a_process_that_vanished_is_not_running(worker, tmp_path):
    folder = tmp_path / "runs" / "launch" / "mine"
    folder.mkdir(parents=True)
    (folder / "pid").write_text("1 1\n")  # a process by that number there is, but it began at another time
    (folder / "log").touch()
    assert worker("status", "mine").stdout == "absent\n"
    followed = worker("follow", "mine")
    assert followed.returncode == 137 and "vanished" in followed.stderr


def test_names_stay_in_their_folder(worker):
    result = worker("start", "../mine", "--", "true")
    assert result.returncode == 2 and "is no name of a run" in result.stderr


def test_json_is_what_the_scripts_read(tmp_path):
    command = [shutil.which("maxllm", path=str(Path(sys.executable).parent)), "machine", GPU]
    lines = subprocess.run([*command, "--shell"], capture_output=True, text=True, check=True).stdout
    facts = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert dict(line.split("=", 1) for line in lines.splitlines()) == {
        name: "" if value is None else str(value) for name, value in facts.items()
    }
