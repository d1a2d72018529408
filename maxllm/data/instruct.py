"""Instruction, preference and prompt rows to the arrays that SFT, the reward model, DPO and PPO train on.

A source is a JSONL file (or .json, .gz) or `tasks:SPLIT:COUNT` (data/tasks.py). Rows that cannot be used are
counted by reason; a row is never cut to fit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from maxllm.config.data import DataConfig
from maxllm.data import render, tasks
from maxllm.data.chat import Message
from maxllm.data.conversation import fits
from maxllm.data.fields import Fields, RowError
from maxllm.data.rows import messages_of, preference_of, prompt_of
from maxllm.data.sources import rows_of_source
from maxllm.data.tally import Tally
from maxllm.data.tokenizer import Tokenizer
from maxllm.errors import UserError
from maxllm.records import PairBatch, PromptBatch, ReplyPairBatch

Kind = Literal["instruction", "preference", "prompt"]
Parsed = TypeVar("Parsed")

TASK_ROWS = {
    "instruction": tasks.instruction_rows,
    "preference": tasks.preference_rows,
    "prompt": tasks.prompt_rows,
}


@dataclass(frozen=True)
class Question:
    """A prompt whose right answer may be known."""

    messages: list[Message]
    answer: str | None
    ids: list[int]
    """Token ids up to where the assistant is to speak."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All fields of its row, where a scorer wants to see them."""


class ReplyPair(NamedTuple):
    """A row of preferences as the policy reads it."""

    prompt: list[Message]
    ids: tuple[list[int], list[int]]
    """Prompt + chosen and prompt + rejected, each ending with the end of the turn."""
    starts: tuple[int, int]
    """Where in each the reply begins."""


def rows_of(source: str, kind: Kind, seed: int, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of a source."""
    if not source.startswith("tasks:"):
        yield from rows_of_source(source, tally)
        return
    _, _, words = source.partition(":")
    split, _, count = words.partition(":")
    if split not in ("train", "heldout") or not re.fullmatch("[0-9]+", count):
        raise UserError(f"source {source!r} is not tasks:train:COUNT or tasks:heldout:COUNT")
    if split == "heldout" and int(count) > tasks.heldout_count():
        raise UserError(f"source {source!r}: there are only {tasks.heldout_count()} held-out questions")
    for number, row in enumerate(TASK_ROWS[kind](split, int(count), seed), start=1):  # type: ignore[arg-type]
        tally.rows += 1
        yield f"{source} row {number}", row


@dataclass(frozen=True)
class RowReader(Generic[Parsed]):
    """Reads a stage's rows from its sources, and keeps held-out prompts apart from those that are trained on.

    A prompt is what the model reads: the tokens up to where a reply begins, whatever fields they came in. Of
    a conversation with several replies the first prompt decides: whoever shares a later one shares it too.
    """

    data: DataConfig
    """Sources, share to hold out, share of bad rows."""
    kind: Kind
    """What `tasks:` sources give."""
    seed: int
    """Of `tasks:` sources."""
    parse: Callable[[Fields], Parsed]
    """Makes of a row what is trained on, or raises `RowError` for one that cannot be used."""
    prompt: Callable[[Parsed], Sequence[int]]
    """The token ids before the first reply that is trained on or measured; may raise `RowError`."""

    def split(self, training: bool = True) -> tuple[list[Parsed], list[Parsed], list[Tally]]:
        """(training rows, held-out rows, counts by source).

        Without data.heldout_sources a hash of the prompt says which side a row is on; with them, a training
        row whose prompt is held out is dropped, and counted.

        Args:
          training: whether training rows are wanted: without, `data.sources` are only read where a share of
            them is held out.

        Raises:
          UserError: a source is missing or empty, much of it is unusable, or a side stays empty.
        """
        data = self.data
        if not data.sources and (training or not data.heldout_sources):
            raise UserError("data.sources is empty: name at least one file")
        if data.heldout_sources:
            heldout, heldout_tallies = self.read(data.heldout_sources)
            if not training:
                return [], [row for _, row in heldout], heldout_tallies
            train, tallies = self.read(data.sources, {key for key, _ in heldout})
            return [row for _, row in train], [row for _, row in heldout], tallies + heldout_tallies
        rows, tallies = self.read(data.sources)
        if self.kind == "instruction" and any(source.startswith("tasks:train:") for source in data.sources):
            raise UserError(
                "demonstrations of tasks:train are partly wrong on purpose, so they cannot be held out; "
                "give data.heldout_sources=[tasks:heldout:500]"
            )
        first, end = data.heldout_range
        kept = [row for key, row in rows if not first <= key < end]
        held = [row for key, row in rows if first <= key < end]
        if not kept or not held:
            share = f"heldout_share={data.heldout_share:g}" if data.fold is None else f"fold={data.fold}"
            raise UserError(
                f"{len(rows)} rows are too few to hold out data.{share} of them; give data.heldout_sources"
            )
        return kept, held, tallies

    def read(
        self, sources: Sequence[str], held: Container[int] = ()
    ) -> tuple[list[tuple[int, Parsed]], list[Tally]]:
        """The rows of sources, each after the hash of its prompt, but for those in `held`; counts by source.

        Raises:
          UserError: a source is missing or empty, too large a share of it is unusable, or a field is not
            read and data.strict is set.
        """
        rows: list[tuple[int, Parsed]] = []
        tallies = []
        for source in sources:
            tally = Tally(source)
            for where, row in rows_of(source, self.kind, self.seed, tally):
                fields = Fields(row, source)
                try:
                    parsed = self.parse(fields)
                    key = prompt_hash(self.prompt(parsed))
                except RowError as error:
                    tally.drop(str(error), f"{where}: {error}")
                    continue
                unread = fields.unread()
                if unread and self.data.strict:
                    raise UserError(
                        f"{where}: nothing here reads the field {min(unread)!r}; data.strict=false "
                        "passes it over"
                    )
                tally.unread.update(unread)
                if key in held:
                    tally.drop("its prompt is held out")
                else:
                    rows.append((key, parsed))
            tally.check(self.data.max_bad_share)
            tallies.append(tally)
        return rows, tallies


def prompt_hash(ids: Sequence[int]) -> int:
    """64 bits of a prompt as the model reads it."""
    content = np.array(ids, np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def reply_pair(tokenizer: Tokenizer, row: Mapping[str, Any], length: int) -> ReplyPair:
    """Both replies after their prompt, each in at most `length` tokens."""
    prompt, *replies = preference_of(row)
    (chosen, first), (rejected, second) = (
        render.render_reply(tokenizer, [*prompt, reply]) for reply in replies
    )
    if chosen == rejected:
        raise RowError("the two replies are equal as the model reads them")
    fits(max(len(chosen), len(rejected)), length, "prompt and reply")
    return ReplyPair(prompt, (chosen, rejected), (first, second))


def pad_pairs(pairs: Sequence[tuple[list[int], list[int]]], length: int, pad: int) -> PairBatch:
    """Right-padded pairs [N, 2, length]."""
    tokens = np.full((len(pairs), 2, length), pad, np.int32)
    lengths = np.zeros((len(pairs), 2), np.int32)
    for n, pair in enumerate(pairs):
        for c, ids in enumerate(pair):
            tokens[n, c, : len(ids)], lengths[n, c] = ids, len(ids)
    return PairBatch(tokens, lengths, np.ones(len(pairs), np.float32))


def pad_reply_pairs(pairs: Sequence[ReplyPair], length: int, pad: int) -> ReplyPairBatch:
    """Pairs padded on the right, [N, 2, length], with the places where their replies begin."""
    starts = np.array([pair.starts for pair in pairs], np.int32)
    return ReplyPairBatch(pad_pairs([pair.ids for pair in pairs], length, pad), starts)


def question_of(tokenizer: Tokenizer, row: Mapping[str, Any], length: int, whole: bool = False) -> Question:
    """The question in a prompt row (`prompt`, optional `answer`) or in an instruction row (its last reply).

    Args:
      tokenizer: lays it out.
      row: the row.
      length: most tokens of the prompt.
      whole: whether all fields of the row are kept.
    """
    if "prompt" in row or "question" in row:
        messages, answer = prompt_of(row), answer_of(row)
    else:
        *messages, last = messages_of(row)
        answer = last["content"]
    ids = render.render_prompt(tokenizer, messages)
    fits(len(ids), length, "the prompt")
    return Question(messages, answer, ids, dict(row) if whole else {})


def answer_of(row: Mapping[str, Any]) -> str | None:
    """The right answer to a row's prompt, if the row has one."""
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise RowError("field 'answer' is not text")
    return answer


def pad_prompts(prompts: Sequence[Sequence[int]], length: int, pad: int) -> PromptBatch:
    """Left-padded prompts [N, length].

    Raises:
      UserError: a prompt is longer than `length`.
    """
    tokens = np.full((len(prompts), length), pad, np.int32)
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    for n, ids in enumerate(prompts):
        if len(ids) > length:
            raise UserError(
                f"a prompt of {len(ids)} tokens does not fit the {length} that are left for prompts"
            )
        tokens[n, length - len(ids) :] = ids
    return PromptBatch(tokens, lengths)
