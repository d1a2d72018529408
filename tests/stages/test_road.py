"""The whole road, fast: every stage, every figure, every verb on what it left; and kill -9 on the way."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from environments import ONE_DEVICE
from safetensors.numpy import load_file

STAGES = ("pretrain", "sft", "reward", "ppo")


def maxllm(*words: object, stdin: str | None = None) -> subprocess.CompletedProcess:
    """One command of the CLI, in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "maxllm.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=ONE_DEVICE,
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


FIGURES = (
    *("bits_per_byte", "bits_per_byte_unigram", "bits_per_byte_bigram", "reward_pair_accuracy"),
    *("sft_exact_match_before", "sft_exact_match_after", "ppo_score_before", "ppo_score_after"),
    *("ppo_exact_match_before", "ppo_exact_match_after", "ppo_kl"),
)


def test_every_figure_is_there(summary: dict) -> None:
    assert all(isinstance(summary[name], float) for name in FIGURES)
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
    answers = ok("chat", road / "sft", stdin="What is the last digit?\n\nhello\n")
    assert answers.count("\n") == 2 and answers.strip()


@pytest.mark.slow
def test_kill_9_in_every_stage_then_the_same_end(road: Path, summary: dict, tmp_path: Path) -> None:
    """The quickstart is killed after each stage's first checkpoint, and ends with the very same figures."""
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "maxllm.cli", "quickstart", "--fast", "--out", str(out), "--json"]
    for stage in STAGES:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_DEVICE
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
        if name not in ("seconds", "hardware", "runs"):
            assert again[name] == value, name
    for stage in STAGES:
        undisturbed, killed = final_arrays(road / stage), final_arrays(out / stage)
        assert undisturbed.keys() == killed.keys()
        for name, array in undisturbed.items():
            np.testing.assert_array_equal(killed[name], array, err_msg=f"{stage} {name}")


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """Every array of a run's last checkpoint: parameters, optimizer, PPO's critic."""
    last = max(
        (run / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1
    )
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {item: checkpointer.restore((last / item).absolute()) for item in ("params", "rest")}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    assert len(leaves) > 20
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_ppo_moves_its_models(road: Path) -> None:
    """Else nothing above could see PPO break."""
    before, after = final_arrays(road / "sft"), final_arrays(road / "ppo")
    name = "['params']['decoder']['layers']['mlp']['w_up']"
    assert 1e-4 < np.abs(after[name] - before[name]).max() < 0.1


@pytest.mark.parametrize(
    "moment",
    [
        "tokenizing",
        "sft: step 0 held out",
        "hf",
        *(
            pytest.param(moment, marks=pytest.mark.slow)
            for moment in ("pretrain: step 40/40", "sft: compiled", "ppo: step 4/4")
        ),
    ],
)
def test_ctrl_c_ends_the_road_at_once_wherever_it_comes(moment: str, road: Path, tmp_path: Path) -> None:
    """Exit 75 before another stage begins. That the same command continues is shown by the kills above for
    the road, and for a stage that a signal stopped by tests/run/test_resume.py."""
    out = tmp_path / "quickstart"
    stage = {"pretrain": 0, "sft": 1, "ppo": 3, "hf": 4, "tokenizing": -1}[moment.partition(":")[0]]
    done = ["corpus", "tokenizer.model", *STAGES[:stage]] if stage >= 0 else []
    for name in done:  # what stands before the moment, as the undisturbed road left it
        copy = shutil.copytree if (road / name).is_dir() else shutil.copy
        out.mkdir(exist_ok=True)
        copy(road / name, out / name)
    words = [sys.executable, "-m", "maxllm.cli", "quickstart", "--fast", "--out", str(out), "--json"]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_DEVICE
    )
    assert process.stderr is not None
    said = ""
    if moment in ("tokenizing", "hf"):
        while not (out / (".corpus.partial" if moment == "tokenizing" else ".hf.partial")).exists():
            assert process.poll() is None
            time.sleep(0.005)
    else:
        for line in process.stderr:
            said += line
            if moment in line:
                break
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    assert process.wait() == 75, said
    assert "Traceback" not in said and "the same command continues" in said
    assert not (out / "summary.json").exists()
    following = STAGES[stage + 1 :] if moment not in ("hf", "tokenizing") else ()
    assert not any((out / name).exists() for name in following)


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
    flags = ONE_DEVICE | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(words, capture_output=True, text=True, env=flags)
    assert result.returncode == 2
    assert "batch.rows=3" in result.stderr and "does not divide" in result.stderr
    assert not (tmp_path / "x").exists()


def test_critic_and_reward_model_are_exported_and_are_not_the_same(road: Path, tmp_path: Path) -> None:
    """Each gives its scores in transformers; the critic began as the reward model and was trained since."""
    critic = json.loads(ok("export", road / "ppo", tmp_path / "critic", "--critic", "--json"))
    reward = json.loads(ok("convert", "to-hf", road / "reward", tmp_path / "reward", "--verify", "--json"))
    assert critic["max_abs_score_diff"] < 1e-4 and reward["max_abs_logit_diff"] < 1e-4
    heads = [
        load_file(tmp_path / name / "model.safetensors")["score.weight"] for name in ("critic", "reward")
    ]
    assert 0 < np.abs(heads[0] - heads[1]).max() < 0.1
    assert "only ppo trains a critic" in refused("export", road / "sft", tmp_path / "no", "--critic")
    assert not (tmp_path / "no").exists()


def test_a_reply_as_long_as_a_training_row_is_refused_in_training_and_fine_in_chat(
    road: Path, tmp_path: Path
) -> None:
    row = "batch.sequence_length=32"
    start = f"start.policy={road / 'sft'}", f"start.reward={road / 'reward'}", f"run.dir={tmp_path / 'x'}"
    expected = "generation.max_new_tokens=32 leaves no room for a prompt in batch.sequence_length=32"
    assert expected in refused("ppo", "ppo/tiny_tasks_cpu_fast", *start, row, "generation.max_new_tokens=32")
    assert expected in refused("evaluate", road / "ppo", "generation.max_new_tokens=32")
    assert not (tmp_path / "x").exists()
    ok("generate", road / "ppo", "--prompt", "Hello", "generation.max_new_tokens=40")


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


def test_a_reward_model_scores_the_same_in_transformers(road: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    figures = json.loads(ok("export", road / "reward", tmp_path / "hf", "--json"))
    assert figures["max_abs_score_diff"] < 1e-4
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1


def test_a_stage_that_cannot_start_leaves_nothing(road: Path, tmp_path: Path) -> None:
    words = ("sft", "sft/tiny_tasks_cpu_fast", f"run.dir={tmp_path / 'x'}")
    assert "is a checkpoint of another model" in refused(*words, f"start.policy={road / 'reward'}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["evaluate", "generate", "export", "report"])
def test_readers_change_nothing(road: Path, tmp_path: Path, verb: str) -> None:
    """Not even a save that another process has under way."""
    run = tmp_path / "sft"
    shutil.copytree(road / "sft", run)
    (run / "checkpoints" / "70.orbax-checkpoint-tmp").mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    more = {"generate": ("--prompt", "hello"), "export": (tmp_path / "hf", "--no-verify")}
    ok(verb, run, *more.get(verb, ()))
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "report.html"}
    before.pop(run, None), after.pop(run, None)  # report.html stands there
    assert after == before


def test_evaluate_refuses_what_would_be_another_run(road: Path) -> None:
    assert "model.rope_theta is part of what" in refused("evaluate", road / "sft", "model.rope_theta=5")
    sentence = refused("evaluate", road / "pretrain", "data.heldout_sources=['x.jsonl']")
    assert "data.heldout_sources is part of what" in sentence and "data.prepared_dir" in sentence


def ppo_words(road: Path) -> tuple[str, ...]:
    """PPO from the road's policy and reward model."""
    starts = (f"start.policy={road / 'sft'}", f"start.reward={road / 'reward'}")
    return ("ppo", "ppo/tiny_tasks_cpu_fast", *starts)


def test_ppo_refuses_minibatches_that_the_devices_do_not_divide(road: Path, tmp_path: Path) -> None:
    rows = ("ppo.minibatches=4", "batch.rows=4", "batch.microbatches=1", f"run.dir={tmp_path / 'no'}")
    two = ONE_DEVICE | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "maxllm.cli", *ppo_words(road), *rows]
    result = subprocess.run(command, capture_output=True, text=True, env=two)
    assert result.returncode == 2, result.stderr
    assert "is 1 rows at a time, which mesh data x fsdp = 2 does not divide" in result.stderr


def test_ppo_refuses_what_it_cannot_learn_with(road: Path, tmp_path: Path) -> None:
    for setting, part in (("temperature=0", "is greedy"), ("top_k=5", "another distribution")):
        assert part in refused(*ppo_words(road), f"run.dir={tmp_path / 'x'}", f"generation.{setting}")
    assert not (tmp_path / "x").exists()


def test_sft_on_rows_that_also_have_a_prompt(road: Path, tmp_path: Path) -> None:
    """UltraChat's form: the question is the one in `messages`, and long prompts stay in training."""
    files = {}
    for name, digits in (("train", "12"), ("heldout", "22")):
        question = {"role": "user", "content": f"What is the last digit?\n{digits}"}
        talk = [question, {"role": "assistant", "content": "2"}]
        long = [{"role": "user", "content": digits + " word" * 140}, {"role": "assistant", "content": "no"}]
        rows = [{"prompt": f"{n}", "prompt_id": n, "messages": long if n % 2 else talk} for n in range(40)]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = (
        "sft",
        "sft/tiny_tasks_cpu_fast",
        f"start.policy={road / 'pretrain'}",
        f"run.dir={tmp_path / 'x'}",
    )
    figures = json.loads(
        ok(
            *words,
            *(
                f"data.sources=['{files['train']}']",
                f"data.heldout_sources=['{files['heldout']}']",
                "run.steps=5",
                "run.eval_every=5",
                "optimizer.warmup_steps=0",
            ),
            *("generation.max_new_tokens=128", "--json"),
        )
    )
    assert figures["sources"][0]["kept"] == 40
    assert (figures["heldout_conversations"], figures["heldout_items"]) == (40, 20)
    assert figures["heldout_last"]["exact_match"] < 1


def test_a_moved_quickstart_continues(road: Path, summary: dict, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(road, moved)
    assert json.loads(ok("quickstart", "--fast", "--out", moved, "--json")) == summary


@pytest.mark.parametrize("damage", ["", "{", "[1]"])
def test_a_damaged_summary_is_named(road: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(road / "sft", tmp_path / "sft")
    (tmp_path / "sft" / "summary.json").write_text(damage)
    sentence = refused(
        "reward", "reward/tiny_tasks_cpu_fast", f"start.policy={tmp_path / 'sft'}", "run.dir=x"
    )
    assert "summary.json is damaged" in sentence


def test_files_where_folders_should_be(road: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    start = f"start.policy={road / 'pretrain'}"
    assert str(tmp_path / "file") in refused(
        "sft", "sft/tiny_tasks_cpu_fast", start, f"run.dir={tmp_path / 'file'}"
    )
    assert str(tmp_path / "file") in refused("quickstart", "--fast", "--out", tmp_path / "file")
    assert str(tmp_path / "file") in refused("export", road / "sft", tmp_path / "file" / "x", "--no-verify")
