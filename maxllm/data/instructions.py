"""Instructions by kind of task, in English and Chinese, filled from the templates of instructions.yaml.

maxllm data instructions --out prompts.jsonl --count 1000     prompts, for `maxllm generate --prompts`
maxllm data negatives    --out negatives.jsonl --count 100    refusals and questions back, for SFT as they are
maxllm data thoughts     --out thoughts.jsonl --count 500     sums that are thought through, likewise

Each kind of task in each language has as many rows as its templates and their slots can be combined; they are
dealt in turn, in an order that the seed decides, and none comes twice.
"""

from __future__ import annotations

import json
import math
import operator
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any

from maxllm.data.chat import Message
from maxllm.data.fields import ASIDE
from maxllm.data.prompts import conversation_row
from maxllm.errors import UserError, listed
from maxllm.files import parse_yaml, write_text

Row = dict[str, Any]

OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}


@dataclass(frozen=True)
class Template:
    """One wording of a kind of task."""

    task: str
    language: str
    text: str
    reply: str | None
    """What the assistant says; None where a teacher is to say it."""
    answer: Any
    """The right answer as arithmetic on slots, [operation, left, right]; None where none is known."""
    steps: Mapping[str, Any]
    """What is worked out on the way there, by names that the reply and the answer may use."""
    slots: Mapping[str, Sequence[Any]]
    """The values of each slot in the text, which are all that there are."""

    @property
    def size(self) -> int:
        """How many rows it makes."""
        return math.prod(map(len, self.slots.values()))

    def row(self, number: int) -> Row:
        """One of them."""
        values = {}
        for name, choices in self.slots.items():
            number, place = divmod(number, len(choices))
            values[name] = choices[place]
        for name, expression in self.steps.items():
            values[name] = computed(expression, values)
        about = {"task": self.task, "language": self.language}
        if self.answer is not None:
            about["answer"] = str(computed(self.answer, values))
        text = self.text.format(**values)
        if self.reply is None:
            return {"prompt": text, ASIDE: about}
        return conversation_row([Message(role="user", content=text)], self.reply.format(**values), about)


def computed(expression: Any, values: Mapping[str, Any]) -> int:
    """What [operation, left, right], with slots for numbers, comes to."""
    if isinstance(expression, str):
        return values[expression]
    operation, left, right = expression
    return OPERATIONS[operation](computed(left, values), computed(right, values))


@cache
def templates(kind: str) -> dict[tuple[str, str], list[Template]]:
    """The templates of `instructions`, `thoughts` or `negatives`, by task and language."""
    file = resources.files("maxllm.data") / "instructions.yaml"
    told = parse_yaml(file.read_text(encoding="utf-8"))
    ranges = {name: range(low, high + 1) for name, (low, high) in told["slots"]["both"].items()}
    found: dict[tuple[str, str], list[Template]] = {}
    for task, languages in told["instructions" if kind == "thoughts" else kind].items():
        for language, wordings in languages.items():
            slots = told["slots"][language] | ranges
            group = [template_of(task, language, wording, slots) for wording in wordings]
            if kind == "instructions":
                group = [replace(template, reply=None) for template in group]
            elif kind == "thoughts":
                group = [template for template in group if template.reply is not None]
            if group:
                found[task, language] = group
    return found


def template_of(task: str, language: str, wording: Any, slots: Mapping[str, Sequence[Any]]) -> Template:
    """A template from what the file says: a text, or a text with what is known of it."""
    given = wording if isinstance(wording, dict) else {"text": wording}
    names = dict.fromkeys(name for _, name, _, _ in Formatter().parse(given["text"]) if name)
    return Template(
        task,
        language,
        given["text"],
        given.get("reply"),
        given.get("answer"),
        given.get("steps", {}),
        {name: slots[name] for name in names},
    )


def rows(kind: str, count: int, seed: int, tasks: Sequence[str] | None = None) -> Iterator[Row]:
    """`count` different rows, dealt from every task and language in turn.

    Args:
      kind: `instructions`, `thoughts` or `negatives`.
      count: how many.
      seed: decides which, and in which order.
      tasks: the only ones that are wanted; None for all.

    Raises:
      UserError: there is no such task, or there are fewer rows.
    """
    known = list(dict.fromkeys(task for task, _ in templates(kind)))
    for task in tasks or ():
        if task not in known:
            raise UserError(f"--task {task} is none of the {kind}, which are {', '.join(known)}")
    groups = {key: group for key, group in templates(kind).items() if tasks is None or key[0] in tasks}
    total = sum(template.size for group in groups.values() for template in group)
    if count > total:
        what = listed(tasks or [kind])
        raise UserError(f"--count {count} is more than the {total:,} different rows of {what}; give less")
    decks = [deck(group, count, seed) for group in groups.values()]
    while count > 0:
        for each in decks:
            row = next(each, None)
            if row is not None and count > 0:
                count -= 1
                yield row


def deck(group: Sequence[Template], count: int, seed: int) -> Iterator[Row]:
    """At most `count` rows of some templates, in an order that the seed decides."""
    rng = random.Random(f"{seed}/{group[0].task}/{group[0].language}")
    total = sum(template.size for template in group)
    for number in rng.sample(range(total), min(count, total)):
        for template in group:
            if number < template.size:
                yield template.row(number)
                break
            number -= template.size


def write(kind: str, out: Path, count: int, seed: int, tasks: Sequence[str] | None) -> dict[str, Any]:
    """Writes rows to a file; returns how many of each task they are.

    Raises:
      UserError: the file is there or is called otherwise; or see `rows`.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out} does not end in .jsonl, by which rows are known")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or give another --out")
    made = list(rows(kind, count, seed, tasks))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    counts = Counter(row[ASIDE]["task"] for row in made)
    return {"out": str(out), "rows": len(made), "tasks": dict(sorted(counts.items()))}
