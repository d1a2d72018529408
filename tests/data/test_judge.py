"""Every filter of rows that a model made, and checkers that are right, wrong or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maxllm.data.judge import Judge, check_answer, load_checker, same_answer
from maxllm.data.novelty import Novelty
from maxllm.errors import UserError


def row(question: str = "q", reply: str = "a b c", **about: Any) -> dict[str, Any]:
    """A row as `generate` makes it."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {
        "messages": turns,
        "meta": {"finished": True, "tokens": 3, "made_from": "p.jsonl line 7", **about},
    }


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (row(finished=False), "unfinished"),
        (row(reply=" \n"), "empty"),
        (row(tokens=1), "too short"),
        (row(tokens=9), "too long"),
        (row(tokens=2), None),
        (row(tokens=8), None),
    ],
)
def test_finished_and_of_a_fit_length(made: dict[str, Any], reason: str | None) -> None:
    assert Judge(2, 8, None, None).reason(made) == reason


def test_only_what_is_kept_makes_others_old() -> None:
    judge = Judge(1, None, None, Novelty(0.7))
    assert judge.reason(row("Name a fruit", "an apple", finished=False)) == "unfinished"
    assert judge.reason(row("Name a fruit", "an apple")) is None
    assert judge.reason(row("Name a fruit!", "One apple.")) == "not new"
    assert judge.reason(row("What keeps the doctor away?", "an apple")) is None
    again = Judge(1, None, None, Novelty(0.7))
    again.remember(row("Name a fruit", "an apple"))
    assert again.reason(row("Name a fruit!", "One apple.")) == "not new"
    assert again.reason({"prompt": "Name a fruit. An apple", "meta": row()["meta"]}) == "not new"


CHECKS = """from dataclasses import dataclass

@dataclass
class Fine:
    word: str

def by_word(row):
    row["messages"].clear()
    return row["meta"]["word"]

def broken(row):
    a = 1
    return row["nothing"]
"""


def test_a_checker_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "checks.py"
    file.write_text(CHECKS)
    judge = Judge(1, None, load_checker(f"{file}:by_word"), None)
    assert [judge.reason(row(word=word)) for word in (True, False, "rude")] == [
        None,
        "refused by the checker",
        "rude",
    ]
    kept = row(word=True)
    assert judge.reason(kept) is None and len(kept["messages"]) == 2, "it is given a copy"
    assert [path.name for path in tmp_path.iterdir()] == ["checks.py"]
    for said in (None, 1, ""):
        with pytest.raises(UserError, match=r"said .* of the row made from p.jsonl line 7; it may say True"):
            judge.reason(row(word=said))
    with pytest.raises(
        UserError, match=r"checks.py line 13 failed at the row made from p.jsonl line 7: KeyE"
    ):
        Judge(1, None, load_checker(f"{file}:broken"), None).reason(row())


def test_another_content_is_another_checker(tmp_path: Path) -> None:
    file = tmp_path / "checks.py"
    file.write_text(CHECKS)
    before = load_checker(f"{file}:broken").content
    file.write_text(CHECKS + "\n")
    assert load_checker(f"{file}:broken").content != before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("right", "--checker right is not FILE.py:FUNCTION"),
        ("no.py:f", "no.py does not exist"),
        ("{file}:missing", "has no function missing"),
        ("{file}:CONSTANT", "has no function CONSTANT"),
        ("{broken}:f", "cannot be loaded: SyntaxError"),
    ],
)
def test_there_is_no_such_checker(tmp_path: Path, name: str, says: str) -> None:
    file, broken = tmp_path / "checks.py", tmp_path / "broken.py"
    file.write_text("CONSTANT = 1\n")
    broken.write_text("def f(:\n")
    with pytest.raises(UserError, match=says):
        load_checker(name.format(file=file, broken=broken))


@pytest.mark.parametrize(
    ("said", "answer", "same"),
    [
        ("The answer is 1,024.", "1024", True),
        ("12 + 5 = 17 apples", "17", True),
        ("17 of 20", "17", False),
        ("It is 17.0", "17", True),
        ("none", "17", False),
        (" -3", "-3", True),
        ("10-3", "-3", True),
        (" Paris\n", "Paris", True),
        ("in Paris", "Paris", False),
    ],
)
def test_the_last_number_of_a_reply_is_its_answer(said: str, answer: str, same: bool) -> None:
    assert same_answer(said, answer) is same


def test_known_answers_and_thoughts() -> None:
    assert check_answer(row()) is True
    assert check_answer(row(reply="6", answer="6")) is True
    assert check_answer(row(reply="7", answer="6")) == "wrong answer"
    thinking = {"answer": "6", "task": "chain_of_thought"}
    assert check_answer(row(reply="<think>2 x 3 = 6</think>\n6", **thinking)) is True
    assert check_answer(row(reply="<think>2 x 3 = 6</think>\n7", **thinking)) == "wrong answer"
    assert check_answer(row(reply="6", **thinking)) == "no thoughts"
    assert check_answer(row(reply="<think>6", **thinking)) == "no thoughts"
