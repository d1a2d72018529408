"""Two real processes with two devices each train as one process with four."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small recipe and its prepared corpus."""
    folder = tmp_path_factory.mktemp("multiprocess")
    words = ["pretrain/tiny_slice_cpu_fast", "run.steps=6", "run.log_every=1", "run.eval_every=3"]
    words += ["data.sources=['slice:tang']", "tokenizer.vocab_size=3000", "model.vocab_size=3000"]
    words += ["tokenizer.character_coverage=0.98", f"tokenizer.path={folder / 'tokenizer.model'}"]
    words += [f"data.prepared_dir={folder / 'corpus'}", "batch.sequence_length=64", "batch.rows=8"]
    words += ["mesh.data=2", "mesh.fsdp=2", "model.n_layers=2", "model.scan_unroll=1"]
    subprocess.run([sys.executable, "-m", "maxllm.cli", "prepare", *words], check=True, capture_output=True)
    return words


def logged(folder: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_get_the_losses_of_one(recipe_words: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    one = environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "maxllm.cli", "pretrain", *recipe_words, f"run.dir={tmp_path / 'one'}"],
        check=True,
        capture_output=True,
        env=one,
    )
    two = environment | {"DEVICES_PER_PROCESS": "2", "MAXLLM": str(Path(sys.executable).parent / "maxllm")}
    script = str(ROOT / "launch" / "local_multiprocess.sh")
    result = subprocess.run(
        ["bash", script, "2", "pretrain", *recipe_words, f"run.dir={tmp_path / 'two'}"],
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


def test_wrong_usage_is_explained() -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "launch" / "local_multiprocess.sh"), "x"], capture_output=True
    )
    assert result.returncode == 2 and b"usage" in result.stderr
