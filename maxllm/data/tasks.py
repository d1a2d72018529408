"""Small verifiable tasks: a seeded generator, and a solver that knows the right answer to every prompt.

They stand in for human instruction and preference data where none can be shipped: every row has the form
users bring (`instruction`/`input`/`output`, `prompt`/`chosen`/`rejected`), and every answer can be checked.
Training and held-out prompts are disjoint by construction (a hash of the digits decides).

    tasks:train:6000      6,000 rows, reproducible from the seed
    tasks:heldout:300     300 rows none of which is ever a training row
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_EIGHTHS = 1
"""Of all inputs, this many eighths are held out."""

DIGITS_MIN, DIGITS_MAX = 3, 5


@dataclass(frozen=True)
class Task:
    """One kind of question about a string of digits, worded in English and in Chinese."""

    instructions: tuple[str, str]
    solve: Callable[[str], str]


TASKS = (
    Task(("Reverse the digits.", "倒着写。"), lambda digits: digits[::-1]),
    Task(("Sort the digits.", "从小到大写。"), lambda digits: "".join(sorted(digits))),
    Task(("What is the largest digit?", "何者最大？"), max),
)

SOLVERS = {instruction: task.solve for task in TASKS for instruction in task.instructions}


def solve(prompt: str) -> str:
    """The right answer to a prompt `instruction\\ndigits`.

    Raises:
      ValueError: it is not a prompt of one of the tasks.
    """
    instruction, _, digits = prompt.partition("\n")
    if instruction not in SOLVERS or not digits.isdigit():
        raise ValueError(f"{prompt!r} is not a prompt of these tasks")
    return SOLVERS[instruction](digits)


def check(prompt: str, reply: str) -> bool:
    """Whether a reply is the right answer, up to surrounding white space."""
    return reply.strip() == solve(prompt)


def split_of(digits: str) -> Split:
    """Which split an input belongs to."""
    return "heldout" if hashlib.blake2b(digits.encode()).digest()[0] % 8 < HELDOUT_EIGHTHS else "train"


def questions(split: Split, seed: int) -> Iterator[tuple[str, str, random.Random]]:
    """Endless (instruction, digits, random source), the digits all of one split."""
    rng = random.Random(f"{split}/{seed}")
    while True:
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(DIGITS_MIN, DIGITS_MAX)))
        if split_of(digits) == split:
            yield rng.choice(rng.choice(TASKS).instructions), digits, rng


def instruction_rows(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"instruction", "input", "output"}`."""
    for _, (instruction, digits, _) in zip(range(count), questions(split, seed), strict=False):
        yield {"instruction": instruction, "input": digits, "output": SOLVERS[instruction](digits)}


def preference_rows(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"prompt", "chosen", "rejected"}`: the right answer and a wrong one."""
    for _, (instruction, digits, rng) in zip(range(count), questions(split, seed + 1), strict=False):
        answer = SOLVERS[instruction](digits)
        yield {
            "prompt": f"{instruction}\n{digits}",
            "chosen": answer,
            "rejected": wrong_answer(answer, digits, rng),
        }


def prompt_rows(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"prompt", "answer"}`; the answer is for the checker alone."""
    for _, (instruction, digits, _) in zip(range(count), questions(split, seed + 2), strict=False):
        yield {"prompt": f"{instruction}\n{digits}", "answer": SOLVERS[instruction](digits)}


def wrong_answer(answer: str, digits: str, rng: random.Random) -> str:
    """A plausible wrong answer: a slip in the right one, or the right answer to another question.

    Slips are those that models make: a digit replaced by another of the prompt's, dropped, repeated, or two
    digits exchanged.
    """
    while True:
        i, j = rng.randrange(len(answer)), rng.randrange(len(answer))
        other = rng.choice(digits + rng.choice("0123456789"))
        exchanged = list(answer)
        exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
        slips = (
            answer[:i] + other + answer[i + 1 :],
            answer[:i] + answer[i + 1 :],
            answer[:i] + other + answer[i:],
            "".join(exchanged),
            "".join(exchanged),
            rng.choice(TASKS).solve(digits),
        )
        wrong = rng.choice(slips)
        if wrong and wrong != answer:
            return wrong
