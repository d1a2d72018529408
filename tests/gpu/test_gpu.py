"""bfloat16 on a GPU against float64 on the CPU beside it, each check in its own process (`make test-gpu`);
and the same checks on the CPU, with XLA's attention, in `make test` and `make test-slow`.

    pytest -m gpu      on a machine with one NVIDIA GPU and maxllm[cuda]; elsewhere it says that there is none
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import gpu_checks
import pytest

HERE = Path(__file__).parent


def run_check(name):
    """The finished process of one check, which sees GPU and CPU, without the flags of conftest.py."""
    ours = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.run(
        [sys.executable, HERE / "gpu_checks.py", name],
        env=os.environ | ours | {"PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="session")
def _gpu():
    """Skips what needs a GPU where there is none."""
    done = run_check("gpu")
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
@pytest.mark.usefixtures("_gpu")
def test_on_a_gpu(name):
    done = run_check(name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])


def test_without_a_gpu_one_sentence_says_so():
    """In a process that is shown no GPU."""
    done = subprocess.run(
        [sys.executable, HERE / "gpu_checks.py", "step"],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, f"{gpu_checks.NO_GPU}\n", "")


ON_CPU = [
    "attention, window",
    "decoding",
    pytest.param("step, parameters in the host's memory", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", ON_CPU)
def test_the_checks_hold_on_a_cpu(name):
    figures = gpu_checks.CHECKS[name]()
    assert all(figure <= 1 for figure in figures.values())


@pytest.mark.parametrize("changes", [{"window": 6}, {"segments": 1}], ids=["window", "documents"])
def test_another_mask_is_found(monkeypatch, changes):
    """A window of 6 keys for 8; queries that see other documents."""
    attend = gpu_checks.attend

    def wrong(backend, q, k, v, keys, window):
        if "segments" in changes:
            both = (keys.query_segments_BT > 0).astype("int32")
            keys = keys.replace(query_segments_BT=both, key_segments_BS=both)
        return attend(backend, q, k, v, keys, changes.get("window", window))

    check = partial(gpu_checks.check_attention, window=8, packed=True, T=72)
    assert check()["xla"] <= 1
    monkeypatch.setattr(gpu_checks, "attend", wrong)
    with pytest.raises(AssertionError, match="shares of what rounding allows"):
        check()
