"""The command line: help, versions, and bad input that needs no trained run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maxllm import cli
from maxllm.cli import main

VERBS = (
    "quickstart",
    "prepare",
    "pretrain",
    "sft",
    "reward",
    "dpo",
    "ppo",
    "generate",
    "chat",
    "evaluate",
    "export",
)


def maxllm(*words: object) -> subprocess.CompletedProcess:
    """One command."""
    command = [sys.executable, "-m", "maxllm.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_names_every_verb() -> None:
    result = maxllm("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in (*VERBS, "report"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = maxllm(verb, "--help")
    assert result.returncode == 0 and len(result.stdout) > 200


def test_nothing_heavy_is_imported_by_the_command_line() -> None:
    code = "import sys, maxllm.cli, maxllm.options; maxllm.options.build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert not {"jax", "flax", "numpy", "transformers", "torch", "pydantic"} & set(loaded)


def test_version() -> None:
    assert maxllm("--version").stdout.startswith("maxllm 0.")


@pytest.mark.parametrize(
    ("words", "begins_again", "code"),
    [
        (("sft", "sft/tiny_tasks_cpu"), True, 75),
        (("quickstart",), True, 75),
        (("export", "run", "out"), False, 75),
        (("generate", "run", "--prompt", "sft"), False, 130),
        (("generate", "run", "--prompts", "a.jsonl", "--out", "b.jsonl"), False, 75),
        (("chat", "ppo"), False, 130),
        (("report", "export"), False, 130),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_a_command_is_its_verb_decides(monkeypatch, words, begins_again, code) -> None:
    """Whether it begins again with huge pages, and how it ends when it is interrupted; no other word does."""
    begun, handlers, ended = [], {}, []
    monkeypatch.setattr(sys, "argv", ["maxllm", *words])
    monkeypatch.setattr(cli, "restart_with_huge_pages", lambda: begun.append(True))
    monkeypatch.setattr(cli.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(cli, "leave", lambda code, sentence: ended.append(code))
    monkeypatch.setitem(cli.VERBS, words[0], lambda options: None)
    with pytest.raises(SystemExit):
        cli.entry()
    handlers[signal.SIGTERM]()
    assert (begun == [True], ended) == (begins_again, [code])


def test_print_config_is_a_recipe(tmp_path: Path) -> None:
    words = ("pretrain", "pretrain/tiny_slice_cpu", "optimizer.learning_rate=3e-4")
    printed = maxllm(*words, "--print-config").stdout
    recipe = tmp_path / "again.yaml"
    recipe.write_text(printed)
    assert "learning_rate: 0.0003" in printed
    assert maxllm("pretrain", recipe, "--print-config").stdout == printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("pretrain", "nowhere.yaml"), "nowhere.yaml"),
        (("pretrain", "pretrain/tiny_slice_cpu", "optimizer.lerning_rate=1"), "optimizer.learning_rate"),
        (("pretrain", "pretrain/tiny_slice_cpu", "run.steps=many"), "run.steps was given 'many'"),
        (("pretrain", "pretrain/tiny_slice_cpu", "run.steps=0"), "greater than 0"),
        (("pretrain", "pretrain/tiny_slice_cpu", "model.n_heads=3"), "n_heads"),
        (("pretrain", "pretrain/tiny_slice_cpu", "steps"), "section.field=value"),
        (("sft", "pretrain/tiny_slice_cpu"), "recipe for the stage pretrain"),
        (("evaluate", "nowhere"), "not a run folder"),
        (("report", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(words: tuple[str, ...], says: str) -> None:
    result = maxllm(*words)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_debug_shows_where_an_error_comes_from() -> None:
    result = maxllm("pretrain", "nowhere.yaml", "--debug")
    assert result.returncode == 2 and "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ('{"text": "fine and long enough to be kept"}\nnot json\n', "line 2 is not JSON"),
        ('{"body": "no text here"}\n', "has no field 'text'"),
        ('{"text": "short"}\n', "none of 1 rows was kept (too short: 1)"),
    ],
)
def test_prepare_refuses_bad_corpora_and_writes_nothing(tmp_path: Path, content: str, says: str) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text(content, encoding="utf-8")
    result = maxllm(
        *("prepare", "pretrain/tiny_slice_cpu", f"data.sources=['{source}']"),
        *(f"data.prepared_dir={tmp_path / 'prepared'}", f"tokenizer.path={tmp_path / 'tokenizer.model'}"),
    )
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_pretrain_before_prepare_says_what_to_do(tmp_path: Path) -> None:
    words = (f"tokenizer.path={tmp_path / 't.model'}", f"run.dir={tmp_path / 'run'}")
    result = maxllm("pretrain", "pretrain/tiny_slice_cpu", *words)
    assert result.returncode == 2 and "maxllm prepare" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["-1", "1.5", "often"])
def test_restarts_are_a_whole_number(word, capsys):
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "pretrain/tiny_slice_cpu", f"--restarts={word}"])
    assert end.value.code == 2
    assert f"{word} is not a whole number of 0 or more" in capsys.readouterr().err
