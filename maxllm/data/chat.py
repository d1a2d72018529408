"""Conversations, preferences and prompts in the rows that users bring."""

from __future__ import annotations

from typing import Any, TypedDict

from maxllm.errors import UserError

ROLES = ("system", "user", "assistant")
ROLE_NAMES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}


UNREAD_FIELDS = ("system", "history", "tools", "functions")
"""What rows have beside their conversation and nothing here reads: turns before it, functions to call."""

UNREAD_TURN_FIELDS = ("tool_calls", "function_call")


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


class RowError(UserError):
    """A row that cannot be used; the text says which field and why. Where rows are many, they are counted."""


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The conversation in a row of any of the forms users bring.

    `{"messages": [{"role", "content"}]}`, `{"conversations": [{"from", "value"}]}` (ShareGPT),
    `{"instruction", "input", "output"}` (Alpaca; `input` may be absent or empty).

    Raises:
      RowError: naming the field, also for one that would change what the row means and is not read.
    """
    refuse_unread(row)
    if "messages" in row or "conversations" in row:
        turns = row.get("messages", row.get("conversations"))
        messages = read_turns(turns, "messages" if "messages" in row else "conversations")
    elif "instruction" in row or "output" in row:
        question, answer = text_field(row, "instruction"), text_field(row, "output")
        extra = row.get("input") or ""
        if not isinstance(extra, str):
            raise RowError("field 'input' is not text")
        question = f"{question}\n{extra}" if extra else question
        messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    else:
        raise RowError("none of the fields 'messages', 'conversations', 'instruction' is there")
    if messages[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's")
    return messages


def preference_of(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen reply, rejected reply) of a `{"prompt", "chosen", "rejected"}` row.

    The prompt is text (one user turn) or a list of messages; `question` is accepted for it. A reply is text,
    or a list of messages that ends with it. What stands before it there is the prompt: all of it, where
    `prompt` repeats one of its turns or its beginning.

    Raises:
      RowError: naming the field; also for two equal replies, or for two that answer different turns.
    """
    refuse_unread(row)
    before, chosen = reply_of(row, "chosen")
    other, rejected = reply_of(row, "rejected")
    if before != other:
        raise RowError("'chosen' and 'rejected' begin with different turns")
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are equal")
    if "prompt" not in row and "question" not in row:
        if not before:
            raise RowError("field 'prompt' is missing")
        return before, chosen, rejected
    prompt = prompt_of(row)
    if before and before[: len(prompt)] != prompt and not (len(prompt) == 1 and prompt[0] in before):
        raise RowError("'chosen' begins with other turns than 'prompt'")
    return before or prompt, chosen, rejected


def reply_of(row: dict[str, Any], name: str) -> tuple[list[Message], str]:
    """(turns before it, text) of the field `chosen` or `rejected`.

    Raises:
      RowError: naming the field.
    """
    if not isinstance(row.get(name), list):
        return [], text_field(row, name)
    *before, last = read_turns(row[name], name)
    if last["role"] != "assistant":
        raise RowError(f"field {name!r} does not end with the assistant's turn")
    return before, last["content"]


def prompt_of(row: dict[str, Any]) -> list[Message]:
    """The prompt of a row: field `prompt` or `question`, as text or messages.

    Raises:
      RowError: naming the field.
    """
    name = "question" if "question" in row and "prompt" not in row else "prompt"
    if isinstance(row.get(name), list):
        return read_turns(row[name], name)
    return [Message(role="user", content=text_field(row, name))]


def text_field(row: dict[str, Any], name: str) -> str:
    """A field that must hold non-empty text."""
    if name not in row:
        raise RowError(f"field {name!r} is missing")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field {name!r} is not text or is empty")
    return value


def refuse_unread(row: dict[str, Any]) -> None:
    """Fields of a row that say more than what is read of it; empty ones say nothing.

    Raises:
      RowError: naming the first.
    """
    for name in UNREAD_FIELDS:
        if row.get(name):
            raise RowError(f"field {name!r} would change what the row means, and is not read yet")


def read_turns(turns: Any, name: str) -> list[Message]:
    """Messages from role/content or from/value turns."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"field {name!r} is not a list of turns")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLE_NAMES:
            raise RowError(f"field {name!r} has the unknown role {role!r}")
        if turn.get("weight", 1) != 1:
            raise RowError(f"field {name!r} has a turn with a weight, which is not read yet")
        for unread in UNREAD_TURN_FIELDS:
            if turn.get(unread):
                raise RowError(f"field {name!r} has a turn with {unread!r}, which is not read yet")
        if not isinstance(content, str) or not content.strip():
            raise RowError(f"field {name!r} has a turn without text")
        messages.append(Message(role=ROLE_NAMES[role], content=content))
    return messages
