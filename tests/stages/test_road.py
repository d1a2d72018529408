"""The whole road, fast: every stage, every figure, every verb on what it left; and kill -9 on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGES = ("pretrain", "sft", "reward", "ppo")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
"""A user's: one device."""


def maxllm(*words: object, stdin: str | None = None) -> subprocess.CompletedProcess:
    """One command of the CLI, in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "maxllm.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        input=stdin,
    )


def ok(*words: object, stdin: str | None = None) -> str:
    """Standard output of a command that must succeed."""
    result = maxllm(*words, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(*words: object) -> str:
    """The one sentence of a command that must be refused as bad input."""
    result = maxllm(*words)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    [sentence] = [line for line in result.stderr.splitlines() if line.startswith("maxllm: ")]
    return sentence


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed fast quickstart."""
    out = tmp_path_factory.mktemp("road") / "quickstart"
    ok("quickstart", "--fast", "--out", out, "--json")
    return out


@pytest.fixture(scope="module")
def summary(road: Path) -> dict:
    """Its summary.json."""
    return json.loads((road / "summary.json").read_text(encoding="utf-8"))


def test_every_figure_is_there(summary: dict) -> None:
    figures = {
        *("bits_per_byte", "bits_per_byte_unigram", "bits_per_byte_bigram", "reward_pair_accuracy"),
        *("sft_exact_match_before", "sft_exact_match_after", "ppo_score_before", "ppo_score_after"),
        *("ppo_exact_match_before", "ppo_exact_match_after", "ppo_kl"),
    }
    assert all(isinstance(summary[name], float) for name in figures)
    assert set(summary["seconds"]) == {"prepare", *STAGES, "export", "total"}
    assert summary["heldout_items"]["sft_exact_match"] == 64
    assert summary["heldout_items"]["ppo"] == 64
    assert 0 < summary["bits_per_byte"] < summary["bits_per_byte_unigram"]
    assert summary["ppo_kl"] != 0.0


def test_the_export_was_checked(summary: dict) -> None:
    pytest.importorskip("torch")
    assert summary["export_greedy_identical"] is True
    assert summary["heldout_items"]["export_prompts"] == 12


def test_the_export_is_what_transformers_loads(road: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(road / "hf")
    model = AutoModelForCausalLM.from_pretrained(road / "hf", dtype=torch.float32)
    question = "What is the largest digit?\n4711"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    theirs = model.generate(**chat, do_sample=False, max_new_tokens=8)[0, chat["input_ids"].shape[1] :]
    words = ("generate", road / "ppo", "--prompt", question, "generation.temperature=0", "--json")
    [ours] = json.loads(ok(*words))
    assert ours["tokens"] == theirs.tolist()


def test_report_is_drawn(road: Path) -> None:
    page = (road / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 4
    assert "<script" not in page


def test_again_changes_nothing(road: Path, summary: dict) -> None:
    before = {path: path.stat().st_mtime_ns for path in road.rglob("metrics.jsonl")}
    assert json.loads(ok("quickstart", "--fast", "--out", road, "--json")) == summary
    assert {path: path.stat().st_mtime_ns for path in road.rglob("metrics.jsonl")} == before


@pytest.mark.parametrize("stage", STAGES)
def test_evaluate_repeats_the_figures_of_training(road: Path, stage: str) -> None:
    figures = json.loads(ok("evaluate", road / stage, "--json"))
    run = json.loads((road / stage / "summary.json").read_text(encoding="utf-8"))
    assert figures["step"] == run["steps"]
    for name, value in run["heldout_last"].items():
        assert figures[name] == value, name


def test_chat_answers_each_line(road: Path) -> None:
    answers = ok("chat", road / "sft", stdin="What is the last digit?\n\nhello\n").splitlines()
    assert len(answers) >= 2


def test_kill_9_in_every_stage_then_the_same_end(road: Path, summary: dict, tmp_path: Path) -> None:
    """The quickstart is killed after each stage's first checkpoint, and ends with the very same figures."""
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "maxllm.cli", "quickstart", "--fast", "--out", str(out), "--json"]
    for stage in STAGES:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        deadline = time.time() + 240
        while not any(path.name.isdigit() for path in (out / stage / "checkpoints").glob("*")):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "summary.json").exists()
    again = json.loads(ok("quickstart", "--fast", "--out", out, "--json"))
    for name, value in summary.items():
        if name not in ("seconds", "hardware"):
            assert again[name] == value, name


# --- bad input ----------------------------------------------------------------------------------------------


def test_fast_and_full_do_not_mix(road: Path) -> None:
    sentence = refused("quickstart", "--out", road)
    assert str(road / "pretrain") in sentence and "give another run.dir" in sentence


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    sentence = refused(
        "sft", "sft/tiny_tasks_cpu_fast", f"start.policy={tmp_path}", f"run.dir={tmp_path / 'x'}"
    )
    assert str(tmp_path) in sentence and "not a run folder" in sentence
    assert not (tmp_path / "x").exists()


def test_checkpoint_of_another_model(road: Path, tmp_path: Path) -> None:
    model = {"vocab_size": 2048, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128}
    words = [f"model.{name}={value}" for name, value in (model | {"max_seq_len": 256}).items()]
    sentence = refused(
        *("sft", "sft/tiny_tasks_cpu_fast", f"start.policy={road / 'pretrain'}"),
        *(f"run.dir={tmp_path / 'x'}", *words),
    )
    assert "d_ff=128" in sentence and "checkpoint" in sentence
    assert not (tmp_path / "x").exists()


def test_vocabulary_that_does_not_match(road: Path, tmp_path: Path) -> None:
    sentence = refused(
        *("pretrain", "pretrain/tiny_slice_cpu_fast", f"run.dir={tmp_path / 'x'}", "model.vocab_size=4096"),
        *(f"tokenizer.path={road / 'tokenizer.model'}", f"data.prepared_dir={road / 'corpus'}"),
    )
    assert "2048" in sentence and "4096" in sentence
    assert not (tmp_path / "x").exists()


def test_prompt_longer_than_the_context(road: Path) -> None:
    sentence = refused("generate", road / "ppo", "--prompt", "word " * 500)
    assert "max_seq_len=256" in sentence


def test_batch_that_the_mesh_does_not_divide(road: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "maxllm.cli", "sft", "sft/tiny_tasks_cpu_fast", "batch.rows=3"]
    words += [f"start.policy={road / 'pretrain'}", f"run.dir={tmp_path / 'x'}"]
    flags = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(words, capture_output=True, text=True, env=flags)
    assert result.returncode == 2
    assert "batch.rows=3" in result.stderr and "does not divide" in result.stderr
    assert not (tmp_path / "x").exists()


def test_bad_rows_are_named_and_counted(road: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', encoding="utf-8")
    words = (
        "sft",
        "sft/tiny_tasks_cpu_fast",
        f"start.policy={road / 'pretrain'}",
        f"run.dir={tmp_path / 'x'}",
    )
    sentence = refused(*words, f"data.sources=['{rows}']")
    assert "rows.jsonl line 2" in sentence and "'output'" in sentence and "1 of 2" in sentence
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_reward_model_does_not_speak(road: Path, tmp_path: Path) -> None:
    assert "reward model" in refused("generate", road / "reward", "--prompt", "hello")
    assert "reward model" in refused("export", road / "reward", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
