"""Which rows that a model made are worth training on: finished, of a fit length, right, and new.

A checker is the user's own word on a row: a function `(row) -> bool | str` in a file of Python, named
`FILE.py:FUNCTION`; a text is the reason why the row goes. `answer` is one that is here already.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from maxllm.data.fields import ASIDE
from maxllm.data.novelty import Novelty
from maxllm.errors import UserError
from maxllm.files import file_hash
from maxllm.user_function import UserFunction, load_function

Row = dict[str, Any]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Checker:
    """A function that says of each row whether it is right."""

    function: UserFunction

    @property
    def content(self) -> str:
        """Which function it is: another content may judge otherwise."""
        if self.function is ANSWER:
            return ANSWER.name
        return f"{self.function.name.rpartition(':')[2]} of content {file_hash(self.function.file)}"

    def reason(self, row: Row, where: str) -> str | None:
        """Why a row goes, or None if it stays.

        Raises:
          UserError: the function fails, or says something else than it may.
        """
        said = self.function(copy.deepcopy(row), about=f"the row made from {where}")
        if isinstance(said, bool):
            return None if said else "refused by the checker"
        if isinstance(said, str) and said:
            return said
        raise UserError(
            f"the checker {self.function.name} said {said!r} of the row made from {where}; it may say True, "
            "False, or why the row goes"
        )


def load_checker(name: str) -> Checker:
    """The checker that a word of the command line names.

    Raises:
      UserError: there is none, or its file cannot be loaded.
    """
    return Checker(ANSWER if name == ANSWER.name else load_function(name, f"--checker {name}"))


def check_answer(row: Row) -> bool | str:
    """Whether a reply ends with the answer that its row knows; a row that knows none is right.

    Thoughts in `<think>…</think>` do not count, and must be there where the row asks for them.
    """
    about, text = row.get(ASIDE, {}), reply_of(row)
    head, mark, said = text.rpartition("</think>")
    if about.get("task") == "chain_of_thought" and not (mark and head.lstrip().startswith("<think>")):
        return "no thoughts"
    answer = about.get("answer")
    return answer is None or same_answer(said, str(answer)) or "wrong answer"


ANSWER = UserFunction("answer", Path(__file__), check_answer)
"""The checker that is here already."""


def same_answer(said: str, answer: str) -> bool:
    """Whether a reply is the answer; where that is a number, whether the last number in it is the same."""
    if NUMBER.fullmatch(answer.strip()) is None:
        return said.strip() == answer.strip()
    numbers = NUMBER.findall(said)
    return bool(numbers) and number_of(numbers[-1]) == number_of(answer)


def number_of(text: str) -> Decimal:
    """A number without its commas."""
    return Decimal(text.strip().replace(",", ""))


def reply_of(row: Mapping[str, Any]) -> str:
    """What the assistant says last."""
    return row["messages"][-1]["content"] if "messages" in row else row["prompt"]


def wording(row: Mapping[str, Any]) -> str:
    """The text whose likeness to that of other rows is measured: the question with its reply, for one reply
    may be right for many questions; of a row that is a prompt alone, that."""
    if "messages" not in row:
        return row["prompt"]
    return "\n".join(turn["content"] for turn in row["messages"][-2:])


@dataclass(frozen=True)
class Judge:
    """Keeps or drops rows, in the order in which they are made."""

    min_tokens: int
    max_tokens: int | None
    checker: Checker | None
    novelty: Novelty | None

    def reason(self, row: Row) -> str | None:
        """Why a row goes, or None if it stays; one that stays is what later ones are measured against.

        Raises:
          UserError: the checker fails.
        """
        about = row[ASIDE]
        if not about["finished"]:
            return "unfinished"
        if not reply_of(row).strip():
            return "empty"
        if about["tokens"] < self.min_tokens:
            return "too short"
        if self.max_tokens is not None and about["tokens"] > self.max_tokens:
            return "too long"
        if self.checker is not None and (reason := self.checker.reason(row, about["made_from"])) is not None:
            return reason
        if self.novelty is not None and not self.novelty.is_new(wording(row)):
            return "not new"
        self.remember(row)
        return None

    def remember(self, row: Row) -> None:
        """Takes a row that is kept for one that later ones are measured against."""
        if self.novelty is not None:
            self.novelty.add(wording(row))

    def settings(self) -> dict[str, Any]:
        """What decides, by the name of the option."""
        return {
            "--min-tokens": self.min_tokens,
            "--max-tokens": self.max_tokens,
            "--checker": self.checker and self.checker.content,
            "--novelty": self.novelty and self.novelty.limit,
        }
