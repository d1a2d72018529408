"""Two real processes with two devices each train as one process with four."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import trainers
from environments import ONE_DEVICE

ROOT = Path(__file__).parents[2]


def logged(folder: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_get_the_losses_of_one(recipe_words: list[str], tmp_path: Path) -> None:
    four = f"{ONE_DEVICE['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    one = ONE_DEVICE | {"XLA_FLAGS": four, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "maxllm.cli", "pretrain", *recipe_words, f"run.dir={tmp_path / 'one'}"],
        check=True,
        capture_output=True,
        env=one,
    )
    two = ONE_DEVICE | {"MAXLLM": str(Path(sys.executable).parent / "maxllm")}
    script = ["bash", str(ROOT / "launch" / "local.sh"), "--processes", "2", "--devices", "2"]
    result = subprocess.run(
        [*script, "pretrain", *recipe_words, f"run.dir={tmp_path / 'two'}"],
        capture_output=True,
        text=True,
        env=two,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    single, double = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [r["step"] for r in single] == [r["step"] for r in double]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["hardware"]["processes"] == 2 and summary["hardware"]["devices"] == 4
    # float32 sums in another order: about 1e-6 relative on a loss near 8, growing a little with each update
    for a, b in zip(single, double, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        else:
            assert a["heldout"]["loss"] == pytest.approx(b["heldout"]["loss"], rel=1e-5)


def test_layers_in_a_loop_across_processes_are_refused(recipe_words: list[str], tmp_path: Path) -> None:
    """Gloo would mix up their weights, and abort."""
    words = [word for word in recipe_words if not word.startswith("mesh.")]
    words += ["mesh.data=1", "mesh.fsdp=2", f"run.dir={tmp_path / 'run'}"]
    result = subprocess.run(
        ["bash", str(ROOT / "launch" / "local.sh"), "pretrain", *words],
        capture_output=True,
        text=True,
        env=ONE_DEVICE | {"MAXLLM": str(Path(sys.executable).parent / "maxllm")},
        timeout=300,
    )
    assert result.returncode == 2
    assert "mesh.fsdp goes over several processes of CPUs" in result.stderr
    assert "model.scan_unroll=2" in result.stderr and not (tmp_path / "run").exists()


WORKER = """#!/usr/bin/env bash
# A process of the run: says that it is there, does what the test asks of it, then waits to be asked to stop.
[ "$2" = deaf ] && trap '' TERM
[ "$2" = deaf ] || trap 'echo "process $MAXLLM_PROCESS_ID stops"; exit 75' TERM
echo "process $MAXLLM_PROCESS_ID is there"
case "$MAXLLM_PROCESS_ID $2" in
  "1 killed") sleep 0.2; kill -KILL $$ ;;
  "1 fails" | "1 deaf") sleep 0.2; exit 3 ;;
  "0 stopped") kill -STOP $$ ;;
  "1 stopped") sleep 0.5; exit 5 ;;
esac
for _ in $(seq 600); do sleep 0.05; done
"""


@pytest.fixture
def launch(tmp_path: Path):
    """launch(what, signals): starts three workers; signals go to the launcher once all are there."""
    worker = tmp_path / "worker.sh"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    words = ["--processes", "3", "--grace-seconds", "1"]

    def run(what: str, *signals: int) -> subprocess.CompletedProcess:
        script = ["bash", str(ROOT / "launch" / "local.sh"), *words, "pretrain", what]
        out = tmp_path / "out"
        with out.open("w") as stream:
            process = subprocess.Popen(
                script, stdout=stream, stderr=stream, env=os.environ | {"MAXLLM": str(worker)}
            )
            for number in signals:
                while out.read_text().count("is there") < 3:
                    time.sleep(0.05)
                process.send_signal(number)
                time.sleep(0.2)
            code = process.wait(timeout=60)
        return subprocess.CompletedProcess(script, code, out.read_text())

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash 5.1 and setsid")
@pytest.mark.parametrize(
    ("what", "code", "sentence"),
    [
        ("killed", 137, "process 1 was killed first, by SIGKILL (out of memory, perhaps"),
        ("fails", 3, "process 1 failed first, with exit code 3; the others were ended for it"),
        ("deaf", 3, "process 1 failed first, with exit code 3; the others were ended for it"),
        ("stopped", 5, "process 1 failed first, with exit code 5; the others were ended for it"),
    ],
)
def test_when_one_fails_all_end_and_the_first_is_named_last(launch, what, code, sentence) -> None:
    """Killed, failed; the others deaf to SIGTERM, or one of them stopped; or one stopped and none failed."""
    result = launch(what)
    assert result.returncode == code, result.stdout
    assert sentence in result.stdout.splitlines()[-1]
    assert ("has been stopped (SIGSTOP) for 2 s" in result.stdout) == (what == "forgotten")


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash 5.1 and setsid")
def test_a_signal_to_the_launcher_stops_all_saved_and_a_second_one_kills(launch) -> None:
    result = launch("calm", signal.SIGTERM)
    assert result.returncode == 75 and result.stdout.count("stops") == 3
    assert launch("deaf-to-one", signal.SIGINT).returncode == 75
    deaf = launch("deaf", signal.SIGTERM, signal.SIGTERM)
    assert deaf.returncode in (3, 137) and "stops" not in deaf.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash 5.1 and setsid")
def test_a_run_whose_process_is_killed_says_so(recipe_words: list[str], tmp_path: Path) -> None:
    """Process 0, where JAX's coordination service runs: the other is aborted by JAX, and says why."""
    few = {"MAXLLM": str(Path(sys.executable).parent / "maxllm")}
    script = ["bash", str(ROOT / "launch" / "local.sh"), "--devices=2", "pretrain", *recipe_words]
    log = tmp_path / "log"
    with log.open("w") as stream:
        words = [*script, f"run.dir={tmp_path / 'run'}", "run.steps=100000", "run.eval_every=1000"]
        launcher = subprocess.Popen(words, stdout=stream, stderr=stream, env=ONE_DEVICE | few)
        while "step 3/" not in log.read_text():
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.1)
        [victim] = trainers(tmp_path / "run", MAXLLM_PROCESS_ID="0")
        os.kill(victim, signal.SIGKILL)
        assert launcher.wait(timeout=120) == 137
    text = log.read_text()
    assert "process 0 was killed first, by SIGKILL" in text.splitlines()[-1]
    assert f"process 0 on {socket.gethostname()} was killed by SIGKILL" in text
    assert "process 1 ends for it" in text
    assert "cannot be written" not in text and "Traceback" not in text


SLOW = """#!{python}
# maxllm with steps of a second and more, of which process 1 is asked to stop during the third.
import os, signal, sys, time
from maxllm import cli
from maxllm.run import loop

compile_program = loop.compile_program

def slow(*args, **options):
    step, seconds = compile_program(*args, **options)
    done = 0

    def call(*args):
        nonlocal done
        done += 1
        time.sleep(1.0)
        if done == 3 and os.environ["MAXLLM_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    return call, seconds

loop.compile_program = slow
sys.exit(cli.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash 5.1 and setsid")
def test_long_steps_stop_after_the_one_in_which_a_process_was_asked(
    recipe_words: list[str], tmp_path: Path
) -> None:
    """SIGTERM to one of two processes, as a preempted machine gets it: both save at the end of that step."""
    program = tmp_path / "slow.py"
    program.write_text(SLOW.replace("{python}", sys.executable))
    program.chmod(0o755)
    few = {"MAXLLM": str(program), "PYTHONPATH": str(ROOT)}
    script = ["bash", str(ROOT / "launch" / "local.sh"), "--devices=2", "pretrain", *recipe_words]
    result = subprocess.run(
        [*script, f"run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env=ONE_DEVICE | few,
        timeout=300,
    )
    assert result.returncode == 75, result.stderr
    assert result.stderr.count("stopped after step 3 of 6 and saved") == 2
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
