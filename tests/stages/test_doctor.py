"""`maxllm doctor`: what is here, and a sentence for what would fail."""

import json
import subprocess

import pytest

from maxllm.cli import main
from maxllm.parallel.discovery import COORDINATOR, COUNT, INDEX
from maxllm.parallel.settings import SETTINGS, Settings
from maxllm.stages import doctor

GPUS = {"platform": "gpu", "kind": "NVIDIA H100", "count": 8}


@pytest.fixture
def found(capsys, monkeypatch):
    """found(devices, **environment): exit code, figures, stderr; JAX is asked where no devices are given."""
    monkeypatch.setattr(doctor, "ROOM_BYTES", 0)
    for name in (COORDINATOR, COUNT, INDEX):
        monkeypatch.delenv(name, raising=False)

    def look(devices=None, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if devices is not None:
            monkeypatch.setattr(doctor, "devices_here", lambda problems: devices)
        code = main(["doctor", "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return look


def test_this_machine(found):
    """Eight simulated devices, as tests/conftest.py makes them, and nothing that would fail."""
    code, figures, error = found()
    assert (code, figures["problems"], error) == (0, [], "")
    assert figures["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8}
    assert figures["job"] == {"launcher": "none: one process"}
    assert figures["free_bytes"] > 0 and figures["versions"].keys() >= {"python", "maxllm", "jax"}
    assert figures["extras"]["gguf"] == "installed" and "tpu" in figures["extras"]


def test_little_room_is_said(found, monkeypatch):
    monkeypatch.setattr(doctor, "ROOM_BYTES", 1 << 60)
    assert "GB are free in this folder: checkpoints may not fit" in found(GPUS)[1]["problems"][0]


def test_an_extra_is_installed_with_all_that_it_needs(monkeypatch):
    """`jax[cuda12]` is jax, which is always here, and CUDA's plugin, which may not be."""
    monkeypatch.setattr(doctor, "is_installed", lambda package: package not in ("gguf", "jax-cuda12-plugin"))
    extras = doctor.extras()
    assert extras["gguf"] == "missing gguf" and extras["check"] == "missing gguf"
    assert extras["cuda"] == "missing jax-cuda12-plugin"


def test_people_get_a_table(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ROOM_BYTES", 0)
    monkeypatch.setattr(doctor, "devices_here", lambda problems: GPUS)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H100" in said and "extras.cuda" in said


def test_a_job_is_shown(found):
    code, figures, _ = found(GPUS, **{COORDINATOR: "127.0.0.1:5000", COUNT: "2", INDEX: "1"})
    wanted = {"launcher": "settings", "coordinator": "127.0.0.1:5000", "processes": 2, "index": 1}
    assert code == 0 and figures["job"] == wanted


def test_what_the_environment_says_wrongly_would_fail(found):
    code, figures, error = found(GPUS, **{COUNT: "2", INDEX: "1"})
    assert code == 1 and len(figures["problems"]) == 1
    assert error.startswith(f"maxllm: a run would fail here: {COORDINATOR} is not set")


def test_a_host_without_an_address_would_fail(found):
    code, figures, _ = found(GPUS, **{COORDINATOR: "nowhere.invalid:5000", COUNT: "2", INDEX: "0"})
    assert (
        code == 1 and "the coordinator's host nowhere.invalid has no address here" in figures["problems"][0]
    )


def test_fewer_gpus_than_the_job_gives_would_fail(found):
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_GPUS_ON_NODE": "8",
    }
    assert found(GPUS, **slurm)[:1] == (0,)
    code, figures, _ = found(GPUS | {"count": 1}, **slurm)
    assert code == 1 and figures["problems"] == ["Slurm gives this process 8 GPUs, and JAX finds 1"]


def test_a_gpu_that_jax_does_not_use_would_fail(found, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setitem(SETTINGS, "gpu", Settings(devices=(str(tmp_path / "nvidia0"),)))
    code, figures, _ = found({"platform": "cpu", "kind": "cpu", "count": 1})
    assert (
        code == 1
        and "this machine has a GPU, and JAX uses the CPU: pip install 'maxllm[cuda]'"
        in (figures["problems"][0])
    )


def test_a_driver_that_hangs_or_aborts_is_a_sentence(found, monkeypatch):
    monkeypatch.setattr(doctor, "ASK_JAX", "import sys; sys.exit('no driver')")
    code, figures, _ = found()
    assert code == 1 and figures["problems"] == ["JAX finds no devices: no driver"]

    def hangs(*args, **options):
        raise subprocess.TimeoutExpired("jax", options["timeout"])

    monkeypatch.setattr(doctor.subprocess, "run", hangs)
    assert "JAX does not say within 120 s which devices are here" in found()[1]["problems"][0]
