"""tools/bench_gpu.py on a CPU: its toy, what it says without a GPU, and its arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu
import gpu_jobs
import pytest

TOOL = Path(bench_gpu.__file__)
WITHOUT_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def job_of(words):
    """The only job of a command."""
    (job,) = bench_gpu.jobs_of(bench_gpu.options_of(words.split()))
    return job


def test_without_a_gpu_one_sentence_says_so():
    done = subprocess.run([sys.executable, TOOL], env=WITHOUT_GPU, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"bench_gpu: {bench_gpu.NO_GPU}\n")


def test_the_toy_trains():
    words = ["--tiny", "--json", "--frameworks", "ours", "--work", "train", "--remat", "full"]
    done = subprocess.run([sys.executable, TOOL, *words], env=WITHOUT_GPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["seconds"])
    assert row["mfu"] is None and row["floor_seconds"] is None  # no card whose peaks are known


@pytest.mark.parametrize(
    "words",
    ["ours --work decode", "torch --work decode", "torch --work train --remat full"],
    ids=["ours", "torch", "torch_trains"],
)
def test_the_rest_of_the_toy(words):
    """In this process."""
    job = job_of(f"--tiny --frameworks {words}")
    if job.framework == "torch":
        pytest.importorskip("torch")
    measured = (gpu_jobs.ours if job.framework == "ours" else gpu_jobs.torchs)(job)
    assert measured["first_seconds"] > 0 and measured["peak_bytes"] == 0


def test_what_a_step_needs_by_hand():
    """Llama-3.2-1B has 1,235,814,400 parameters, of which its norms, 33 of 2,048, are not multiplied; each is
    read or written 7 times in float32 by AdamW, each that is multiplied read 3 times in bfloat16."""
    flops, moved = bench_gpu.needs(job_of("--frameworks ours --work train --remat full"))
    parameters, tokens = 1_235_814_400, 4 * 2048
    multiplied = parameters - 33 * 2048
    attention = (
        3 * 16 * 2 * 2 * 2048 * 2048 / 2
    )  # forward and twice that backward, layers, q k and p v, D, T / 2
    assert flops == tokens * (6 * multiplied + attention)
    assert moved == 7 * 4 * parameters + 3 * 2 * multiplied


def test_what_a_token_needs_by_hand():
    """16 rows, after 128 tokens of a prompt and 160 more: the mean of 64 to 256."""
    flops, moved = bench_gpu.needs(job_of("--frameworks ours --work decode"))
    multiplied, context = 1_235_814_400 - 33 * 2048, 128 + 160
    assert flops == 16 * (2 * multiplied + 16 * 2 * 2 * 2048 * context)
    assert moved == 2 * (multiplied + 16 * context * 16 * 2 * 8 * 64)


@pytest.mark.parametrize(
    ("stderr", "error"),
    [
        ("…\nRESOURCE_EXHAUSTED: 9 GB", "out of memory"),
        ("…\nImportError: no torch\n", "ImportError: no torch"),
    ],
    ids=["memory", "other"],
)
def test_what_fails_is_a_row(monkeypatch, capsys, stderr, error):
    def failing(asked, platform):
        if asked == platform:
            return subprocess.CompletedProcess([], 0, '{"kind": "NVIDIA H200"}\n', "")
        return subprocess.CompletedProcess([], 1, "", stderr)

    monkeypatch.setattr(bench_gpu, "in_process", failing)
    code = bench_gpu.main(["--json", "--frameworks", "torch", "--work", "train", "--remat", "full"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row == {"framework": "torch", "work": "train", "remat": "full", "error": error}
    assert code == (0 if error == "out of memory" else 1)


def test_a_card_has_a_floor_and_an_mfu(monkeypatch, capsys):
    """An H200 with half of its peak."""
    flops, _ = bench_gpu.needs(job_of("--frameworks ours --work train --remat none"))

    def measured(asked, platform):
        said = {"seconds": flops / 989e12 * 2, "first_seconds": 60.0, "peak_bytes": 30e9}
        said = {"kind": "NVIDIA H200"} if asked == platform else said
        return subprocess.CompletedProcess([], 0, json.dumps(said), "")

    monkeypatch.setattr(bench_gpu, "in_process", measured)
    words = ["--frameworks", "ours", "--work", "train", "--remat", "none"]
    assert bench_gpu.main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["mfu"], row["gap"]) == (pytest.approx(0.5), pytest.approx(2.0))
    assert bench_gpu.main(words) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H200" in shown and "50.0%" in shown and "30.00" in shown
