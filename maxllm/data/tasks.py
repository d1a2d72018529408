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

DIGITS_MIN, DIGITS_MAX = 2, 4


WRONG_DEMONSTRATIONS = 0.25
"""Share of training demonstrations with a mistake, as people make them. SFT imitates the mistakes too;
preferences tell right from wrong, which is what a reward model and PPO are for (Ouyang et al. 2022)."""


@dataclass(frozen=True)
class Task:
    """One kind of question about a string of digits, worded in English and in Chinese."""

    instructions: tuple[str, str]
    solve: Callable[[str], str]


TASKS = (
    Task(("What is the largest digit?", "何者最大？"), max),
    Task(("What is the smallest digit?", "何者最小？"), min),
    Task(("What is the last digit?", "末位为何？"), lambda digits: digits[-1]),
    Task(("How many digits are there?", "共有几位？"), lambda digits: str(len(digits))),
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


def heldout_count() -> int:
    """How many different held-out questions there are."""
    lengths = range(DIGITS_MIN, DIGITS_MAX + 1)
    inputs = (f"{number:0{length}d}" for length in lengths for number in range(10**length))
    return len(SOLVERS) * sum(split_of(digits) == "heldout" for digits in inputs)


def questions(split: Split, seed: int) -> Iterator[tuple[str, str, random.Random]]:
    """(instruction, digits, random source), the digits all of one split.

    Held-out questions are all different, so that each counts once, and end; training ones go on for ever.
    """
    rng = random.Random(f"{split}/{seed}")
    asked: set[tuple[str, str]] = set()
    limit = heldout_count()
    while split == "train" or len(asked) < limit:
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(DIGITS_MIN, DIGITS_MAX)))
        question = rng.choice(rng.choice(TASKS).instructions), digits
        if split_of(digits) != split or (split == "heldout" and question in asked):
            continue
        if split == "heldout":
            asked.add(question)
        yield *question, rng


def instruction_rows(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"instruction", "input", "output"}`; of the training rows, some outputs are wrong."""
    for _, (instruction, digits, rng) in zip(range(count), questions(split, seed), strict=False):
        output = SOLVERS[instruction](digits)
        if split == "train" and rng.random() < WRONG_DEMONSTRATIONS:
            output = wrong_answer(instruction, digits, rng)
        yield {"instruction": instruction, "input": digits, "output": output}


def preference_rows(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"prompt", "chosen", "rejected", "answer"}`: the right answer and a wrong one; for the
    checker alone, the right one again."""
    for _, (instruction, digits, rng) in zip(range(count), questions(split, seed + 1), strict=False):
        answer = SOLVERS[instruction](digits)
        yield {
            "prompt": f"{instruction}\n{digits}",
            "chosen": answer,
            "rejected": wrong_answer(instruction, digits, rng),
            "answer": answer,
        }


def prompt_rows(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"prompt", "answer"}`; the answer is for the checker alone."""
    for _, (instruction, digits, _) in zip(range(count), questions(split, seed + 2), strict=False):
        yield {"prompt": f"{instruction}\n{digits}", "answer": SOLVERS[instruction](digits)}


def wrong_answer(instruction: str, digits: str, rng: random.Random) -> str:
    """A plausible wrong answer.

    Mostly the right answer to a misread input: that is how models err, so a reward model that has not seen it
    is fooled by any reply that merely looks right. Else a slip in writing the answer down, or the answer to
    another question.
    """
    answer = SOLVERS[instruction](digits)
    while True:
        misread = SOLVERS[instruction](slip(digits, rng))
        wrong = rng.choice((misread, misread, misread, slip(answer, rng), rng.choice(TASKS).solve(digits)))
        if wrong != answer:
            return wrong


def slip(digits: str, rng: random.Random) -> str:
    """Digits with one replaced, dropped or repeated, or two exchanged; at least one digit remains."""
    i, j = rng.randrange(len(digits)), rng.randrange(len(digits))
    exchanged = list(digits)
    exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
    replaced = digits[:i] + rng.choice("0123456789") + digits[i + 1 :]
    dropped = digits[:i] + digits[i + 1 :] or replaced
    repeated = digits[:i] + digits[i] + digits[i:]
    return rng.choice((replaced, replaced, replaced, dropped, repeated, "".join(exchanged)))
