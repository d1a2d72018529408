"""Rows of SFT to the pieces that are trained on: of a conversation one, or one for each reply; or a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from maxllm.data.chat import Message, in_loss, left_out
from maxllm.data.fields import RowError
from maxllm.data.pack import Piece
from maxllm.data.render import TurnsDiffer, render, render_prompt
from maxllm.data.rows import messages_of, whole_text
from maxllm.data.tokenizer import Tokenizer, document_start

Turns = Literal["all", "each", "last"]


@dataclass(frozen=True)
class Conversation:
    """A row as it is said and as it is packed."""

    messages: list[Message]
    """Empty for a text."""
    pieces: list[Piece]
    prompt: list[int]
    """Token ids of what stands before the first reply; of a text, all of them."""
    cut: bool = False
    """Whether the chat template allowed it only one reply at a time."""
    turns: tuple[int, ...] = (1,)
    """Of each piece: which of the conversation's replies is the first that it is trained on, from 1."""
    source: str = ""
    """Which of the recipe's sources it came from."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """All of the row's fields, where a scorer wants to see them."""


def read_conversation(
    tokenizer: Tokenizer, row: Mapping[str, Any], length: int, turns: Turns = "all"
) -> Conversation:
    """A row of SFT.

    Args:
      tokenizer: lays it out.
      row: a conversation in any form, or a text.
      length: tokens that each piece may have.
      turns: what of a conversation is trained on: every reply in one piece, each reply after what was said
        before it in a piece of its own, or only the last. All have the same loss on a reply.

    Raises:
      RowError: naming the field.
    """
    text = whole_text(row)
    if text is not None:
        ids = [*document_start(tokenizer, text), tokenizer.eos]
        return Conversation([], [piece_of(ids, [1] * len(ids), length, "the text")], ids)
    messages = messages_of(row)
    prompt = render_prompt(tokenizer, before_first_reply(messages))
    samples, cut = samples_of(messages, turns), False
    try:
        rendered = [render(tokenizer, sample) for sample in samples]
    except TurnsDiffer:
        samples, cut = samples_of(messages, "each"), True
        rendered = [render(tokenizer, sample) for sample in samples]
    pieces = [piece_of(ids, mask, length, "the conversation") for ids, mask in rendered]
    replies = sum(map(in_loss, messages))
    alone = 1 if turns == "all" else replies
    firsts = (alone,) if len(pieces) == 1 else tuple(range(1, replies + 1))
    return Conversation(messages, pieces, prompt, cut, firsts)


def samples_of(messages: Sequence[Message], turns: Turns) -> list[list[Message]]:
    """A conversation as the samples that are trained on, which leave the other replies out of the loss."""
    if turns == "all":
        return [list(messages)]
    ends = [number for number, message in enumerate(messages) if in_loss(message)]
    return [
        [left_out(message) if n < end else message for n, message in enumerate(messages[: end + 1])]
        for end in (ends if turns == "each" else ends[-1:])
    ]


def before_first_reply(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns of a conversation before the assistant first speaks."""
    first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first]


def piece_of(ids: list[int], mask: list[int], length: int, what: str) -> Piece:
    """Ids and their loss mask, which must fit into one row."""
    fits(len(ids) - 1, length, what)
    return Piece(ids, mask)


def fits(length: int, limit: int, what: str) -> None:
    """Refuses a row that is too long."""
    if length > limit:
        raise RowError(f"{what} is longer than {limit} tokens")
