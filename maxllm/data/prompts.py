"""Rows of prompts that a model is to answer, and the rows of SFT that its replies make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maxllm.data.chat import Message, in_one, left_out, read_turns
from maxllm.data.fields import ASIDE, Fields, RowError
from maxllm.data.rows import TURNS, first_of, prompt_of, with_lead


def prompt_turns(row: Fields) -> list[Message]:
    """The turns before the reply that is wanted, of a row of prompts or of instructions.

    A conversation that ends with the assistant's turn is asked for another one in its place.

    Raises:
      RowError: naming the field.
    """
    turns = first_of(row, TURNS)
    if turns is None:
        return prompt_of(row)
    messages = with_lead(row, read_turns(row[turns], turns, row))
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise RowError(f"field {turns!r} holds no turn to answer")
    return messages


def rest_of(row: Fields) -> dict[str, Any]:
    """What a row says beside its prompt, which is carried along: a known answer, the kind of task, an id."""
    aside = row.get(ASIDE)
    names = sorted(name for name in row.unread() if "." not in name)
    return {**(aside if isinstance(aside, dict) else {}), **{name: row[name] for name in names}}


def conversation_row(prompt: Sequence[Message], reply: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """A row of SFT in which the reply alone is in the loss.

    Args:
      prompt: the turns before it.
      reply: what the assistant says.
      about: what is told of the row beside the conversation.
    """
    turns = [written(left_out(message)) for message in prompt]
    tools = prompt[0].get("tools")
    row: dict[str, Any] = {"messages": [*turns, {"role": "assistant", "content": reply}]}
    return row | ({"tools": tools} if tools else {}) | {ASIDE: dict(about)}


def written(message: Message) -> dict[str, Any]:
    """A message as `read_turn` reads it."""
    turn = {name: value for name, value in in_one(message).items() if name not in ("tools", "untrained")}
    return turn | ({"weight": 0} if message.get("untrained") else {})
