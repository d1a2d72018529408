"""What a model is asked when it makes rows: the prompts of a source, or for instructions that are new.

Bootstrapping (Wang et al. 2022, Self-Instruct, section 2.2): the model is shown a few instructions, of which
a quarter are its own, and asked for another one. What is kept is shown in its turn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from maxllm.data.chat import Message
from maxllm.data.fields import ASIDE, Fields, RowError
from maxllm.data.instruct import rows_of
from maxllm.data.prompts import conversation_row, prompt_turns, rest_of
from maxllm.data.render import render_prompt
from maxllm.data.tally import Tally
from maxllm.data.tokenizer import document_start
from maxllm.errors import UserError
from maxllm.run.session import say
from maxllm.stages.chat import Policy

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What the model is asked."""

    messages: list[Message]
    ids: list[int]
    about: dict[str, Any]
    """What its row says besides; under "made_from", where the prompt stands."""
    draw: tuple[int, ...] = ()
    """Numbers of the row and of the sample, which seed what is drawn."""


class Questions(Protocol):
    """Batches of prompts, and what becomes of the replies."""

    @property
    def sizes(self) -> list[int]:
        """Prompts of each batch."""

    def batch(self, number: int) -> list[Prompt]:
        """One batch: a function of its number and of the rows that were kept of those before."""

    def row(self, prompt: Prompt, reply: Mapping[str, Any]) -> Row:
        """The row that a reply makes, with "made_from", "finished" and "tokens" in its meta."""

    def keep(self, row: Row) -> None:
        """Is told of each row that is kept, in order."""


# --- the prompts of a source -------------------------------------------------------------------------------


def read_prompts(policy: Policy, source: str) -> list[Prompt]:
    """The prompts of a source, each with the place where it stands; those that cannot be used are counted.

    Raises:
      UserError: there is no such source, or too much of it cannot be used.
    """
    prompts, tally, config = [], Tally(source), policy.session.config
    for where, row in rows_of(source, "prompt", config.run.seed, tally):
        fields = Fields(row)
        try:
            messages = prompt_turns(fields)
            ids = ids_of(policy, messages)
            prompts.append(Prompt(messages, ids, rest_of(fields) | {"made_from": where}))
        except RowError as error:
            tally.drop(str(error), f"{where}: {error}")
    say(policy.session, tally.line())
    tally.check(config.data.max_bad_share)
    return prompts


def ids_of(policy: Policy, messages: Sequence[Message]) -> list[int]:
    """A prompt as the model reads it.

    Raises:
      RowError: it is too long, or a conversation, where the model goes on with texts.
    """
    if policy.chats:
        ids = render_prompt(policy.session.tokenizer, messages)
    elif len(messages) > 1 or messages[0]["role"] != "user":
        raise RowError("the model goes on with texts, and reads no conversations")
    else:
        ids = document_start(policy.session.tokenizer, messages[0]["content"])
    try:
        policy.check_prompt(ids)
    except UserError:
        raise RowError(f"the prompt is longer than {policy.prompt_limit} tokens") from None
    return ids


class Given:
    """The prompts of a source, some replies to each, in batches of about equal lengths."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], samples: int, rows: int) -> None:
        """Deals all prompts, `samples` times each, into batches of `rows`.

        A batch holds prompts that are padded alike, so that the compiler sees few shapes; their order is that
        of the source, as far as the lengths allow it.
        """
        self._batches: list[list[Prompt]] = []
        waiting: dict[int, list[Prompt]] = {}
        for number, prompt in enumerate(prompts):
            for sample in range(samples):
                length = policy.padded_length(prompt.ids)
                waiting.setdefault(length, []).append(replace(prompt, draw=(number, sample)))
                if len(waiting[length]) == rows:
                    self._batches.append(waiting.pop(length))
        self._batches += [waiting[length] for length in sorted(waiting)]

    @property
    def sizes(self) -> list[int]:
        """Prompts of each batch."""
        return [len(batch) for batch in self._batches]

    def batch(self, number: int) -> list[Prompt]:
        """One batch, whatever was kept."""
        return self._batches[number]

    def row(self, prompt: Prompt, reply: Mapping[str, Any]) -> Row:
        """A conversation of the prompt and its reply."""
        tokens = len(reply["tokens"]) - reply["finished"]
        about = {"sample": prompt.draw[-1], "finished": reply["finished"], "tokens": tokens}
        return conversation_row(prompt.messages, reply["text"], prompt.about | about)

    def keep(self, row: Row) -> None:
        """Nothing depends on it."""


# --- new instructions --------------------------------------------------------------------------------------

ASKED = (
    "Here are instructions that people gave to an assistant:\n\n{examples}\n\n"
    "Write one more instruction, of another kind and about another subject. It must make sense without any "
    "text beside it. Reply with the instruction alone, in one line."
)
"""What a model that chats is told."""

CONTINUED = "Come up with a series of tasks:\n\n{examples}\n{next}."
"""What a model that goes on with texts is given."""

OWN_SHARE = 0.25
"""Of the examples: two of the paper's eight are the model's own."""

NUMBERED = re.compile(r"^\s*(?:(?:task|instruction)\s*)?\d+\s*[.:)、．]\s*(?=\S)", re.IGNORECASE)


@dataclass
class Bootstrapped:
    """Asks for new instructions, each time with others for examples."""

    policy: Policy
    seeds: Sequence[str]
    """The instructions to begin with."""
    examples: int
    """How many are shown."""
    count: int
    """How often the model is asked."""
    rows: int
    """Of a batch."""
    own: list[str] = field(default_factory=list)
    """What was kept of the model's."""

    @property
    def sizes(self) -> list[int]:
        """Prompts of each batch."""
        return [min(self.rows, self.count - start) for start in range(0, self.count, self.rows)]

    def batch(self, number: int) -> list[Prompt]:
        """One batch, whose examples are drawn from what is known when it begins."""
        start = number * self.rows
        return [self.prompt(start + place) for place in range(self.sizes[number])]

    def prompt(self, number: int) -> Prompt:
        """One question for an instruction.

        Raises:
          UserError: the examples are longer than the model's context.
        """
        rng = random.Random(f"{self.policy.session.config.run.seed}/{number}")
        own = rng.sample(self.own, min(len(self.own), int(OWN_SHARE * self.examples)))
        chosen = [*rng.sample(self.seeds, self.examples - len(own)), *own]
        rng.shuffle(chosen)
        listed = "\n".join(f"{n}. {one_line(text)}" for n, text in enumerate(chosen, start=1))
        text = (ASKED if self.policy.chats else CONTINUED).format(examples=listed, next=len(chosen) + 1)
        messages = [Message(role="user", content=text)]
        try:
            ids = ids_of(self.policy, messages)
        except RowError as error:
            raise UserError(f"--bootstrap {self.examples}: {error}; give fewer, or shorter ones") from None
        return Prompt(messages, ids, {"made_from": f"examples {number}"}, (number,))

    def row(self, prompt: Prompt, reply: Mapping[str, Any]) -> Row:
        """A row of prompts; what follows the first instruction of a reply is left out."""
        instruction, whole = instruction_in(reply["text"])
        about = {
            "finished": whole or reply["finished"],
            "tokens": len(self.policy.session.tokenizer.encode(instruction)),
        }
        return {"prompt": instruction, ASIDE: prompt.about | about}

    def keep(self, row: Row) -> None:
        """Shows it from now on."""
        self.own.append(row["prompt"])


def one_line(text: str) -> str:
    """A text without line ends."""
    return " ".join(text.split())


def instruction_in(text: str) -> tuple[str, bool]:
    """The instruction in a reply, and whether more lines follow it: the first line that has a number, or else
    the first that has anything, without its number and quotes."""
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    if not lines:
        return "", False
    line = next((line for line in lines if NUMBERED.match(line)), lines[0])
    return NUMBERED.sub("", line).strip().strip('"“”').strip(), line.endswith("\n")


def check_bootstrap(seeds: int, examples: int) -> None:
    """Looks whether there are instructions enough to show.

    Raises:
      UserError: there are fewer.
    """
    if seeds < examples:
        raise UserError(
            f"--bootstrap {examples} needs as many different instructions in --prompts, which has {seeds}"
        )
