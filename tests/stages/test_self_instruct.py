"""generate --prompts: rows from a model, the same however they are batched and whatever is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maxllm.cli import main
from maxllm.config.data import DataConfig
from maxllm.data.chat import in_loss
from maxllm.data.conversation import read_conversation
from maxllm.data.growing import Growing
from maxllm.data.instruct import RowReader
from maxllm.data.load_tokenizer import load_tokenizer
from maxllm.data.tokenizer import IM_END
from maxllm.folder import RunFolder
from maxllm.model.llama import Llama
from maxllm.run.checkpoint import save_params
from maxllm.stages import chat
from maxllm.stages.questions import instruction_in

WORDS = ("generation.temperature=1.2", "generation.max_new_tokens=8")

PROMPTS: list[Any] = [
    {"prompt": "What is the last digit?\n417", "answer": "7", "task": "digits"},
    {"instruction": "末位为何？", "input": "35", "output": "5"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"prompt": "To be, or not to be: that is the question, " * 9},
    {"question": "a"},
    {
        "prompt": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ]
    },
    {"prompt": "How many digits are there?\n12", "system": "Count"},
]


@pytest.fixture(scope="module")
def teacher(
    policy_at: Any, tiny_model: Any, params_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny run whose model ends its turn often enough."""
    folder = policy_at(tmp_path_factory.mktemp("teacher") / "run")
    params = params_of(Llama(tiny_model(vocab_size=512)))
    shutil.rmtree(folder / "checkpoints")
    save_params(RunFolder(folder), params | {"lm_head": params["lm_head"].at[:, IM_END].multiply(6)})
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts in several forms, the fourth too long."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PROMPTS), encoding="utf-8")
    return path


def command(teacher: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    """The words of one."""
    words = ["generate", str(teacher), "--prompts", str(prompts), "--out", str(out), "data.max_bad_share=0.5"]
    return [*words, *WORDS, "--samples", "3", "--batch", "4", "--keep-rejected", "--json", *more]


def contents(folder: Path) -> dict[str, bytes]:
    """What lies there, but for locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(teacher: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a file that was made without interruption."""
    out = tmp_path_factory.mktemp("made") / "made.jsonl"
    assert main(command(teacher, prompts, out, "--novelty", "0.9")) == 0
    return out.parent


def test_what_is_in_the_files(made: Path, prompts: Path, teacher: Path) -> None:
    kept, rejected = lines(made / "made.jsonl"), lines(made / "made.rejected.jsonl")
    facts = json.loads((made / "made.jsonl.progress").read_text())["facts"]
    assert facts["replies"] == len(kept) + len(rejected) == 18 and facts["kept"] == len(kept) >= 3
    assert "unfinished" in facts["dropped"] and sum(facts["dropped"].values()) == len(rejected)
    places = {(row["meta"]["made_from"], row["meta"]["sample"]) for row in (*kept, *rejected)}
    assert places == {(f"{prompts} line {n}", sample) for n in (1, 2, 3, 5, 6, 7) for sample in range(3)}
    digits = next(row for row in (*kept, *rejected) if row["meta"]["made_from"].endswith("line 1"))
    assert (digits["meta"]["answer"], digits["meta"]["task"]) == ("7", "digits")
    assert all(row["meta"]["finished"] and 1 <= row["meta"]["tokens"] <= 7 for row in kept)


def test_sft_reads_every_row_and_every_field(made: Path, teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    reader = RowReader(
        DataConfig(strict=True, max_bad_share=0),
        "instruction",
        0,
        lambda row: read_conversation(tokenizer, row, 64),
        lambda conversation: conversation.prompt,
    )
    rows, [tally] = reader.read([str(made / "made.jsonl")])
    assert len(rows) == tally.kept == len(lines(made / "made.jsonl")) and not tally.unread
    for _, conversation in rows:
        assert [in_loss(turn) for turn in conversation.messages][-1]
        assert sum(map(in_loss, conversation.messages)) == 1


def test_a_reply_does_not_depend_on_its_batch(teacher: Path) -> None:
    """Greedy and sampled, in a batch with others of three lengths and alone."""
    for temperature in ("0", "1.2"):
        policy = chat.Policy(RunFolder(teacher), [*WORDS, f"generation.temperature={temperature}"])
        texts = ["a", "What is the last digit?\n417", "To be, or not to be: that is the", "末位为何？\n35"]
        ids = [policy.prompt_ids(text) for text in texts]
        draws = [(n, 1) for n in range(len(ids))]
        together = policy.replies(ids, draws, rows=16)
        assert [policy.replies([one], [draw])[0] for one, draw in zip(ids, draws, strict=True)] == together
        if temperature == "0":
            assert [policy.reply(one) for one in ids] == together
        else:
            assert policy.replies(ids[:1], [(0, 2)]) != together[:1]


KILLED = """
import os, signal, sys
from maxllm.data.growing import Growing
write = Growing._write
def writing(self):
    if self.batches == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self)
Growing._write = writing
from maxllm.cli import main
main(sys.argv[1:])
"""


def test_a_kill_changes_nothing(made: Path, teacher: Path, prompts: Path, tmp_path: Path) -> None:
    """kill -9 with the second batch in the files and not yet in the progress; then the same command."""
    words = command(teacher, prompts, tmp_path / "made.jsonl", "--novelty", "0.9")
    assert subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True).returncode == -9
    left = contents(tmp_path)
    assert json.loads(left["made.jsonl.progress"])["batches"] == 1
    assert main(words) == 0
    assert contents(tmp_path) == contents(made) != left


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["generation.temperature=0.5"],
            "begun with generation.temperature=1.2, not 0.5; give another --out",
        ),
        (["--novelty", "0.5"], "begun with --novelty=0.9, not 0.5"),
        (["--prompts", "tasks:train:3"], "begun with the prompts=6 of content "),
    ],
)
def test_another_command_on_the_same_file(
    made: Path,
    teacher: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    before = contents(made)
    assert main(command(teacher, prompts, made / "made.jsonl", "--novelty", "0.9", *words)) == 2
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and error[-1].endswith("made.jsonl.progress")
    assert contents(made) == before


def test_the_same_command_on_a_whole_file(
    made: Path, teacher: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(made)
    assert main(command(teacher, prompts, made / "made.jsonl", "--novelty", "0.9")) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["replies"] == 18 and "tokens_per_second" not in told.out
    assert "prompts.jsonl: 7 rows, 6 kept; 1 dropped: the prompt is longer than 56 tokens" in told.err
    assert contents(made) == before


def bootstrap(teacher: Path, prompts: Path, out: Path) -> list[str]:
    """Words that ask for new instructions."""
    words = ["generate", str(teacher), "--prompts", str(prompts), "--out", str(out), "generation.context=256"]
    return [*words, *WORDS, "--bootstrap", "4", "--count", "9", "--batch", "3", "--json"]


def test_new_instructions(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was kept is shown; stopped half-way, the file goes on as it would have."""
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("a", "b", "c", "d", "e")))
    asked: list[str] = []
    prompt_ids = chat.Policy.check_prompt
    monkeypatch.setattr(
        chat.Policy,
        "check_prompt",
        lambda policy, ids: (asked.append(policy.session.tokenizer.decode(ids)), prompt_ids(policy, ids))[1],
    )
    (tmp_path / "whole").mkdir()
    assert main(bootstrap(teacher, seeds, tmp_path / "whole" / "new.jsonl")) == 0
    kept = lines(tmp_path / "whole" / "new.jsonl")
    assert len({row["prompt"] for row in kept}) == len(kept) >= 3
    assert all("\n" not in row["prompt"] and row["meta"]["finished"] for row in kept)
    assert len(asked) == 5 + 9 and all("4. " in text and "5. " not in text for text in asked[5:])

    append = Growing.append

    def stopped(growing: Growing, *words: Any) -> None:
        if growing.batches == 2:
            raise KeyboardInterrupt
        append(growing, *words)

    (tmp_path / "part").mkdir()
    monkeypatch.setattr(Growing, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(bootstrap(teacher, seeds, tmp_path / "part" / "new.jsonl"))
    monkeypatch.setattr(Growing, "append", append)
    assert main(bootstrap(teacher, seeds, tmp_path / "part" / "new.jsonl")) == 0
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("reply", "instruction", "whole"),
    [
        ("Name three fruits.", "Name three fruits.", False),
        ("\n9. “Name three fruits.”\n10. Sing.", "Name three fruits.", True),
        ("Sure! Here is one:\n\nTask 9: Name three fruits.\n", "Name three fruits.", True),
        ("5、说出三种水果。", "说出三种水果。", False),
        (" \n", "", False),
    ],
)
def test_the_instruction_in_a_reply(reply: str, instruction: str, whole: bool) -> None:
    assert instruction_in(reply) == (instruction, whole)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "made.json"], "--out made.json does not end in .jsonl"),
        (["--out", "made.jsonl", "--count", "3"], "--count is of new instructions; give --bootstrap K"),
        (["--out", "made.jsonl", "--bootstrap", "2", "--samples", "2"], "with --bootstrap give --count"),
        (["--out", "made.jsonl", "--checker", "no.py:f"], "no.py does not exist"),
        (["--out", "made.jsonl", "--samples", "2"], "would give the same reply to a prompt each time"),
        (["--out", "made.jsonl", "--bootstrap", "9"], "--bootstrap 9 needs as many different instructions"),
        (["--out", "made.jsonl", "--prompts", "no.jsonl"], "no.jsonl does not exist"),
        (["--out", "made.jsonl", "optimizer.clip_norm=1"], "here one may set mesh, generation"),
    ],
)
def test_wrong_words_are_one_sentence(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(teacher), "--prompts", "tasks:train:2", *WORDS[1:], *words]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompts", "p.jsonl"], "--prompts needs --out FILE.jsonl"),
        (["--prompt", "a", "--samples", "2"], "--samples goes with --prompts"),
        (["--prompt", "a", "--prompts", "p.jsonl"], "not allowed with"),
        (
            ["--prompts", "p.jsonl", "--out", "o.jsonl", "--novelty", "7"],
            "7 is not a number above 0 and up to 1",
        ),
        (
            ["--prompts", "p.jsonl", "--out", "o.jsonl", "--batch", "0"],
            "0 is not a whole number of 1 or more",
        ),
        ([], "one of the arguments --prompt --prompts is required"),
    ],
)
def test_words_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "run", *words])
    assert end.value.code == 2 and says in capsys.readouterr().err
