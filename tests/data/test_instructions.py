"""Instructions from templates: all different, of every kind, with right answers; bad words are refused."""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from maxllm.cli import main
from maxllm.data.fields import Fields
from maxllm.data.instructions import rows, templates
from maxllm.data.judge import check_answer
from maxllm.data.prompts import prompt_turns
from maxllm.data.rows import messages_of

TASKS = {
    *("open_qa", "classification", "extraction", "rewriting", "summarization", "brainstorming"),
    *("translation", "code", "math", "chain_of_thought"),
}


def text_of(row: dict[str, Any]) -> str:
    """What the user says."""
    return prompt_turns(Fields(row))[-1]["content"]


@pytest.mark.parametrize(("kind", "count"), [("instructions", 4000), ("thoughts", 3000), ("negatives", 136)])
def test_no_row_comes_twice_and_no_slot_stays_open(kind: str, count: int) -> None:
    made = list(rows(kind, count, seed=3))
    assert len({text_of(row) for row in made}) == len(made) == count
    said = [text_of(row) for row in made] + [
        row["messages"][-1]["content"] for row in made if "messages" in row
    ]
    assert not any(re.search(r"[{}]", text) for text in said)
    assert made == list(rows(kind, count, seed=3))
    assert made != list(rows(kind, count, seed=4))


def test_every_kind_in_both_languages() -> None:
    counts = Counter((row["meta"]["task"], row["meta"]["language"]) for row in rows("instructions", 40, 0))
    assert counts == dict.fromkeys(itertools.product(TASKS, ("en", "zh")), 2)
    assert {task for task, _ in templates("negatives")} == {"refusal", "clarification"}
    for row in rows("instructions", 200, 0):
        assert bool(re.search(r"[一-鿿]", row["prompt"])) == (row["meta"]["language"] == "zh")


def test_known_answers_are_right() -> None:
    """By the numbers in the text, in the order of their template."""
    ways = {
        ("math", 3): (lambda a, b, c: a - b + c, lambda b, c, a: b * c * a),
        ("chain_of_thought", 3): (lambda b, c, a: b * c + a, lambda a, c, b: a * c - b),
    }
    seen = Counter()
    for row in rows("instructions", 400, 0, ["math", "chain_of_thought"]):
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        right = {str(way(*numbers)) for way in ways[row["meta"]["task"], len(numbers)]}
        assert row["meta"]["answer"] in right
        assert ("<think>" in row["prompt"]) == (row["meta"]["task"] == "chain_of_thought")
        seen[row["meta"]["task"], row["meta"]["language"]] += 1
    assert set(seen.values()) == {100}


def test_thoughts_end_with_the_right_answer() -> None:
    for row in rows("thoughts", 200, 0):
        assert check_answer(row) is True and row["meta"]["task"] == "chain_of_thought"
        thoughts, answer = row["messages"][-1]["content"].split("</think>\n")
        sums = re.findall(r"(\d+) ?([×+-]) ?(\d+) ?= ?(\d+)", thoughts)
        signs = {"×": operator.mul, "+": operator.add, "-": operator.sub}
        assert [str(signs[sign](int(a), int(b))) for a, sign, b, _ in sums] == [found for *_, found in sums]
        assert answer == sums[-1][-1] == row["meta"]["answer"]


def test_negatives_are_rows_of_sft() -> None:
    for row in rows("negatives", 100, 0):
        fields = Fields(row)
        assert [turn["role"] for turn in messages_of(fields)] == ["user", "assistant"]
        assert not fields.unread()
        if row["meta"]["task"] == "clarification":
            assert row["messages"][-1]["content"].rstrip().endswith(("?", "？"))


def test_the_verb_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "math.jsonl"
    words = ["data", "instructions", "--count", "8", "--seed", "1", "--task", "math", "--task", "code"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == {"code": 4, "math": 4}
    lines = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(rows("instructions", 8, 1, ["math", "code"]))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["negatives", "--task", "math"], "--task math is none of the negatives, which are refusal, clar"),
        (["negatives", "--count", "9999"], "--count 9999 is more than the 136 different rows of negatives"),
        (["negatives", "--out", "there.jsonl"], "there.jsonl exists; remove it, or give another --out"),
        (["instructions", "--out", "made.json"], "does not end in .jsonl"),
    ],
)
def test_bad_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").touch()
    assert main(["data", words[0], "--out", "made.jsonl", *words[1:]]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert not Path("made.jsonl").exists()
